"""The jobs that items with "watch": true are: started, stopped and read by their batch."""

from datetime import UTC, datetime, timedelta
from typing import Final

from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc import code_pb2, status_pb2
from temporalio.client import Client, WorkflowExecutionDescription
from temporalio.common import Priority, WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from batches.lines import Line
from encryption import Encryption
from jobs import names
from jobs.errors import error_info, make_status
from jobs.ids import deletion_workflow_id, item_workflow_id
from jobs.start import job_start
from llm_pb import batch_pb2, internal_pb2, llm_pb2
from runtime.telemetry import current_traceparent
from runtime.temporal import RPC_TIMEOUT
from runtime.tracebacks import forget_frames
from services.gateway.errors import JobNotFound
from services.gateway.job_options import job_options
from services.gateway.job_reader import JobReader
from services.gateway.models.catalogue import Models
from services.gateway.runs import describe_twice
from services.gateway.scopes import gateway_for
from services.gateway.settings import GatewaySettings

_AFTER_WINDOW: Final = timedelta(minutes=10)
"""Time after the window of the batch for which its jobs may run. The batch itself stops them at the window's end."""
_USED: Final = FieldMask(
    paths=[
        "prompt_tokens",
        "cached_prompt_tokens",
        "output_tokens",
        "wasted_tokens",
        "engine_time",
        "cost_micros",
        "cached",
    ]
)
"""The fields of ResultMetadata that say what a job has used, as jobs.usage reads them."""


class WatchedJobs:
    """The jobs of all batches."""

    def __init__(
        self,
        client: Client,
        reader: JobReader,
        models: Models,
        settings: GatewaySettings,
        encryption: Encryption | None,
    ) -> None:
        self._client = client
        self._reader = reader
        self._models = models
        self._settings = settings
        self._encryption = encryption

    async def start(
        self, request: internal_pb2.ChunkRequest, index: int, job: llm_pb2.JobRequest, priority: Priority
    ) -> None:
        """Start the job of an item, unless an earlier attempt at the chunk has.

        A job that an earlier run of the batch has left under the id is ended first. Raises RPCError, PayloadError,
        KeysUnavailable.
        """
        # A result over the size of a message ends an item, whoever runs it.
        chosen = job_options(self._settings, self._models, job, has_store=False)
        left = max(request.expire_time.ToDatetime(UTC) - datetime.now(UTC), timedelta(0)) + _AFTER_WINDOW
        chosen.timeouts.total.FromTimedelta(left)
        chosen.timeouts.queue.FromTimedelta(left)
        if job.timeouts.total.ToTimedelta() > left:
            job.timeouts.total.FromTimedelta(left)
        hash_ = None if self._encryption is None else await self._encryption.search_hash(request.tenant)
        start = job_start(
            job,
            chosen,
            id_=item_workflow_id(request.batch_id, index),
            priority=priority,
            traceparent=current_traceparent(),
            hash_=hash_,
        )
        memo = {**start.memo, names.MEMO_BATCH_TIME: request.create_time.ToJsonString()}
        for reuse in (WorkflowIDReusePolicy.REJECT_DUPLICATE, WorkflowIDReusePolicy.ALLOW_DUPLICATE):
            try:
                await self._client.start_workflow(
                    names.JOB_WORKFLOW_TYPE,
                    job,
                    id=start.id,
                    task_queue=self._settings.workflow_queue,
                    execution_timeout=start.execution_timeout,
                    id_reuse_policy=reuse,
                    id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                    memo=memo,
                    search_attributes=start.search_attributes,
                    priority=start.priority,
                    rpc_timeout=RPC_TIMEOUT,
                )
            except WorkflowAlreadyStartedError as error:
                forget_frames(error)
                if await self._end_earlier(request, start.id):
                    memo[names.MEMO_RERUN] = True
                    continue
            return

    async def cancel(self, request: internal_pb2.ChunkRequest, index: int) -> None:
        """Cancel the job of an item with the request's error. One that does not exist, or has ended, stays as it is.

        Raises RPCError, PayloadError, KeysUnavailable.
        """
        found = await self._describe(item_workflow_id(request.batch_id, index))
        if found is not None and await _is_of(request, found):
            await self._cancel(found, request.error.message)

    async def ended(self, request: internal_pb2.ChunkRequest, line: Line) -> batch_pb2.BatchItem | None:
        """Wait until the job of a line has ended, and return its item; None if there is no such job.

        The item of a job that was deleted while it ran has nothing of the job but what that has used. Raises RPCError,
        PayloadError, KeysUnavailable.
        """
        workflow_id = item_workflow_id(request.batch_id, line.index)
        running = await self._describe(workflow_id)
        if running is None or not await _is_of(request, running):
            return None
        try:
            ending = await self._reader.ending(workflow_id, running.run_id)
            description = await self._reader.describe(gateway_for(workflow_id), workflow_id, running.run_id)
            found = await self._reader.status_of(description, ending)
        except JobNotFound:
            return None
        except RPCError as error:
            if error.status == RPCStatusCode.NOT_FOUND:
                return None
            raise
        status = found.status
        item = batch_pb2.BatchItem(
            index=line.index,
            custom_id=line.custom_id,
            state=status.state,
            result=found.result if found.HasField("result") else None,
            error=status.error if status.HasField("error") else None,
            workflow_id=workflow_id,
            end_time=status.end_time,
        )
        if not item.end_time.seconds:
            item.end_time.GetCurrentTime()
        if item.state == llm_pb2.JOB_STATE_CANCELLED and await self._is_deleted(running, item):
            _leave_usage(item)
        return item

    async def _is_deleted(self, job: WorkflowExecutionDescription, item: batch_pb2.BatchItem) -> bool:
        """Return whether somebody has deleted the job, or has begun to. Raises RPCError.

        The reason of the cancel alone does not tell: another caller may have been first, or have given the same one.
        """
        handle = self._client.get_workflow_handle(deletion_workflow_id(job.id))
        expected = item.error.message == names.REASON_DELETION
        try:
            deletion = await (describe_twice(handle) if expected else handle.describe(rpc_timeout=RPC_TIMEOUT))
        except RPCError as error:
            # INVALID_ARGUMENT: the id is longer than Temporal accepts.
            if error.status in (RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT):
                return False
            raise
        # One that had ended before the job started was of an earlier run.
        return deletion.close_time is None or deletion.close_time > job.start_time

    async def _describe(self, workflow_id: str) -> WorkflowExecutionDescription | None:
        """Return Temporal's description of a job; None if there is no such job. Raises RPCError."""
        try:
            return await self._reader.describe(gateway_for(workflow_id), workflow_id)
        except JobNotFound:
            return None

    async def _end_earlier(self, request: internal_pb2.ChunkRequest, workflow_id: str) -> bool:
        """End the job that an earlier run of the batch has left under an id; return whether there is one."""
        found = await self._describe(workflow_id)
        if found is None or await _is_of(request, found):
            return False
        await self._cancel(found, "the batch runs again")
        await self._reader.ending(workflow_id, found.run_id)
        return True

    async def _cancel(self, found: WorkflowExecutionDescription, reason: str) -> None:
        handle = self._client.get_workflow_handle(found.id, run_id=found.run_id)
        try:
            await handle.signal(names.SIGNAL_CANCEL, llm_pb2.CancelRequest(reason=reason), rpc_timeout=RPC_TIMEOUT)
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise


def deleted() -> status_pb2.Status:
    """Return the error of an item whose job was deleted."""
    return make_status(code_pb2.NOT_FOUND, "the job was deleted", error_info("JOB_DELETED"))


def _leave_usage(item: batch_pb2.BatchItem) -> None:
    """Remove from an item what its deleted job has produced, and leave what that has used, which the batch counts."""
    item.error.CopyFrom(deleted())
    if not item.HasField("result"):
        return
    metadata = llm_pb2.ResultMetadata()
    _USED.MergeMessage(item.result.metadata, metadata)
    item.result.CopyFrom(llm_pb2.JobResult(metadata=metadata))


async def _is_of(request: internal_pb2.ChunkRequest, found: WorkflowExecutionDescription) -> bool:
    """Return whether a job is of this run of its batch. One of a gateway of an earlier version does not tell."""
    accepted = request.create_time.ToJsonString()
    return bool(await found.memo_value(names.MEMO_BATCH_TIME, accepted) == accepted)
