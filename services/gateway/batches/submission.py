"""CreateBatch and CancelBatch."""

import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from temporalio.client import WorkflowExecutionStatus
from temporalio.common import TypedSearchAttributes, WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from encryption import Encryption
from jobs import batches, names, options, work_start
from jobs.field_rules import Violation
from jobs.ids import batch_workflow_id, trace_id
from jobs.search import attributes_of
from llm_pb import batch_pb2, common_pb2, file_pb2, internal_pb2, llm_pb2
from runtime import audit
from runtime.auth import Caller
from runtime.telemetry import current_traceparent
from runtime.tracebacks import forget_frames
from services.gateway.batches.reader import BatchReader
from services.gateway.effects import Effects
from services.gateway.errors import ApiError, batch_key_reused, invalid, work_deleted
from services.gateway.files.reader import FileReader
from services.gateway.job_options import delivery_options
from services.gateway.job_traces import link_call
from services.gateway.quotas.admission import OpenJobQuotas
from services.gateway.settings import GatewaySettings
from services.gateway.turns import Turns

_log = logging.getLogger(__name__)
_FILE_ID: Final = "batch.input.file_id"


class BatchSubmission:
    """Creates and cancels batches."""

    def __init__(
        self,
        effects: Effects,
        reader: BatchReader,
        files: FileReader,
        open_jobs: OpenJobQuotas,
        settings: GatewaySettings,
        encryption: Encryption | None,
    ) -> None:
        self._effects = effects
        self._reader = reader
        self._files = files
        self._open_jobs = open_jobs
        self._settings = settings
        self._turns = Turns(settings.tenants, classes=settings.classes)
        self._encryption = encryption

    async def create(
        self, caller: Caller, request: batch_pb2.CreateBatchRequest, *, waiter: str = ""
    ) -> batch_pb2.BatchStatus:
        """Start a batch, or return the equal one that was started under its key. Its request has passed the rules.

        Raises ApiError NOT_FOUND for an input that is no file of the caller's, ALREADY_EXISTS for a key that belongs to
        another batch or a deleted one, RESOURCE_EXHAUSTED beyond the quota of open jobs; RPCError, KeysUnavailable,
        AuditUnavailable. `waiter` is the id of a workflow that gets the signal JobSettled when the batch is about to
        end.
        """
        batch, traceparent = request.batch, current_traceparent()
        id_ = batch_workflow_id(batch.user_id, batch.request_id, caller.tenant)
        audit.describe(user_id=batch.user_id, job=id_)
        if (found := await self._found(caller, id_, batch)) is not None:
            return found
        await self.check_input(caller, batch)
        job_class = batch.job_class or common_pb2.JOB_CLASS_BACKGROUND
        now = Timestamp()
        now.GetCurrentTime()
        chosen = batch_options(self._settings, batch, now, sorted(caller.scopes))
        chosen.ledger = self._open_jobs.ledger(caller.tenant)
        if not batch.budget.output_tokens and (a_day := self._open_jobs.tokens_a_day(caller.tenant)) is not None:
            chosen.leased_a_day = a_day
        chosen.delivery.CopyFrom(delivery_options(self._settings))
        hash_ = None if self._encryption is None else await self._encryption.search_hash(caller.tenant)
        # What a batch without a budget will use is not known. It leases what its chunks need.
        last_check = await self._open_jobs.admit(caller.tenant, id_, batch.budget.output_tokens)
        try:
            await self._effects.start(
                names.BATCH_WORKFLOW_TYPE,
                internal_pb2.BatchRun(batch=batch, options=chosen),
                id_=id_,
                last_check=last_check,
                id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                memo=work_start.memo(batch, chosen, chosen.create_time, traceparent, hash_, waiter),
                search_attributes=TypedSearchAttributes(attributes_of(work_start.about(batch), caller.tenant, hash_)),
                priority=self._turns.priority(caller.tenant, batch.user_id, hash_, job_class),
            )
        except WorkflowAlreadyStartedError as error:
            forget_frames(error)
            if (found := await self._found(caller, id_, batch)) is None:
                if not await self._reader.was_deleted(id_):
                    raise
                if chosen.ledger:
                    await self._open_jobs.release(caller.tenant, id_)
                raise work_deleted("batch", batch.user_id, batch.request_id) from None
            if chosen.ledger and found.state in batches.FINAL_STATES:
                await self._open_jobs.release(caller.tenant, id_)
            return found
        _log.info("batch accepted", extra={"workflow_id": id_})
        status = batch_pb2.BatchStatus(
            batch_id=id_,
            state=batch_pb2.BATCH_STATE_VALIDATING,
            create_time=now,
            expire_time=chosen.expire_time,
            trace_id=trace_id(traceparent),
        )
        batches.describe(status, batch)
        return status

    async def cancel(self, caller: Caller, request: batch_pb2.CancelBatchRequest) -> batch_pb2.BatchStatus:
        """Cancel a batch and return its status; an ended one does not change. Raises ApiError NOT_FOUND, RPCError."""
        description = await self._reader.describe(caller, request.batch_id)
        await link_call(description)
        if description.status == WorkflowExecutionStatus.RUNNING:
            signal = llm_pb2.CancelRequest(workflow_id=request.batch_id, reason=request.reason)
            try:
                await self._effects.signal(request.batch_id, names.SIGNAL_CANCEL, signal)
            except RPCError as error:
                # It may have ended meanwhile.
                if error.status != RPCStatusCode.NOT_FOUND:
                    raise
        status = await self._reader.readable_status(caller, request.batch_id)
        if status.state not in batches.FINAL_STATES:
            status.cancel_requested = True
        return status

    async def find_accepted(
        self, caller: Caller, request: batch_pb2.CreateBatchRequest
    ) -> batch_pb2.BatchStatus | None:
        """Return the equal batch that was started before. Raises ApiError ALREADY_EXISTS for another one."""
        batch = request.batch
        return await self._found(caller, batch_workflow_id(batch.user_id, batch.request_id, caller.tenant), batch)

    async def check(self, request: batch_pb2.CreateBatchRequest) -> list[Violation]:
        """Return the violations of the operator's settings."""
        most, window = self._settings.batch_max_window, request.batch.window
        if window.seconds + window.nanos / 1e9 > most.total_seconds():
            return [Violation("batch.window", f"must be at most {most.total_seconds():g} s")]
        return []

    async def check_input(self, caller: Caller, batch: batch_pb2.BatchRequest) -> None:
        """Raise like check_input() of this module."""
        await check_input(self._files, caller, batch, self._settings)

    async def _found(self, caller: Caller, id_: str, batch: batch_pb2.BatchRequest) -> batch_pb2.BatchStatus | None:
        """Return the batch under an id; None if there is none. Raises ApiError ALREADY_EXISTS for another one."""
        try:
            description = await self._reader.describe(caller, id_)
        except ApiError:
            return None
        await link_call(description)
        if await description.memo_value(names.MEMO_DIGEST, None) != work_start.digest(batch):
            raise batch_key_reused(batch.user_id, batch.request_id)
        return (await self._reader.view_of(description)).record.status


async def check_input(
    files: FileReader, caller: Caller, batch: batch_pb2.BatchRequest, settings: GatewaySettings
) -> None:
    """Raise ApiError for an input that is no file of the caller's, or not as the batch says; RPCError."""
    file = await files.get(caller, batch.input.file_id)
    rule = ""
    most = settings.batch_max_bytes
    if file.state != file_pb2.FILE_STATE_READY:
        rule = "is a file whose upload has not ended"
    elif batch.input.sha256 not in (b"", file.ref.sha256):
        rule = "is a file with another sha256 than input says"
    elif batch.input.size_bytes not in (0, file.ref.size_bytes):
        rule = "is a file with another size_bytes than input says"
    elif file.ref.size_bytes > most:
        rule = f"is a file of {file.ref.size_bytes} bytes; at most {most} are a batch"
    if rule:
        raise invalid([Violation(_FILE_ID, rule)])


def batch_options(
    settings: GatewaySettings, batch: batch_pb2.BatchRequest, now: Timestamp, scopes: Sequence[str]
) -> internal_pb2.BatchOptions:
    """Return the options of a new batch without a ledger, and of whose end nobody is notified."""
    window = batch.window.ToTimedelta() if batch.HasField("window") else timedelta(0)
    chosen = internal_pb2.BatchOptions(
        limits=internal_pb2.BatchLimits(lines=settings.batch_max_lines, bytes=settings.batch_max_bytes),
        chunk_items=settings.batch_chunk_items,
        max_chunks=settings.batch_max_chunks,
        manifest_chunks=settings.batch_manifest_chunks,
        run_chunks=settings.batch_run_chunks,
        max_watched=settings.batch_max_watched,
        heartbeat_timeout=options.duration(settings.heartbeat_timeout),
        create_time=now,
        scopes=scopes,
    )
    within = window or min(batches.DEFAULT_WINDOW, settings.batch_max_window)
    chosen.expire_time.FromNanoseconds(now.ToNanoseconds() + int(within / timedelta(microseconds=1)) * 1000)
    return chosen
