"""What belongs to a job, in one list: whatever is stored for a job has a part here that removes it.

A part is removed as often as needed until nothing is left, by whichever gateway is alive.
"""

from collections.abc import Callable, Iterable
from typing import Final, Protocol

from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import DeleteWorkflowExecutionRequest
from temporalio.client import Client, WorkflowExecutionDescription
from temporalio.service import RPCError, RPCStatusCode

from feed.feed import Feed
from jobs import names
from jobs.ids import delivery_workflow_id, unshortened_delivery_workflow_id
from llm_pb import internal_pb2, llm_pb2
from runtime.temporal import RPC_TIMEOUT


class JobPart(Protocol):
    """A part of a closed job."""

    @property
    def name(self) -> "llm_pb2.JobPart.ValueType":
        """Which part it is."""
        ...

    async def remove(self, job: internal_pb2.JobRemains) -> bool:
        """Remove what is there; return whether nothing is left. Raises RPCError when Temporal is unavailable."""
        ...


class FeedRecords:
    """The records of all of the job's runs in the live feed."""

    name: Final = llm_pb2.JOB_PART_FEED

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    async def remove(self, job: internal_pb2.JobRemains) -> bool:
        """See JobPart."""
        keys = [run.run_id for run in job.runs if run.workflow_id == job.workflow_id]
        return all([await self._feed.remove(key) for key in keys])


class Workflows:
    """The runs of the workflows of one type that belong to the job: not the tombstone under the job's id."""

    def __init__(
        self, name: "llm_pb2.JobPart.ValueType", runs: "Runs", kind: str, ids: Callable[[str], Iterable[str]]
    ) -> None:
        """`ids` returns the workflow ids that belong to a job's id."""
        self.name = name
        self._runs = runs
        self._kind = kind
        self._ids = ids

    async def remove(self, job: internal_pb2.JobRemains) -> bool:
        """See JobPart."""
        gone = True
        for id_ in self._ids(job.workflow_id):
            known = {run.run_id for run in job.runs if run.workflow_id == id_}
            gone &= await self._runs.delete(id_, self._kind, known)
        return gone


def parts_of(runs: "Runs", feed: Feed) -> tuple[JobPart, ...]:
    """Return all that belongs to a job. Its workflow comes last, because it says what else there is."""
    return (
        FeedRecords(feed),
        Workflows(llm_pb2.JOB_PART_DELIVERIES, runs, names.DELIVERY_WORKFLOW_TYPE, delivery_ids),
        Workflows(llm_pb2.JOB_PART_WORKFLOW, runs, names.JOB_WORKFLOW_TYPE, lambda id_: [id_]),
    )


def delivery_ids(job_workflow_id: str) -> list[str]:
    """Return the ids that the LLMDeliveryWorkflow of a job may have: an earlier version did not shorten them."""
    ids = (delivery_workflow_id(job_workflow_id), unshortened_delivery_workflow_id(job_workflow_id))
    return list(dict.fromkeys(ids))


class Runs:
    """The runs of workflows in Temporal, of all that had the same id."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def describe(self, id_: str, run_id: str | None = None) -> WorkflowExecutionDescription | None:
        """Return a run, the last one unless one is named; None when Temporal does not have it. Raises RPCError."""
        try:
            handle = self._client.get_workflow_handle(id_, run_id=run_id)
            return await handle.describe(rpc_timeout=RPC_TIMEOUT)
        except RPCError as error:
            # INVALID_ARGUMENT: the id is longer than the server accepts.
            if error.status in (RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT):
                return None
            raise

    async def of(self, id_: str, kind: str) -> set[str]:
        """Return the run ids of the workflows of a type that had this id. Raises RPCError.

        Temporal's visibility is asked only where there may be more than one run: it takes few requests.
        """
        last = await self.describe(id_)
        if last is None or last.workflow_type != kind:
            return set()
        if await _is_only_run(last):
            return {last.run_id}
        # Every id has passed a rule that forbids quotes.
        listed = self._client.list_workflows(f"WorkflowId = '{id_}'", rpc_timeout=RPC_TIMEOUT)
        return {last.run_id} | {item.run_id async for item in listed if item.workflow_type == kind}

    async def delete(self, id_: str, kind: str, known: Iterable[str] = ()) -> bool:
        """Delete the last run under an id if it has the type, and the `known` ones; return whether none is left.

        Raises RPCError.

        Temporal deletes some time after it was asked.
        """
        last = await self.describe(id_)
        found = {last.run_id} if last is not None and last.workflow_type == kind else set()
        gone = True
        for run_id in {*known, *found}:
            if await self.describe(id_, run_id) is None:
                continue
            gone = False
            execution = WorkflowExecution(workflow_id=id_, run_id=run_id)
            request = DeleteWorkflowExecutionRequest(namespace=self._client.namespace, workflow_execution=execution)
            try:
                await self._client.workflow_service.delete_workflow_execution(request, timeout=RPC_TIMEOUT)
            except RPCError as error:
                if error.status != RPCStatusCode.NOT_FOUND:
                    raise
        return gone


async def _is_only_run(last: WorkflowExecutionDescription) -> bool:
    """Return whether no other run had the id: a gateway starts a job once, and never under an id that had one."""
    first_run_id = last.raw_description.workflow_execution_info.first_run_id
    by_gateway = await last.memo_value(names.MEMO_OPTIONS, None) is not None
    return by_gateway and first_run_id == last.run_id
