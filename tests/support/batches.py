"""How tests create batches, and a worker that runs their chunks without an engine."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from temporalio import activity
from temporalio.client import Client
from temporalio.worker import Worker

from batches.lines import LineReader
from batches.objects import segments_folder
from batches.plan import plan_range, read_records
from batches.segments import read_segment, to_segment
from batches.splitting import RawLine
from jobs import batches, names
from jobs.classes import BACKGROUND_QUEUE_SUFFIX
from llm_pb import batch_pb2, common_pb2, internal_pb2, llm_pb2
from store.objects import open_objects
from store.settings import StoreSettings
from store.store import Store, StoredObject
from tests.support.files import PATIENCE, download, new_file, upload

MODEL: Final = "idle"
"""A model that no GPU worker of the stack serves."""
QUEUE: Final = f"llm-gpu-activities.idle{BACKGROUND_QUEUE_SUFFIX}"
_numbers = itertools.count(1)
_THROTTLE: Final = timedelta(milliseconds=100)


def lines_of(count: int, model: str = MODEL, **changes: Any) -> list[dict[str, Any]]:
    """Return lines in both forms, in turn."""
    found: list[dict[str, Any]] = []
    for number in range(count):
        if number % 2:
            body = {"model": model, "messages": [{"role": "user", "content": f"Say {number}."}], **changes}
            found.append({"custom_id": f"line {number}", "method": "POST", "url": "/v1/chat/completions", "body": body})
        else:
            found.append({"request_id": f"line-{number}", "model": model, "prompt": f"Say {number}.", **changes})
    return found


def to_jsonl(lines: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


async def create(
    stubs: "Stubs", lines: Iterable[dict[str, Any]] | bytes, user_id: str = "", **changes: Any
) -> batch_pb2.BatchStatus:
    """Upload lines and create their batch."""
    return await stubs.create(await new_batch(stubs, lines, user_id, **changes))


async def new_batch(
    stubs: "Stubs", lines: Iterable[dict[str, Any]] | bytes, user_id: str = "", **changes: Any
) -> batch_pb2.BatchRequest:
    """Upload lines and return their batch."""
    content = lines if isinstance(lines, bytes) else to_jsonl(lines)
    key = new_file(file={"user_id": user_id} if user_id else {})
    file = await upload(stubs.files, key, content)
    return batch_pb2.BatchRequest(
        user_id=file.user_id,
        request_id=f"batch-{next(_numbers)}",
        input=common_pb2.FileRef(file_id=file.ref.file_id),
        **changes,
    )


@dataclass(frozen=True)
class Stubs:
    """The clients of one gateway."""

    files: Any
    batches: Any

    async def create(self, batch: batch_pb2.BatchRequest) -> batch_pb2.BatchStatus:
        response = await self.batches.CreateBatch(batch_pb2.CreateBatchRequest(batch=batch), timeout=PATIENCE)
        return response.status  # type: ignore[no-any-return]

    async def get(self, batch_id: str) -> batch_pb2.BatchStatus:
        response = await self.batches.GetBatch(batch_pb2.GetBatchRequest(batch_id=batch_id), timeout=PATIENCE)
        return response.status  # type: ignore[no-any-return]

    async def cancel(self, batch_id: str, reason: str = "") -> batch_pb2.BatchStatus:
        request = batch_pb2.CancelBatchRequest(batch_id=batch_id, reason=reason)
        response = await self.batches.CancelBatch(request, timeout=PATIENCE)
        return response.status  # type: ignore[no-any-return]

    async def end(self, batch_id: str) -> batch_pb2.BatchStatus:
        """Watch a batch to its end and return its last status."""
        status = None
        async for message in self.batches.StreamBatch(
            batch_pb2.StreamBatchRequest(batch_id=batch_id), timeout=PATIENCE
        ):
            status = message.status
        assert status is not None
        assert status.state in batches.FINAL_STATES
        assert await self.get(batch_id) == status
        return status  # type: ignore[no-any-return]

    async def results(self, batch_id: str, cursor: str = "") -> list[batch_pb2.BatchItem]:
        """Return the items of a batch after a cursor, once it has ended."""
        request = batch_pb2.StreamBatchResultsRequest(batch_id=batch_id, cursor=cursor)
        return [
            item
            async for message in self.batches.StreamBatchResults(request, timeout=PATIENCE)
            for item in message.items
        ]

    async def read(self, ref: common_pb2.FileRef) -> list[dict[str, Any]]:
        """Return the lines of a file."""
        data = await download(self.files, ref.file_id)
        return [json.loads(line) for line in data.splitlines()]


@dataclass
class Engine:
    """What the chunks of a test do: the result of each job, and when chunks wait."""

    store: Store
    failing: frozenset[int] = frozenset()
    """Lines that fail."""
    hold_after: int | None = None
    """Number of items after which a chunk waits until it is cancelled, or `go_on` is set."""
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    die_after: int | None = None
    """Number of items after which the first attempt of each chunk fails, with what it has done in its heartbeat."""
    ends_early: bool = False
    """Whether chunks end at once, as those of a worker do whose clock says that the window is over."""
    compact: bool = True
    attempts: list[tuple[int, int]] = field(default_factory=list)
    """Chunk and number of items that were done before, of each attempt."""

    @activity.defn(name=names.ACTIVITY_RUN_BATCH_CHUNK)
    async def run(self, request: internal_pb2.ChunkRequest) -> internal_pb2.ChunkResult:
        """Run the items one after another, and flush after each few of them."""
        details = activity.info().heartbeat_details
        result = batches.later(batches.result_in(details), request.earlier)
        self.attempts.append((request.chunk, batches.done_count(result)))
        if self.ends_early:
            return result
        tenant_store = self.store.of_tenant(request.tenant)
        records = read_records(await self._read(request.plan, *plan_range(request.first, request.count)))
        done = int.from_bytes(result.done, "little")
        fresh: list[batch_pb2.BatchItem] = []
        try:
            for place, record in enumerate(records):
                if done >> place & 1:
                    continue
                if self.hold_after is not None and batches.done_count(result) + len(fresh) >= self.hold_after:
                    await self._flush(request, tenant_store, result, done, fresh)
                    await self._wait(result)
                raw = await self._read(request.input, record.offset, record.length)
                line = LineReader(request.batch).read(RawLine(record.index, record.offset, record.length, raw))
                assert line.job is not None, line.problems
                fresh.append(self._item(line.index, line.custom_id, line.job, request))
                done |= 1 << place
                if len(fresh) == 10:
                    await self._flush(request, tenant_store, result, done, fresh)
                if self.die_after == batches.done_count(result) and activity.info().attempt == 1:
                    raise RuntimeError("the worker of the test dies")
        except asyncio.CancelledError:
            pass
        await self._flush(request, tenant_store, result, done, fresh)
        return result

    async def _wait(self, result: internal_pb2.ChunkResult) -> None:
        while not self.go_on.is_set():
            activity.heartbeat(result)
            await asyncio.sleep(0.1)

    def _item(
        self, index: int, custom_id: str, job: llm_pb2.JobRequest, request: internal_pb2.ChunkRequest
    ) -> batch_pb2.BatchItem:
        item = batch_pb2.BatchItem(index=index, custom_id=custom_id, state=llm_pb2.JOB_STATE_SUCCEEDED)
        item.end_time.GetCurrentTime()
        prompt = job.prompt or job.messages[-1].content
        item.result.output = prompt[::-1]
        item.result.finish_reason = llm_pb2.FINISH_REASON_STOP
        item.result.metadata.output_tokens = len(prompt)
        if index in self.failing:
            item.state = llm_pb2.JOB_STATE_FAILED
            item.error.CopyFrom(batches.batch_error(14, "ENGINE_FAILED", "the engine of the test fails"))
        return item

    async def _flush(
        self,
        request: internal_pb2.ChunkRequest,
        store: Store,
        result: internal_pb2.ChunkResult,
        done: int,
        fresh: list[batch_pb2.BatchItem],
    ) -> None:
        items = [*fresh]
        fresh.clear()
        if items:
            counts = common_pb2.WorkCounts()
            for item in items:
                name = "failed" if item.state == llm_pb2.JOB_STATE_FAILED else "succeeded"
                setattr(counts, name, getattr(counts, name) + 1)
            batches.add_counts(result.counts, counts)
            result.usage.output_tokens += sum(item.result.metadata.output_tokens for item in items)
            if self.compact:
                for ref in result.segments:
                    data = b"".join(
                        [piece async for piece in self.store.read(StoredObject(ref.file_id, ref.size_bytes))]
                    )
                    items += _items(data)
                del result.segments[:]
            data = to_segment(items)

            async def pieces() -> AsyncIterator[bytes]:
                yield data

            written = await store.put(store.new_name(segments_folder(request.batch_id, request.tenant)), pieces())
            result.segments.add(file_id=written.name, size_bytes=written.size)
            result.done = done.to_bytes((request.count + 7) // 8, "little")
        activity.heartbeat(result)

    async def _read(self, ref: common_pb2.FileRef, start: int, size: int) -> bytes:
        pieces = self.store.read(StoredObject(ref.file_id, ref.size_bytes), start, start + size)
        return b"".join([piece async for piece in pieces])


def _items(data: bytes) -> list[batch_pb2.BatchItem]:
    return [*read_segment(BytesIO(data))]


@asynccontextmanager
async def running(temporal: Client, state_dir: Path, queue: str = QUEUE, **changes: Any) -> AsyncIterator[Engine]:
    """Run the chunks of a queue while the context is open."""
    engine = Engine(open_objects(StoreSettings(url=(state_dir / "store").as_uri())), **changes)
    worker = Worker(
        temporal,
        task_queue=queue,
        activities=[engine.run],
        max_heartbeat_throttle_interval=_THROTTLE,
        default_heartbeat_throttle_interval=_THROTTLE,
    )
    async with worker:
        yield engine


def by_index(items: Sequence[batch_pb2.BatchItem]) -> dict[int, batch_pb2.BatchItem]:
    """Return items by their lines. Each line is there once."""
    found = {item.index: item for item in items}
    assert len(found) == len(items)
    return found


def custom_id_of(line: dict[str, Any]) -> str:
    """Return the id of a line of output or errors."""
    return str(line.get("custom_id", line.get("customId")))
