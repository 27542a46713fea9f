"""One job for every outcome, for recorded histories and for tests that need each outcome."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from google.protobuf.duration_pb2 import Duration
from temporalio.client import Client, WorkflowHandle

from jobs import names
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.jobs import new_job, until_output, watch, webhook

_LONG: Final = {"max_tokens": 4000}
_NOWHERE: Final = webhook("http://127.0.0.1:9/")
"""Webhook at an address where no server listens."""

Outcome = Callable[[LlmServiceStub, Client], Awaitable[str]]
"""Function that runs one job to its end and returns its workflow id."""


async def _submit(stub: LlmServiceStub, job: llm_pb2.JobRequest) -> str:
    return (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id


def _simply(job: Callable[[], llm_pb2.JobRequest]) -> Outcome:
    async def run(stub: LlmServiceStub, temporal: Client) -> str:
        id_ = await _submit(stub, job())
        await watch(stub, id_)
        return id_

    return run


async def _cancelled(stub: LlmServiceStub, temporal: Client) -> str:
    id_ = await _submit(stub, new_job(params=_LONG))
    await until_output(stub, id_)
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_, reason="enough"))
    await watch(stub, id_)
    return id_


async def _cancelled_in_queue(stub: LlmServiceStub, temporal: Client) -> str:
    id_ = await _submit(stub, new_job(model="idle"))
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    await watch(stub, id_)
    return id_


async def _cancelled_by_temporal(stub: LlmServiceStub, temporal: Client) -> str:
    id_ = await _submit(stub, new_job(params=_LONG))
    await until_output(stub, id_)
    await temporal.get_workflow_handle(id_).cancel()
    await watch(stub, id_)
    return id_


async def _started_by_hand(stub: LlmServiceStub, temporal: Client) -> str:
    handle: WorkflowHandle[None, None] = await temporal.start_workflow(
        names.JOB_WORKFLOW_TYPE, new_job(params={"max_tokens": 2}), id="by-hand", task_queue=names.WORKFLOW_QUEUE
    )
    await watch(stub, handle.id)
    return handle.id


async def _by_hand_and_invalid(stub: LlmServiceStub, temporal: Client) -> str:
    """Run a job with timeouts and an id that Temporal itself would refuse."""
    timeouts = llm_pb2.JobTimeouts(total=Duration(seconds=315_576_000_000), run=Duration(seconds=-5))
    job = llm_pb2.JobRequest(user_id="u" * 10_000, timeouts=timeouts)
    handle: WorkflowHandle[None, None] = await temporal.start_workflow(
        names.JOB_WORKFLOW_TYPE, job, id="by-hand-invalid", task_queue=names.WORKFLOW_QUEUE
    )
    await watch(stub, handle.id)
    return handle.id


OUTCOMES: Final[dict[str, Outcome]] = {
    "succeeded": _simply(lambda: new_job(params={"max_tokens": 5})),
    "succeeded-after-a-fault": _simply(lambda: new_job("[[fault:failed@3:once]]", params={"max_tokens": 5})),
    "succeeded-notification-failed": _simply(lambda: new_job(params={"max_tokens": 2}, notify=[*_NOWHERE, *_NOWHERE])),
    "succeeded-progress-told": _simply(
        lambda: new_job(
            params={"max_tokens": 300},
            notify=_NOWHERE,
            notify_options=llm_pb2.NotifyOptions(events=llm_pb2.NotifyEvent.values()[1:]),
        )
    ),
    "failed": _simply(lambda: new_job("[[fault:oom@3]]", params={"max_tokens": 5})),
    "failed-unknown-model": _simply(lambda: new_job(model="structured")),
    "cancelled": _cancelled,
    "cancelled-in-queue": _cancelled_in_queue,
    "cancelled-by-temporal": _cancelled_by_temporal,
    "timed-out-in-queue": _simply(
        lambda: new_job(model="idle", timeouts=llm_pb2.JobTimeouts(queue=Duration(seconds=1)))
    ),
    "timed-out-running": _simply(lambda: new_job(params=_LONG, timeouts=llm_pb2.JobTimeouts(run=Duration(seconds=1)))),
    # Temporal's timers may be a second late, and a tenth of the total time is reserved for notifications.
    "timed-out-in-all": _simply(
        lambda: new_job(params={"max_tokens": 8000}, timeouts=llm_pb2.JobTimeouts(total=Duration(seconds=12)))
    ),
    "started-by-hand": _started_by_hand,
    "started-by-hand-invalid": _by_hand_and_invalid,
}


async def run_all(stub: LlmServiceStub, temporal: Client) -> dict[str, str]:
    """Run one job for every outcome concurrently, and return the workflow ids by the outcome's name."""
    ids = await asyncio.gather(*(outcome(stub, temporal) for outcome in OUTCOMES.values()))
    return dict(zip(OUTCOMES, ids, strict=True))
