"""The jobs that items with "watch": true are: started, stopped and read by their batch."""

from datetime import UTC, datetime, timedelta
from typing import Final

from temporalio.client import Client
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
        """Start the job of an item, unless an earlier attempt at the chunk has. Raises RPCError, KeysUnavailable."""
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
        try:
            await self._client.start_workflow(
                names.JOB_WORKFLOW_TYPE,
                job,
                id=start.id,
                task_queue=self._settings.workflow_queue,
                execution_timeout=start.execution_timeout,
                id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                memo=start.memo,
                search_attributes=start.search_attributes,
                priority=start.priority,
                rpc_timeout=RPC_TIMEOUT,
            )
        except WorkflowAlreadyStartedError as error:
            forget_frames(error)

    async def cancel(self, workflow_id: str, reason: str) -> None:
        """Cancel a job. One that does not exist, or has ended, stays as it is. Raises RPCError."""
        handle = self._client.get_workflow_handle(workflow_id)
        try:
            await handle.signal(names.SIGNAL_CANCEL, llm_pb2.CancelRequest(reason=reason), rpc_timeout=RPC_TIMEOUT)
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise

    async def ended(self, workflow_id: str, line: Line) -> batch_pb2.BatchItem | None:
        """Wait until a job has ended, and return its item; None if there is no such job. Raises RPCError, PayloadError,
        KeysUnavailable."""
        caller = gateway_for(workflow_id)
        try:
            running = await self._reader.describe(caller, workflow_id)
            ending = await self._reader.ending(workflow_id, running.run_id)
            found = await self._reader.status_of(await self._reader.describe(caller, workflow_id), ending)
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
