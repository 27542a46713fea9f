"""What a ledger's workflow asks its gateway for: which of its jobs have ended, and what they have used."""

import asyncio
import logging
from typing import Final

from temporalio import activity
from temporalio.client import Client, WorkflowExecutionDescription, WorkflowExecutionStatus
from temporalio.service import RPCError, RPCStatusCode

from encryption import KeysUnavailable
from jobs import names
from llm_pb import internal_pb2, llm_pb2
from payload_converter import PayloadError
from runtime.temporal import RPC_TIMEOUT
from services.gateway.batches.reader import ended_record
from services.gateway.job_record import final_status
from services.gateway.pipelines.reader import reservation_of, used_tokens
from services.gateway.runs import describe_twice

_log = logging.getLogger(__name__)
_DESCRIBES: Final = 10
"""Maximum number of jobs that are described concurrently."""


class LedgerActivities:
    """The local activity of a ledger's workflow."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @activity.defn(name=names.ACTIVITY_FIND_ENDED_JOBS)
    async def find_ended_jobs(self, request: internal_pb2.FindEndedJobsRequest) -> internal_pb2.FindEndedJobsResponse:
        """Return which of the jobs are closed, with what they have used, and which are unknown."""
        found, describing = internal_pb2.FindEndedJobsResponse(), asyncio.Semaphore(_DESCRIBES)

        async def find(id_: str) -> None:
            async with describing:
                description = await self._describe(id_)
                used = -1 if description is None else await self._used_tokens(description)
                reservation = 0 if description is None else await reservation_of(description)
            if description is None:
                found.missing.append(id_)
            elif description.status != WorkflowExecutionStatus.RUNNING:
                found.ended.append(id_)
                found.output_tokens.append(used)
                found.reservations.append(reservation)

        results = await asyncio.gather(*map(find, request.workflow_ids), return_exceptions=True)
        if errors := [result for result in results if result is not None]:
            _log.warning("%d jobs could not be described, such as: %r", len(errors), errors[0])
        return found

    async def _describe(self, id_: str) -> WorkflowExecutionDescription | None:
        """Return the description of a job; None if Temporal has said twice that there is none. Raises RPCError."""
        try:
            return await describe_twice(self._client.get_workflow_handle(id_))
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            return None

    async def _used_tokens(self, description: WorkflowExecutionDescription) -> int:
        """Return the output tokens of a closed job, batch or pipeline; -1 where its record does not tell them."""
        try:
            if description.workflow_type == names.BATCH_WORKFLOW_TYPE:
                record = await ended_record(description)
                return -1 if record is None else record.status.usage.output_tokens
            if description.workflow_type == names.PIPELINE_WORKFLOW_TYPE:
                return await used_tokens(description)
            if (status := await final_status(description)) is None:
                return -1
            if status.progress.output_tokens and await self._was_cached(description):
                return 0
        except (PayloadError, KeysUnavailable):
            return -1
        return status.progress.output_tokens

    async def _was_cached(self, description: WorkflowExecutionDescription) -> bool:
        """Return whether the answer of a closed job is that of another one. Raises RPCError, PayloadError."""
        completed = description.status == WorkflowExecutionStatus.COMPLETED
        if not completed or await description.memo_value(names.MEMO_CACHE, None) is not True:
            return False
        handle = self._client.get_workflow_handle(
            description.id, run_id=description.run_id, result_type=llm_pb2.JobResult
        )
        result: llm_pb2.JobResult = await handle.result(rpc_timeout=RPC_TIMEOUT)
        return result.metadata.cached
