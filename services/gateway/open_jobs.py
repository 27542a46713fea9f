"""Counts the jobs that wait and run, for metrics. No call waits for it, so it counts periodically.

Temporal's visibility store knows how many jobs of a model have not ended. The model's task queues know how many of them
wait for a worker. Visibility accepts few requests (10 a second for all gateways by default), and List needs them, too.
So the models are counted in turn, at most one a second, and each by two counts: of all jobs, and of background jobs. A
gateway whose count is refused counts less often, because gateways do not know how many they are.
A count for each class would say no more: Temporal does not tell which jobs of a queue are of which class.
"""

import asyncio
import itertools
import logging
from collections.abc import Iterable
from datetime import timedelta
from typing import Final

from opentelemetry.metrics import CallbackOptions, Meter, Observation
from temporalio.api.workflowservice.v1 import CountWorkflowExecutionsRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from jobs import names
from jobs.classes import NAMES, is_background
from llm_pb import common_pb2
from services.gateway.models.catalogue import Models, background_queue
from services.gateway.models.settings import Model
from services.gateway.pace import Pace

_log = logging.getLogger(__name__)
_MIN_PAUSE: Final = timedelta(seconds=1)
_TIMEOUT: Final = timedelta(seconds=3)
"""Timeout of a count. It is short, because the last count stays until the next one has failed."""
_QUEUES: Final = ("interactive", "background")
"""The queues of a model: of HIGH and STANDARD, and of BACKGROUND and SCHEDULED."""
_BACKGROUND: Final = " AND {} IN ({})".format(
    names.JOB_CLASS.name, ", ".join(f"'{common_pb2.JobClass.Name(one)}'" for one in NAMES if is_background(one))
)


class OpenJobs:
    """A gauge of the jobs that have not ended, by model, queue and state. A model whose last count failed is absent."""

    def __init__(self, client: Client, models: Models, meter: Meter) -> None:
        self._client = client
        self._models = models
        self._counted: dict[tuple[str, str], tuple[int, int]] = {}
        """Number of queued jobs and of the others, by model and queue."""
        meter.create_observable_gauge(
            "llm.job.open",
            [self._observe],
            "{job}",
            "Number of jobs that have not ended, queued or running. Every gateway counts all of them.",
        )

    async def keep_counting(self, interval: timedelta) -> None:
        """Count each model once per interval, until cancelled. An interval of zero counts none."""
        models = self._models.with_own_queue() if interval else []
        pace = Pace(max(interval / max(len(models), 1), _MIN_PAUSE))
        try:
            for model in itertools.cycle(models):
                await asyncio.sleep(pace.after(accepted=await self._count(model)))
        finally:
            self._counted.clear()

    async def _count(self, model: Model) -> bool:
        """Count the jobs of a model. Return False if Temporal has refused it because of its limits."""
        jobs = f"WorkflowType = '{names.JOB_WORKFLOW_TYPE}' AND Model = '{model.name}' AND ExecutionStatus = 'Running'"
        try:
            every = await self._number(jobs)
            background = await self._number_in_background(jobs)
            counts = {
                "interactive": await self._split(model.queue, max(every - background, 0)),
                "background": await self._split(background_queue(model), background),
            }
        except RPCError as error:
            if [self._counted.pop((model.name, queue), None) for queue in _QUEUES] != [None, None]:
                _log.warning("the open jobs of %s cannot be counted: %s %s", model.name, error.status.name, error)
            return error.status != RPCStatusCode.RESOURCE_EXHAUSTED
        self._counted.update({(model.name, queue): count for queue, count in counts.items()})
        return True

    async def _number_in_background(self, jobs: str) -> int:
        try:
            return await self._number(jobs + _BACKGROUND)
        except RPCError as error:
            if error.status != RPCStatusCode.INVALID_ARGUMENT:
                raise
            # The namespace does not know the search attribute, so it has no such jobs.
            return 0

    async def _number(self, query: str) -> int:
        # Not the client's count_workflows: that tries again for ten seconds.
        found = await self._client.workflow_service.count_workflow_executions(
            CountWorkflowExecutionsRequest(namespace=self._client.namespace, query=query), timeout=_TIMEOUT
        )
        return found.count

    async def _split(self, queue: str, count: int) -> tuple[int, int]:
        """Return how many of the jobs of a queue wait in it, and how many do not."""
        state = await self._models.queue_state(self._client, queue)
        # The queue still holds, for a while, jobs whose wait has timed out.
        queued = min(state.backlog, count)
        return queued, count - queued

    def _observe(self, _: CallbackOptions) -> Iterable[Observation]:
        for (model, queue), counts in [*self._counted.items()]:
            for state, count in zip(("queued", "running"), counts, strict=True):
                labels = {"gen_ai.request.model": model, "llm.job.queue": queue, "llm.job.state": state}
                yield Observation(count, labels)
