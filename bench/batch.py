"""Whether a batch is as fast as its engine, and what an item costs in addition.

The same prompts run as a batch (`suite`) and as background jobs that a client submits and watches (`peer_jobs`), on one
worker whose simulated engine paces its tokens. `limit_engine` runs them on that engine in a bare process, as many at a
time as there are seats.

Processor time is that of gateway, GPU worker, Temporal and NATS, for each item.
What the worker takes beyond the bare engine is its part of the control plane.

    python -m bench.batch
"""

import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Final

import grpc

from bench.support import script
from bench.support.report import Report
from bench.support.stacks import models, new_stack, simulated
from bench.support.usage import cpu_seconds
from bench.support.watched_job import MODEL, finish, submit, together
from deploy.local.stack import Stack
from jobs.names import GPU_QUEUE
from llm_pb import batch_pb2, common_pb2, file_pb2, llm_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from services.gpu_worker.engines.engine import EngineConfig, Generation, create_engine


@dataclass(frozen=True)
class Sizes:
    """The options of the command line."""

    rounds: int = 5
    items: int = 2000
    tokens: tuple[int, ...] = (1, 50)


SEATS: Final = 16
TOKENS_PER_SECOND: Final = 100
"""Speed of each generation. It is low, so that the tokens leave the cores free."""
AIM_MS: Final = 1.0
"""Processor time of the control plane for an item."""
Way = Callable[[int, int], Awaitable[None]]
"""Runs a number of items of a number of tokens."""
KINDS: Final = ("gateway", "gpu-worker", "temporal", "nats")
_numbers = count(1)


async def measure(sizes: Sizes) -> Report:
    """Return the report."""
    report = Report(
        "Is a batch as fast as its engine, and what does an item cost?",
        f"Seconds from CreateBatch, or the first Submit, to the last end; ms of processor time an item. {sizes.items}"
        f" items, one GPU worker, {SEATS} seats of {TOKENS_PER_SECOND} tokens a second. Not measured: engines that"
        " need the processor themselves.",
    )
    options = {"tokens_per_second": float(TOKENS_PER_SECOND)}
    worker = simulated(**options) | {"GPU_WORKER_MAX_CONCURRENT": str(SEATS)}
    gateway = models((MODEL, GPU_QUEUE)) | {"GATEWAY_CLASSES": '{"BACKGROUND": {"rate": null}}'}
    with new_stack({"gpu-worker": worker, "gateway": gateway}) as stack:
        async with stack, grpc.aio.insecure_channel(stack.address("gateway")) as channel:
            ways: dict[str, Way] = {"suite": partial(batch, channel), "peer_jobs": partial(jobs, channel)}
            for way in ways.values():
                await way(SEATS, 2)
            for _ in range(sizes.rounds):
                for tokens in sizes.tokens:
                    for who, way in ways.items():
                        report.add(name(tokens), who, await figures(stack, way, sizes.items, tokens))
                    report.add(name(tokens), "limit_engine", await engine_alone(sizes.items, tokens, options))
    for tokens in sizes.tokens:
        report.ratio(name(tokens), "seconds", "limit_engine")
        report.ratio(name(tokens), "seconds", "peer_jobs")
        pairs = zip(
            report.rounds(name(tokens), "suite", "gpu-worker ms"),
            report.rounds(name(tokens), "limit_engine", "ms"),
            strict=True,
        )
        # What a token costs is not the control plane's.
        aim = {"at_most": AIM_MS} if tokens == min(sizes.tokens) else {}
        report.judge(
            f"ms of the worker beyond the engine, {name(tokens)}", [one - other for one, other in pairs], **aim
        )
    return report


def name(tokens: int) -> str:
    """Return the name of a case."""
    return f"items of {tokens} tokens"


async def figures(stack: Stack, way: Way, items: int, tokens: int) -> dict[str, float]:
    """Run the items in one way; return its time, and the processor time of each process an item."""
    before, began = {kind: _cpu(stack, kind) for kind in KINDS}, time.monotonic()
    await way(items, tokens)
    found = {"seconds": time.monotonic() - began}
    return found | {f"{kind} ms": (_cpu(stack, kind) - before[kind]) * 1000 / items for kind in KINDS}


def _cpu(stack: Stack, kind: str) -> float:
    pid = stack.processes[kind].pid
    assert pid is not None
    return cpu_seconds(pid)


async def batch(channel: grpc.aio.Channel, items: int, tokens: int) -> None:
    """Upload the items, create their batch, and wait for its end."""
    key = f"batch-{next(_numbers)}"
    lines = b"".join(
        json.dumps({"request_id": f"{item}", "model": MODEL, "prompt": prompt(item)}).encode() + b"\n"
        for item in range(items)
    )
    file = file_pb2.File(user_id="bench", filename=key, purpose="batch")
    uploaded = await FileServiceStub(channel).UploadFile(
        iter([file_pb2.UploadFileRequest(file=file, request_id=key, data=lines, last=True)])
    )
    defaults = llm_pb2.JobRequest(params=llm_pb2.SamplingParams(max_tokens=tokens))
    asked = batch_pb2.BatchRequest(
        user_id="bench", request_id=key, defaults=defaults, input=common_pb2.FileRef(file_id=uploaded.file.ref.file_id)
    )
    stub = BatchServiceStub(channel)
    created = await stub.CreateBatch(batch_pb2.CreateBatchRequest(batch=asked))
    async for message in stub.StreamBatch(batch_pb2.StreamBatchRequest(batch_id=created.status.batch_id)):
        last = message.status
    if last.counts.succeeded != items:
        raise RuntimeError(f"the batch ended otherwise: {last}")


async def jobs(channel: grpc.aio.Channel, items: int, tokens: int) -> None:
    """Submit the items as background jobs, and watch each to its end. As many are open as keep the seats busy."""
    stub, numbers = LlmServiceStub(channel), iter(range(items))

    async def job() -> None:
        fields = {"prompt": prompt(next(numbers)), "job_class": common_pb2.JOB_CLASS_BACKGROUND}
        await finish(stub, await submit(stub, tokens=tokens, **fields))

    await together(items, job, 2 * SEATS)


async def engine_alone(items: int, tokens: int, options: dict[str, float]) -> dict[str, float]:
    """Run the items on the engine in this process."""
    engine = create_engine("simulated", EngineConfig("", SEATS, options))
    await engine.start()
    numbers = iter(range(items))

    async def run() -> None:
        item = next(numbers)
        job = llm_pb2.JobRequest(prompt=prompt(item), params=llm_pb2.SamplingParams(max_tokens=tokens))
        async for _ in engine.generate(Generation(f"{item}", job)):
            pass

    began, before = time.monotonic(), time.process_time()
    await together(items, run, SEATS)
    found = {"seconds": time.monotonic() - began, "ms": (time.process_time() - before) * 1000 / items}
    await engine.close()
    return found


def prompt(item: int) -> str:
    """Return the prompt of an item."""
    return f"Say {item}."


if __name__ == "__main__":
    script.run(measure, Sizes(), Sizes(rounds=1, items=32, tokens=(1, 5)), __doc__)
