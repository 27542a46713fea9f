"""The activities of a batch's workflow, apart from those that run its items: see workflows.llm_batch."""

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Final

from google.protobuf.message import DecodeError
from temporalio import activity
from temporalio.client import Client
from temporalio.exceptions import ApplicationError

from batches.objects import folder_of
from encryption import Unreadable
from feed.feed import Feed
from jobs import batches, names
from jobs.ids import tenant_of
from llm_pb import common_pb2, internal_pb2
from runtime.auth import Caller
from runtime.temporal import RPC_TIMEOUT
from services.gateway.batches.merging import read_manifest
from services.gateway.batches.outputs import ERRORS, OUTPUT, BatchFiles
from services.gateway.batches.pending import pending_chunks
from services.gateway.batches.processes import Processes
from services.gateway.batches.work import MERGE, PLAN
from services.gateway.errors import FileNotFound
from services.gateway.files.reader import FileReader
from services.gateway.quotas.ledgers import SlotReleases
from services.gateway.waiters import signal_settled
from store.store import ObjectMissing, Store, StoreUnavailable

_log = logging.getLogger(__name__)
_REMOVED_AT_ONCE: Final = 100


class BatchActivities:
    """Plans, merges and cleans up."""

    def __init__(
        self,
        client: Client,
        store: Store | None,
        feed: Feed,
        reader: FileReader,
        files: BatchFiles,
        releases: SlotReleases,
    ) -> None:
        self._client = client
        self._store = store
        self._feed = feed
        self._reader = reader
        self._files = files
        self._releases = releases
        self._processes = Processes()

    @activity.defn(name=names.ACTIVITY_PLAN_BATCH)
    async def plan_batch(self, request: internal_pb2.PlanRequest) -> internal_pb2.BatchPlan:
        """Read and check the lines, and write the plan to the store. Raises INPUT_GONE for a file that is gone.

        Any other error passes: Temporal or the file's record does not answer now.
        """
        batch, tenant = request.batch, request.tenant
        try:
            # Whether the creator may see the file was checked when the batch was created.
            creator = Caller(tenant, "", frozenset(request.scopes))
            record = await self._reader.record(creator, batch.input.file_id)
        except FileNotFound as error:
            gone = batches.INPUT_GONE
            raise ApplicationError(f"the input cannot be read: {error}", type=gone, non_retryable=True) from error
        prefix = self._files.prefix(batch, request.batch_id, tenant, ERRORS)
        task = internal_pb2.PlanTask(request=request, content=record.segments, errors_prefix=prefix)
        plan = internal_pb2.BatchPlan.FromString(await self._processes.run(PLAN, task))
        if plan.HasField("bad_lines"):
            recorded = await self._files.record(batch, request.batch_id, tenant, ERRORS, plan.bad_lines)
            plan.bad_lines.CopyFrom(recorded)
        return plan

    @activity.defn(name=names.ACTIVITY_COLLECT_CHUNKS)
    async def collect_chunks(self, request: internal_pb2.CollectRequest) -> internal_pb2.ChunkManifest:
        """Return what the last heartbeats of the batch's chunks hold."""
        description = await self._client.get_workflow_handle(request.batch_id).describe(rpc_timeout=RPC_TIMEOUT)
        pending = await pending_chunks(description, self._client.data_converter)
        return internal_pb2.ChunkManifest(chunks=[chunk.ended for chunk in pending])

    @activity.defn(name=names.ACTIVITY_WRITE_MANIFEST)
    async def write_manifest(self, request: internal_pb2.ManifestRequest) -> common_pb2.FileRef:
        """Write a manifest to the store, and return the object."""
        tenant = tenant_of(request.batch_id)
        store = self._require_store().of_tenant(tenant)

        async def pieces() -> AsyncIterator[bytes]:
            yield request.manifest.SerializeToString()

        written = await store.put(store.new_name(folder_of(request.batch_id, tenant)), pieces())
        return common_pb2.FileRef(file_id=written.name, size_bytes=written.size)

    @activity.defn(name=names.ACTIVITY_MERGE_BATCH)
    async def merge_batch(self, request: internal_pb2.MergeRequest) -> internal_pb2.MergeResult:
        """Write output and errors, as files of FileService."""
        batch, id_, tenant = request.batch, request.batch_id, request.tenant
        task = internal_pb2.MergeTask(
            request=request,
            output_prefix=self._files.prefix(batch, id_, tenant, OUTPUT),
            errors_prefix=self._files.prefix(batch, id_, tenant, ERRORS),
        )
        result = internal_pb2.MergeResult.FromString(await self._processes.run(MERGE, task))
        for kind in (OUTPUT, ERRORS):
            if result.HasField(kind):
                written = getattr(result, kind)
                written.CopyFrom(await self._files.record(batch, id_, tenant, kind, written))
        return result

    @activity.defn(name=names.ACTIVITY_CLEAN_BATCH)
    async def clean_batch(self, request: internal_pb2.CleanRequest) -> None:
        """Remove what nobody needs after the end of a batch, release its slot, and tell who waits for it."""
        progress = request.progress
        if progress.HasField("plan"):
            try:
                await self._remove_unneeded(request.batch_id, progress)
            except (ObjectMissing, Unreadable, DecodeError) as error:
                # What a lost manifest has named cannot be told from what nobody needs. The sweeper removes both.
                _log.warning("the objects of %s are left to the sweeper: %s", request.batch_id, error)
        feed = self._feed.of_tenant(tenant_of(request.batch_id))
        for chunk in request.chunks:
            await feed.remove(batches.log_key(request.batch_id, chunk))
        if request.ledger:
            await self._releases.release(request.ledger, request.batch_id, progress.usage.output_tokens)
        if request.waiter:
            await signal_settled(self._client, request.waiter)

    async def _remove_unneeded(self, batch_id: str, progress: internal_pb2.BatchProgress) -> None:
        """Remove what StreamBatchResults does not read: it reads the plan, the manifests and what they name."""
        store = self._require_store()
        kept = {ref.file_id for ref in (progress.plan.plan, progress.rest, *progress.manifests)}
        for ref in progress.manifests:
            for chunk in (await read_manifest(store, ref)).chunks:
                kept.update(segment.file_id for segment in chunk.result.segments)
        unneeded: list[str] = []
        async with aclosing(store.list(folder_of(batch_id, tenant_of(batch_id)))) as objects:
            async for item in objects:
                if item.name not in kept:
                    unneeded.append(item.name)
                if len(unneeded) == _REMOVED_AT_ONCE:
                    await store.delete(unneeded)
                    unneeded.clear()
        await store.delete(unneeded)

    def _require_store(self) -> Store:
        if self._store is None:
            raise StoreUnavailable("STORE_URL is not set, and a batch needs the store")
        return self._store
