"""Chunks of items with "watch": true on their own: the jobs are the test's."""

import asyncio
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path

from opentelemetry.sdk.metrics import MeterProvider
from temporalio.common import Priority
from temporalio.testing import ActivityEnvironment

from batches.input import BatchInput
from batches.lines import Line
from batches.plan import PlanWriter
from batches.segments import read_segment
from jobs.errors import reason_of
from jobs.ids import item_workflow_id
from llm_pb import batch_pb2, common_pb2, internal_pb2, llm_pb2
from services.gateway.batches.watched import RunWatchedChunk
from services.gateway.metrics import GatewayMetrics
from store.objects import ObjectStore, open_objects
from store.settings import StoreSettings
from store.store import StoredObject
from tests.support.batches import to_jsonl

BATCH = batch_pb2.BatchRequest(user_id="u", request_id="r")
BATCH_ID, DELETED, ITEMS = "llmbatch-u-r", 1, 6


class _Jobs:
    """Jobs that end a moment after their start. One of them is deleted meanwhile."""

    def __init__(self) -> None:
        self.open: set[str] = set()
        self.most = 0

    async def start(
        self, request: internal_pb2.ChunkRequest, index: int, job: llm_pb2.JobRequest, priority: Priority
    ) -> None:
        self.open.add(item_workflow_id(request.batch_id, index))
        self.most = max(self.most, len(self.open))

    async def ended(self, request: internal_pb2.ChunkRequest, line: Line) -> batch_pb2.BatchItem | None:
        workflow_id = item_workflow_id(request.batch_id, line.index)
        if line.index == DELETED:
            self.open.discard(workflow_id)
            return None
        # Whatever else may begin does so first.
        await asyncio.sleep(0.1)
        self.open.remove(workflow_id)
        return batch_pb2.BatchItem(
            index=line.index, state=llm_pb2.JOB_STATE_SUCCEEDED, result=llm_pb2.JobResult(output="done")
        )


async def put(store: ObjectStore, content: bytes) -> common_pb2.FileRef:
    async def pieces() -> AsyncIterator[bytes]:
        yield content

    written = await store.put(store.new_name("batches/-/test/"), pieces())
    return common_pb2.FileRef(file_id=written.name, size_bytes=written.size)


async def test_so_many_jobs_of_a_chunk_are_open_and_a_deleted_one_is_an_item(tmp_path: Path) -> None:
    store, jobs = open_objects(StoreSettings(url=tmp_path.as_uri())), _Jobs()
    lines = to_jsonl({"request_id": f"{n}", "model": "m", "prompt": "p", "watch": True} for n in range(ITEMS))
    reading = BatchInput(BATCH)
    with PlanWriter() as plan:
        for line in (*reading.feed(lines), *reading.close()):
            plan.add(line)
        planned = await put(store, b"".join(plan.pieces()))
    request = internal_pb2.ChunkRequest(
        batch_id=BATCH_ID, plan=planned, input=await put(store, lines), batch=BATCH, count=ITEMS, max_concurrent=2
    )
    metrics = GatewayMetrics(MeterProvider().get_meter("test"), {})
    run = RunWatchedChunk(store, jobs, metrics)  # type: ignore[arg-type]
    result = await ActivityEnvironment().run(run.__call__, request)
    assert jobs.most == 2
    assert (result.counts.succeeded, result.counts.cancelled) == (ITEMS - 1, 1)
    items: dict[int, batch_pb2.BatchItem] = {}
    for ref in result.segments:
        data = b"".join([piece async for piece in store.read(StoredObject(ref.file_id, ref.size_bytes))])
        items |= {item.index: item for item in read_segment(BytesIO(data))}
    assert sorted(items) == [*range(ITEMS)]
    assert (items[DELETED].state, reason_of(items[DELETED].error)) == (llm_pb2.JOB_STATE_CANCELLED, "JOB_DELETED")
    assert not items[DELETED].HasField("result")
