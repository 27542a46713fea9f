"""Processes and clients of two versions, an earlier checkout and this one, with one Temporal and one feed."""

import asyncio
import base64
import itertools
import json
import os
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import grpc
from google.protobuf.message import Message
from temporalio.api.enums.v1 import EventType
from temporalio.client import Client

from deploy.local.process import Process
from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.jobs import Seen
from tests.support.paths import ROOT
from tests.support.stacks import FAST
from tests.support.watchers import watch_on

T = TypeVar("T")
Version = Literal["earlier", "this"]

KINDS: Final = ("gateway", "gpu-worker", "notifier")
SECONDS: Final = 240
"""Maximum seconds of a call or a job, on a busy machine."""

ENVIRONMENT: Final = {
    "gateway": {
        **FAST["gateway"],
        "GATEWAY_HEARTBEAT_TIMEOUT": "PT3S",
        "GATEWAY_NOTIFY_HOLD": "PT4S",
        "GATEWAY_NOTIFY_INTERVAL": "PT0.5S",
        "GATEWAY_NOTIFY_BACKOFF": "1.5",
        "GATEWAY_NOTIFY_MAX_INTERVAL": "PT2S",
        "GATEWAY_NOTIFY_WITHIN": "PT200S",
        # The earlier version replays a job that ended with a NotifyUI.
        "GATEWAY_NOTIFY_OPERATOR": "true",
        "GATEWAY_RETRY_ATTEMPTS": "6",
    },
    "gpu-worker": {**FAST["gpu-worker"], "GPU_WORKER_ENGINE_OPTIONS": '{"tokens_per_second": 100}'},
    "notifier": FAST["notifier"],
}


@dataclass(frozen=True)
class Running:
    """Processes of one version by kind, and a client of their gateway."""

    processes: Mapping[str, Process]
    address: str
    stub: LlmServiceStub


class Versions:
    """Starts processes and clients of either version with the same settings and environment variables."""

    def __init__(self, stack: Stack, temporal: Client, earlier: str, python: str) -> None:
        """`earlier` is the folder of the earlier checkout, `python` the interpreter of its environment."""
        self.stack = stack
        self.temporal = temporal
        self._folders: Final = {"earlier": Path(earlier).absolute(), "this": ROOT}
        # Not resolved: the link of a virtual environment is what makes it one.
        self._pythons: Final = {"earlier": os.path.abspath(python), "this": sys.executable}

    @asynccontextmanager
    async def running(
        self, version: Version, kinds: Collection[str] = KINDS, worker: Mapping[str, str] | None = None
    ) -> AsyncIterator[Running]:
        """Run one process of each kind, a gateway among them, while the context is open. Its end kills them.

        `worker` holds extra environment variables of the GPU worker.
        """
        extra = {"gpu-worker": worker}
        processes = {kind: self._process(version, kind, extra.get(kind)) for kind in kinds}
        address = self.stack.address(processes["gateway"].name)
        try:
            await _start(processes.values())
            async with grpc.aio.insecure_channel(address) as channel:
                # An older gateway without /readyz counts as ready as soon as it serves metrics.
                await asyncio.wait_for(channel.channel_ready(), SECONDS)
                yield Running(processes, address, LlmServiceStub(channel))
        finally:
            for process in processes.values():
                await process.kill()

    @asynccontextmanager
    async def worker(self, version: Version) -> AsyncIterator[Process]:
        """Run a GPU worker while the context is open. Its end kills the worker."""
        process = self._process(version, "gpu-worker")
        try:
            await _start([process])
            yield process
        finally:
            await process.kill()

    async def earlier_watch(self, address: str, id_: str, *, leave_after: int = 0) -> dict[str, Any]:
        """Watch a job with the earlier version's stubs; see tests/support/earlier_client.py."""
        return await self._earlier_client("watch", address, id_, str(leave_after))

    async def earlier_call(self, address: str, method: str, request: Message, answer: type[Any]) -> Any:
        """Make a call with the earlier version's stubs."""
        data = base64.b64encode(request.SerializeToString()).decode()
        found = await self._earlier_client("call", address, method, type(request).__name__, data)
        return answer.FromString(base64.b64decode(found["answer"]))

    async def events(self, id_: str, kind: "EventType.ValueType") -> int:
        """Return the number of events of a kind in a workflow's history."""
        history = await self.temporal.get_workflow_handle(id_).fetch_history()
        return sum(event.event_type == kind for event in history.events)

    def _process(self, version: Version, kind: str, environment: Mapping[str, str] | None = None) -> Process:
        folder = self._folders[version]
        if kind == "gateway":
            # The pipelines of an operator, as they were at the time.
            environment = {**(environment or {}), "PYTHONPATH": str(folder / "tests" / "support" / "registered")}
        process = self.stack.add(kind, environment, working_dir=folder)
        _, *arguments = process.command
        process.command = (self._pythons[version], *arguments)
        return process

    async def _earlier_client(self, *arguments: str) -> dict[str, Any]:
        process = await asyncio.create_subprocess_exec(
            *(self._pythons["earlier"], str(ROOT / "tests" / "support" / "earlier_client.py"), *arguments),
            env={**os.environ, "PYTHONPATH": str(self._folders["earlier"])},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            output, problem = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        assert process.returncode == 0, problem.decode()
        answer: dict[str, Any] = json.loads(output)
        return answer


async def _start(processes: Collection[Process]) -> None:
    for process in processes:
        await process.start()
    for process in processes:
        await process.wait_ready()


async def until(look: Callable[[], Awaitable[T | None]]) -> T:
    """Call `look` until its result is true, and return the result."""
    async with asyncio.timeout(SECONDS):
        while True:
            if found := await look():
                return found
            await asyncio.sleep(0.2)


async def submit(running: Running, job: llm_pb2.JobRequest) -> str:
    """Submit a job and return its workflow id."""
    return (await running.stub.Submit(llm_pb2.SubmitRequest(job=job), timeout=SECONDS)).workflow_id


async def get_status(running: Running, id_: str) -> llm_pb2.GetStatusResponse:
    """Return a job's status and result."""
    return await running.stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_), timeout=SECONDS)


async def generated(running: Running, id_: str, tokens: int, *, but: Collection[str] = ()) -> llm_pb2.JobStatus:
    """Return the status once a worker that is not in `but` has generated so many tokens of a job."""

    async def enough() -> llm_pb2.JobStatus | None:
        job = (await get_status(running, id_)).status
        return job if job.progress.output_tokens >= tokens and job.progress.worker not in but else None

    return await until(enough)


async def watch_wherever(gateways: Sequence[Running], id_: str, *, token: bool = True, leave: int = 0) -> Seen:
    """Watch a job to its end. Change to the next gateway when one is unavailable, and after up to `leave` messages.

    Each stream resumes at the offset of the last message, with its resume token unless `token` is False.
    """
    seen = Seen()
    chance = random.Random(f"{id_} {leave}")
    async with asyncio.timeout(SECONDS):
        for gateway in itertools.cycle(gateways):
            # The token is the last message's: gateways from before the resume token neither send nor read one.
            last = seen.final.resume_token if token and seen.messages else ""
            most = chance.randrange(1, leave) if leave else None
            try:
                if await watch_on(gateway.stub, id_, seen, last, most=most, seconds=SECONDS):
                    break
            except grpc.aio.AioRpcError as error:
                # The gateway returns CANCELLED for a call that comes at the moment of its stop.
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                    raise
                await asyncio.sleep(0.2)
    return seen
