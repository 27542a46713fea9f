"""The jobs that items with "watch": true are: started, stopped and read by their batch."""

from datetime import UTC, datetime, timedelta
from typing import Final

from temporalio.client import Client, WorkflowExecutionDescription
from temporalio.common import Priority, WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from batches.lines import Line
from encryption import Encryption
from jobs import names
from jobs.ids import item_workflow_id
from jobs.start import job_start
from llm_pb import batch_pb2, internal_pb2, llm_pb2
from runtime.telemetry import current_traceparent
from runtime.temporal import RPC_TIMEOUT
from runtime.tracebacks import forget_frames
from services.gateway.errors import JobNotFound
from services.gateway.job_options import job_options
from services.gateway.job_reader import JobReader
from services.gateway.models.catalogue import Models
from services.gateway.scopes import gateway_for
from services.gateway.settings import GatewaySettings

_AFTER_WINDOW: Final = timedelta(minutes=10)
"""Time after the window of the batch for which its jobs may run. The batch itself stops them at the window's end."""


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

        Raises RPCError, PayloadError, KeysUnavailable.
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
        return item

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


async def _is_of(request: internal_pb2.ChunkRequest, found: WorkflowExecutionDescription) -> bool:
    """Return whether a job is of this run of its batch. One of a gateway of an earlier version does not tell."""
    accepted = request.create_time.ToJsonString()
    return bool(await found.memo_value(names.MEMO_BATCH_TIME, accepted) == accepted)
