"""How tests run chunks of batches without a gateway: a workflow of the tests' own starts RunBatchChunk."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import BytesIO
from typing import Any, Final

from temporalio import workflow
from temporalio.client import Client, WorkflowHandle
from temporalio.common import RetryPolicy
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from batches.input import BatchInput
from batches.objects import folder_of
from batches.plan import PlanWriter
from batches.segments import read_segment
from deploy.local.process import Process
from deploy.local.stack import Stack
from jobs import batches, names
from jobs.classes import queue_of
from llm_pb import batch_pb2, common_pb2, internal_pb2, llm_pb2
from payload_converter import data_converter
from store.objects import open_objects
from store.settings import StoreSettings
from store.store import Store, StoredObject
from workflows import activities

BATCH: Final = batch_pb2.BatchRequest(user_id="u", request_id="r")
BACKGROUND: Final = queue_of(names.GPU_QUEUE, common_pb2.JOB_CLASS_BACKGROUND)
HEARTBEAT_TIMEOUT: Final = timedelta(seconds=3)
PATIENCE: Final = 180


@workflow.defn
class OneChunk:
    """Runs a chunk, and returns what it returns."""

    @workflow.run
    async def run(self, request: internal_pb2.ChunkRequest) -> internal_pb2.ChunkResult:
        return await workflow.execute_activity(
            activities.run_batch_chunk,
            request,
            task_queue=BACKGROUND,
            schedule_to_close_timeout=timedelta(hours=1),
            heartbeat_timeout=HEARTBEAT_TIMEOUT,
            retry_policy=RetryPolicy(initial_interval=timedelta(milliseconds=200), backoff_coefficient=1),
            cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
        )


@workflow.defn
class Interactive:
    """Runs a job that needs a seat at once."""

    @workflow.run
    async def run(self, job: llm_pb2.JobRequest) -> llm_pb2.JobResult:
        request = internal_pb2.RunRequest(job=job)
        request.create_time.FromDatetime(workflow.now())
        return await workflow.execute_activity(
            activities.run_llm_on_gpu,
            request,
            task_queue=names.GPU_QUEUE,
            schedule_to_close_timeout=timedelta(hours=1),
            heartbeat_timeout=timedelta(seconds=30),
        )


def line(number: int, prompt: str = "", **params: Any) -> dict[str, Any]:
    """Return a line of an input."""
    return {
        "request_id": f"line-{number}",
        "model": "docstrings",
        "prompt": prompt or f"Say {number}.",
        "params": {"max_tokens": 20, **params},
    }


@dataclass
class ChunkStack:
    """Temporal, NATS and a store, with workers that a test adds."""

    stack: Stack
    temporal: Client
    queue: str
    store: Store

    async def worker(self, *, seats: int = 16, speed: float = 2000, ready: bool = True, **environment: str) -> Process:
        """Start a worker, and wait until it is ready unless it may be lost before."""
        own = {
            "GPU_WORKER_MAX_CONCURRENT": str(seats),
            "GPU_WORKER_ENGINE_OPTIONS": json.dumps({"tokens_per_second": speed}),
            "GPU_WORKER_HEARTBEAT_INTERVAL": "PT0.3S",
            "GPU_WORKER_SHUTDOWN_GRACE": "PT0S",
            **environment,
        }
        process = self.stack.add("gpu-worker", own)
        await process.start()
        if ready:
            await process.wait_ready()
        return process

    async def requests(
        self, lines: Sequence[dict[str, Any] | bytes], size: int = 128, **changes: Any
    ) -> list[internal_pb2.ChunkRequest]:
        """Write the input and the plan of a new batch, and return its chunks."""
        batch_id = f"llmbatch-u-{uuid.uuid4().hex}"
        data = b"".join((item if isinstance(item, bytes) else json.dumps(item).encode()) + b"\n" for item in lines)
        reading = BatchInput(BATCH)
        with PlanWriter() as plan:
            for parsed in (*reading.feed(data), *reading.close()):
                plan.add(parsed)
            planned = b"".join(plan.pieces())
            count = plan.count
        now = datetime.now(UTC)
        common = internal_pb2.ChunkRequest(
            batch_id=batch_id,
            plan=await self._put(batch_id, planned),
            input=await self._put(batch_id, data),
            **{"batch": BATCH, **changes},
        )
        common.create_time.FromDatetime(now)
        common.expire_time.FromDatetime(now + timedelta(hours=1))
        found = []
        for number, first in enumerate(range(0, count, size)):
            request = internal_pb2.ChunkRequest(chunk=number, first=first, count=min(size, count - first))
            request.MergeFrom(common)
            found.append(request)
        return found

    async def start(self, request: internal_pb2.ChunkRequest) -> WorkflowHandle[Any, Any]:
        id_ = f"{request.batch_id}-{request.chunk}"
        return await self.temporal.start_workflow(OneChunk.run, request, id=id_, task_queue=self.queue)

    async def interactive(self, tokens: int) -> WorkflowHandle[Any, Any]:
        job = llm_pb2.JobRequest(
            user_id="u",
            request_id=uuid.uuid4().hex,
            model="docstrings",
            prompt="Be quick.",
            params=llm_pb2.SamplingParams(max_tokens=tokens),
            job_class=common_pb2.JOB_CLASS_HIGH,
        )
        return await self.temporal.start_workflow(Interactive.run, job, id=job.request_id, task_queue=self.queue)

    async def run(self, requests: list[internal_pb2.ChunkRequest]) -> list[internal_pb2.ChunkResult]:
        return await asyncio.gather(*[ended(await self.start(request)) for request in requests])

    async def items(self, *results: internal_pb2.ChunkResult) -> dict[int, batch_pb2.BatchItem]:
        """Return the items of the named segments by their lines. Each is there once."""
        found: dict[int, batch_pb2.BatchItem] = {}
        for result in results:
            assert len(result.segments) <= 8
            count = 0
            for ref in result.segments:
                pieces = self.store.read(StoredObject(ref.file_id, ref.size_bytes))
                for item in read_segment(BytesIO(b"".join([piece async for piece in pieces]))):
                    assert item.index not in found
                    found[item.index] = item
                    count += 1
            assert count == batches.done_count(result)
        return found

    async def until(
        self, handle: WorkflowHandle[Any, Any], condition: Callable[[internal_pb2.ChunkResult, int], bool]
    ) -> internal_pb2.ChunkResult:
        """Wait until the heartbeat of a chunk and the number of its attempt meet a condition. Return the heartbeat."""
        async with asyncio.timeout(PATIENCE):
            while True:
                for pending in (await handle.describe()).raw_description.pending_activities:
                    details = await data_converter.decode(pending.heartbeat_details.payloads)
                    found = batches.result_in(details)
                    if found is not None and condition(found, pending.attempt):
                        return found
                await asyncio.sleep(0.1)

    async def _put(self, batch_id: str, data: bytes) -> common_pb2.FileRef:
        async def pieces() -> AsyncIterator[bytes]:
            yield data

        stored = await self.store.put(self.store.new_name(folder_of(batch_id, "")), pieces())
        return common_pb2.FileRef(file_id=stored.name, size_bytes=stored.size)


async def ended(handle: WorkflowHandle[Any, Any]) -> internal_pb2.ChunkResult:
    """Return the result of a chunk."""
    async with asyncio.timeout(PATIENCE):
        result: internal_pb2.ChunkResult = await handle.result()
        return result


@asynccontextmanager
async def chunk_stack(stack: Stack) -> AsyncIterator[ChunkStack]:
    """Run the workflows of the tests while the context is open."""
    temporal = await Client.connect(stack.address("temporal"), data_converter=data_converter)
    queue = uuid.uuid4().hex
    store = open_objects(StoreSettings(url=(stack.state_dir / "store").as_uri()))
    async with Worker(
        temporal,
        task_queue=queue,
        workflows=[OneChunk, Interactive],
        workflow_runner=UnsandboxedWorkflowRunner(),
    ):
        yield ChunkStack(stack, temporal, queue, store)
