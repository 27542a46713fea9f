"""The admission of the jobs of steps: a gateway checks each when its step begins, and chooses its options."""

import asyncio
import contextlib
from datetime import timedelta
from typing import Final

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ApplicationError, FailureError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from jobs import names
    from llm_pb import internal_pb2, llm_pb2

from workflows import activities
from workflows.ordered_activities import start_in_order

ADMISSION: Final = timedelta(minutes=1)
"""Maximum time of an attempt to check a step and to choose its options."""
_LONGEST: Final = timedelta(minutes=10)
"""Maximum time to check a step in all."""
_AT_ONCE: Final = timedelta(seconds=5)
"""Maximum time of the attempt within a workflow task, which takes in nothing meanwhile, such as a cancel."""
_RETRIES: Final = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(minutes=1))
_ONCE: Final = RetryPolicy(maximum_attempts=1)
_Waiting = tuple[llm_pb2.JobRequest, "asyncio.Future[internal_pb2.JobOptions | None]"]


class Admission:
    """Admits the jobs of the steps of one pipeline.

    An activity runs the code of the workflow once more and adds events to the history. So the jobs of a fan-out that
    begin at the same time share one. Where that fails, each is admitted by itself. The activities of earlier pipelines
    were local: see PATCH_ORDERED.
    """

    def __init__(self) -> None:
        self.together = False
        """Whether jobs that begin at the same time share an activity."""
        self._waiting: list[_Waiting] = []
        self._admitting: set[asyncio.Task[None]] = set()

    async def options_of(self, job: llm_pb2.JobRequest, within: timedelta) -> internal_pb2.JobOptions:
        """Return the options of a job, which has so much time: a store that is away for some minutes delays its step.

        Raises FailureError for one that is refused.
        """
        if self.together and (chosen := await self._with_others(job)) is not None:
            return chosen
        longest = min(within, _LONGEST)
        if workflow.patched(names.PATCH_ORDERED):
            return await _admitted(job, longest)
        try:
            return await workflow.execute_local_activity(
                activities.admit_step,
                job,
                schedule_to_close_timeout=longest,
                start_to_close_timeout=_AT_ONCE,
                retry_policy=_ONCE,
            )
        except FailureError as error:
            if _is_final(error) or not workflow.patched(names.PATCH_ADMITS_LATER):
                raise
        return await _admitted(job, longest)

    async def _with_others(self, job: llm_pb2.JobRequest) -> internal_pb2.JobOptions | None:
        """Return the options of a job; None where it is alone, is refused, or cannot be checked now."""
        chosen: asyncio.Future[internal_pb2.JobOptions | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((job, chosen))
        if len(self._waiting) == 1:
            task = asyncio.create_task(self._admit())
            self._admitting.add(task)
            task.add_done_callback(self._admitting.discard)
        return await chosen

    async def _admit(self) -> None:
        """Admit all jobs that have come until nothing else can run, which is when conditions are looked at."""
        with contextlib.suppress(asyncio.CancelledError):
            # A cancel of the workflow that comes meanwhile is raised here, too. It reaches the steps by themselves.
            await workflow.wait_condition(lambda: True)
        waiting, self._waiting = [one for one in self._waiting if not one[1].done()], []
        found: list[internal_pb2.JobOptions | None] = [None] * len(waiting)
        try:
            if len(waiting) > 1:
                found = await _options_of([job for job, _ in waiting])
        finally:
            for (_, chosen), options in zip(waiting, found, strict=True):
                if not chosen.done():
                    chosen.set_result(options)


async def _admitted(job: llm_pb2.JobRequest, longest: timedelta) -> internal_pb2.JobOptions:
    return await workflow.execute_activity(
        activities.admit_step,
        job,
        schedule_to_close_timeout=longest,
        start_to_close_timeout=ADMISSION,
        retry_policy=_RETRIES,
    )


def _is_final(error: FailureError) -> bool:
    """Return whether no further attempt of a local activity would succeed, or none is wanted.

    The SDK raises what the activity has raised, in no ActivityError.
    """
    return is_cancelled_exception(error) or (isinstance(error, ApplicationError) and error.non_retryable)


async def _options_of(jobs: list[llm_pb2.JobRequest]) -> list[internal_pb2.JobOptions | None]:
    request = internal_pb2.AdmitStepsRequest(jobs=jobs)
    try:
        answer = await start_in_order(
            activities.admit_steps,
            request,
            schedule_to_close_timeout=ADMISSION,
            start_to_close_timeout=_AT_ONCE,
            retry_policy=_ONCE,
        )
    except FailureError:
        return [None] * len(jobs)
    return [answer.options[number] if number >= 0 else None for number in answer.numbers]
