"""Ledgers of open jobs, started by hand."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any, Final

from temporalio import activity
from temporalio.api.enums.v1 import EventType
from temporalio.client import Client, WorkflowHandle, WorkflowUpdateFailedError
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from jobs import names
from jobs.ids import ledger_workflow_id
from llm_pb import internal_pb2
from tests.support.replays import asked
from workflows.llm_ledger import LLMLedgerWorkflow

PATIENCE: Final = 60


async def start_ledger(temporal: Client, tenant: str, **state: Any) -> None:
    """Start a tenant's ledger, with times and numbers that a gateway does not give it: see LedgerState."""
    await temporal.start_workflow(
        names.LEDGER_WORKFLOW_TYPE,
        internal_pb2.LedgerState(**state),
        id=ledger_workflow_id(tenant),
        task_queue=names.WORKFLOW_QUEUE,
    )


@asynccontextmanager
async def ledger_whose_check_lasts(
    temporal: Client, tenant: str, ended: str, release: internal_pb2.ReleaseRequest
) -> AsyncIterator[WorkflowHandle[Any, Any]]:
    """Run a ledger, and yield its handle. In its first check it gets a Release, and finds a job that has ended."""
    released = False

    @activity.defn(name=names.ACTIVITY_FIND_ENDED_JOBS)
    async def find_ended_jobs(_: internal_pb2.FindEndedJobsRequest) -> internal_pb2.FindEndedJobsResponse:
        nonlocal released
        if released:
            return internal_pb2.FindEndedJobsResponse()
        released = True
        await ledger.signal(names.SIGNAL_RELEASE, release)
        async with asyncio.timeout(PATIENCE):
            while not await _has_handled_a_signal(ledger):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        return internal_pb2.FindEndedJobsResponse(ended=[ended], output_tokens=[0])

    async with _ledger(temporal, tenant, find_ended_jobs) as ledger:
        yield ledger


@asynccontextmanager
async def _ledger(
    temporal: Client, tenant: str, find_ended_jobs: Callable[..., Any]
) -> AsyncIterator[WorkflowHandle[Any, Any]]:
    """Run a ledger that may check at any time, by this activity."""
    queue = f"ledger-{uuid.uuid4().hex}"
    async with Worker(
        temporal,
        task_queue=queue,
        workflows=[LLMLedgerWorkflow],
        activities=[find_ended_jobs],
        workflow_runner=UnsandboxedWorkflowRunner(),
    ):
        ledger: WorkflowHandle[Any, Any] = await temporal.start_workflow(
            names.LEDGER_WORKFLOW_TYPE,
            internal_pb2.LedgerState(check_interval={"nanos": 1}),
            id=ledger_workflow_id(tenant),
            task_queue=queue,
            # A workflow gets signals during a local activity at four fifths of this time.
            task_timeout=timedelta(seconds=1),
        )
        try:
            yield ledger
        finally:
            await ledger.terminate()


async def lease_in_a_check(temporal: Client, tenant: str) -> tuple[int, internal_pb2.LedgerUsage, str]:
    """Let a batch end while its ledger checks the slots in order to lease it tokens.

    Return the tokens that were leased, what the ledger has then, and the ledger's id.
    """
    batch, job = f"llmbatch--{tenant}-a-b", f"llmjob--{tenant}-a-c"
    release = internal_pb2.ReleaseRequest(workflow_ids=[batch], output_tokens=[4])
    async with ledger_whose_check_lasts(temporal, tenant, job, release) as ledger:
        reserve = internal_pb2.ReserveRequest(
            workflow_ids=[batch, job], limit=5, output_tokens=[0, 100], output_tokens_limit=100
        )
        await ledger.execute_update(names.UPDATE_RESERVE, reserve, result_type=internal_pb2.ReserveResponse)
        lease = internal_pb2.LeaseRequest(workflow_id=batch, least_tokens=1, wanted_tokens=9, output_tokens_limit=100)
        answer = await ledger.execute_update(names.UPDATE_LEASE, lease, result_type=internal_pb2.LeaseResponse)
        usage = await ledger.query(names.QUERY_GET_USAGE, result_type=internal_pb2.LedgerUsage)
        with suppress(WorkflowUpdateFailedError):
            # There is something to check if the batch has a slot.
            await ledger.execute_update(names.UPDATE_RESERVE, reserve, result_type=internal_pb2.ReserveResponse)
    return answer.leased_tokens, usage, ledger.id


async def reserve_with_a_failing_check(
    temporal: Client, tenant: str
) -> tuple[list[str], internal_pb2.LedgerUsage, str]:
    """Reserve a slot of a ledger, then one more than there is, for which the ledger checks the first; the check fails.

    Return whom the second Reserve refuses, what the ledger has then, and the ledger's id.
    """

    @activity.defn(name=names.ACTIVITY_FIND_ENDED_JOBS)
    async def find_ended_jobs(_: internal_pb2.FindEndedJobsRequest) -> internal_pb2.FindEndedJobsResponse:
        raise ValueError("scripted")

    async with _ledger(temporal, tenant, find_ended_jobs) as ledger:
        for id_ in ("llmjob-a-b", "llmjob-a-c"):
            reserve = internal_pb2.ReserveRequest(workflow_ids=[id_], limit=1)
            answer = await ledger.execute_update(
                names.UPDATE_RESERVE, reserve, result_type=internal_pb2.ReserveResponse
            )
        usage = await ledger.query(names.QUERY_GET_USAGE, result_type=internal_pb2.LedgerUsage)
    return [*answer.refused], usage, ledger.id


async def ask_while_checking(temporal: Client, tenant: str) -> str:
    """Reserve slots of a ledger that checks others each time, while it is asked what is used. Return its id."""

    @activity.defn(name=names.ACTIVITY_FIND_ENDED_JOBS)
    async def find_ended_jobs(_: internal_pb2.FindEndedJobsRequest) -> internal_pb2.FindEndedJobsResponse:
        return internal_pb2.FindEndedJobsResponse()

    async with _ledger(temporal, tenant, find_ended_jobs) as ledger:

        async def reserve(name: str) -> None:
            for number in range(10):
                request = internal_pb2.ReserveRequest(workflow_ids=[f"llmjob-{name}-{number}"], limit=3)
                await ledger.execute_update(names.UPDATE_RESERVE, request, result_type=internal_pb2.ReserveResponse)

        async with asked(ledger, names.QUERY_GET_USAGE):
            await asyncio.gather(*(reserve(name) for name in "abcd"))
    return ledger.id


async def _has_handled_a_signal(ledger: WorkflowHandle[Any, Any]) -> bool:
    """Return whether a workflow has completed a task that began after a signal."""
    signalled = started = False
    async for event in ledger.fetch_history_events():
        if event.event_type == EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED:
            signalled = True
        elif event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_STARTED:
            started = signalled
        elif event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED and started:
            return True
    return False
