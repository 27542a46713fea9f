"""Outputs of jobs as files: found by their ids, removed with their jobs, swept when no result names them.

The record of such a file is the result of its job: see store.outputs.
"""

import asyncio
import logging
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Final

from temporalio.client import WorkflowExecutionStatus

from batches.objects import folder_of
from jobs.ids import is_batch, is_below, tenant_of
from llm_pb import common_pb2, file_pb2, internal_pb2, llm_pb2
from payload_converter import PayloadError
from runtime.auth import Caller
from services.gateway.errors import JobNotFound, file_not_found
from services.gateway.files.failures import store_errors
from services.gateway.job_reader import JobReader
from services.gateway.job_record import user_of
from services.gateway.scopes import gateway_for
from services.gateway.settings import GatewaySettings
from store.outputs import OutputObject, find_output, outputs_before, remove_all, remove_outputs
from store.store import Store, StoreUnavailable

_log = logging.getLogger(__name__)
_PAUSE_SECONDS: Final = 0.05
"""Pause after each job that a sweep reads: it must not be felt by anybody."""


class JobOutputs:
    """Reads the files that are outputs of jobs. Whoever may see a job may see its output."""

    def __init__(self, store: Store, reader: JobReader) -> None:
        self._store = store
        self._reader = reader

    async def record(self, caller: Caller, file_id: str) -> internal_pb2.FileRecord:
        """Return the record that an uploaded file would have.

        Raises ApiError NOT_FOUND for a file that no job of the caller's names, UNAVAILABLE; RPCError, PayloadError.
        """
        with store_errors(file_id):
            found = await find_output(self._store, caller.tenant, file_id)
        if found is None:
            raise file_not_found(file_id)
        try:
            description = await self._reader.describe(caller, found.job_id)
        except JobNotFound as error:
            raise file_not_found(file_id) from error
        response = await self._reader.status_of(description)
        ref = _named(response.result, file_id)
        if ref is None:
            # An attempt has left it whose result did not count.
            raise file_not_found(file_id)
        file = file_pb2.File(
            ref=ref,
            user_id=await user_of(description),
            committed_bytes=ref.size_bytes,
            create_time=response.status.end_time,
            state=file_pb2.FILE_STATE_READY,
        )
        segment = internal_pb2.FileSegment(name=found.name, size=ref.size_bytes)
        return internal_pb2.FileRecord(file=file, segments=[segment])


class OutputPart:
    """The files of a job, or the objects of a batch, as a part of it: see services.gateway.deletion.job_parts."""

    name: Final = llm_pb2.JOB_PART_OUTPUT

    def __init__(self, store: Store) -> None:
        self._store = store

    async def remove(self, job: internal_pb2.JobRemains) -> bool:
        """See JobPart. An object that an attempt writes even later is swept."""
        try:
            if not is_batch(job.workflow_id):
                await remove_outputs(self._store, job.workflow_id)
            # The id of a step of a pipeline does not say whether it is a job or a batch.
            if is_batch(job.workflow_id) or is_below(job.workflow_id):
                await remove_all(self._store, folder_of(job.workflow_id, tenant_of(job.workflow_id)))
        except StoreUnavailable as error:
            _log.warning("the output of %s cannot be removed yet: %s", job.workflow_id, error)
            return False
        return True


class OutputSweeper:
    """Looks for objects that no job names: of lost attempts, and of jobs that are past their retention."""

    def __init__(self, store: Store, reader: JobReader, settings: GatewaySettings) -> None:
        self._store = store
        self._reader = reader
        self._settings = settings

    async def sweep(self) -> int:
        """Remove old objects that no job names; return how many.

        Raises StoreUnavailable, ApiError, RPCError, KeysUnavailable.
        """
        removed = 0
        async with aclosing(outputs_before(self._store, datetime.now(UTC) - self._settings.file_sweep_age)) as objects:
            async for found in objects:
                if not await self._is_named(found):
                    await self._store.delete([found.name])
                    removed += 1
                await asyncio.sleep(_PAUSE_SECONDS)
        return removed

    async def _is_named(self, found: OutputObject) -> bool:
        """Return whether a job names the object, or may still do so."""
        try:
            description = await self._reader.describe(gateway_for(found.job_id), found.job_id)
        except JobNotFound:
            return False
        if description.status == WorkflowExecutionStatus.RUNNING:
            return True
        try:
            return _named((await self._reader.status_of(description)).result, found.file_id) is not None
        except PayloadError:
            # Nobody can read it any more. It goes with its job.
            return True


def _named(result: llm_pb2.JobResult, file_id: str) -> common_pb2.FileRef | None:
    """Return the file of an id that a result names; None if it names none."""
    return next((ref for ref in (result.output_file, *result.images) if ref.file_id == file_id), None)
