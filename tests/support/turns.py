"""A worker with one seat that starts after its jobs are submitted, so that the order of their turns shows."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from deploy.local.process import Process
from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.jobs import new_job, watch


class Turns:
    """A gateway and a worker with one slot and a queue of their own. The worker starts after the jobs are submitted."""

    def __init__(self, stub: LlmServiceStub, worker: Process) -> None:
        self.stub = stub
        self.worker = worker

    async def submit(self, user: str, priority: int = 0, **changes: Any) -> str:
        job = new_job(user_id=user, priority=priority, model="turns", params={"max_tokens": 1}, **changes)
        return (await self.stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id

    async def started(self, ids: list[str]) -> list[str]:
        """Run the jobs, and return their ids in the order in which they started."""
        await self.worker.start()
        seen = await asyncio.gather(*(watch(self.stub, id_) for id_ in ids))
        times = [one.final.status.start_time.ToNanoseconds() for one in seen]
        return [id_ for _, id_ in sorted(zip(times, ids, strict=True))]


@asynccontextmanager
async def new_turns(stack: Stack, queue: str, worker_queue: str = "", **settings: str) -> AsyncIterator[Turns]:
    """Run the gateway, whose model has the queue, while the context is open. The worker polls it, or `worker_queue`."""
    model = {
        "name": "turns",
        "context_tokens": 8192,
        "max_output_tokens": 8192,
        "default_max_tokens": 64,
        "queue": queue,
    }
    gateway = stack.add("gateway", {"GATEWAY_MODELS": json.dumps([model]), **settings})
    worker = stack.add(
        "gpu-worker",
        {"GPU_WORKER_TASK_QUEUE": worker_queue or queue, "GPU_WORKER_MODEL": "turns", "GPU_WORKER_MAX_CONCURRENT": "1"},
    )
    await gateway.start()
    await gateway.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
        yield Turns(LlmServiceStub(channel), worker)
    for process in (worker, gateway):
        await process.terminate()
