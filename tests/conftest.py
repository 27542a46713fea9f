"""Shared by all tests: one stack of real processes, started once, and what talks to it.

The stack's worker runs the simulated engine, whose prompts script their own faults; waits and retries are shortened by
the same settings that an operator has.
"""

import asyncio
import ctypes
import itertools
import os
import shutil
import signal
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiohttp import web
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from temporalio.client import Client

from deploy.local.process import Process
from deploy.local.settings import StackSettings
from deploy.local.stack import Stack
from llm_pb import llm_pb2, llm_pb2_grpc
from payload_converter import data_converter

FAST = {
    "gateway": {
        "GATEWAY_RETRY_INTERVAL": "PT0.1S",
        "GATEWAY_NOTIFY_HOLD": "PT2S",
        "GATEWAY_NOTIFY_INTERVAL": "PT0.1S",
        "GATEWAY_NOTIFY_BACKOFF": "2",
        "GATEWAY_NOTIFY_WITHIN": "PT6S",
        "GATEWAY_NOTIFY_TIMEOUT": "PT2S",
        "GATEWAY_POLL": "PT0.3S",
        "GATEWAY_REDELIVER_INTERVAL": "PT0S",
        "GATEWAY_KEEPALIVE": "PT1S",
        "GATEWAY_SHUTDOWN_GRACE": "PT2S",
        "GATEWAY_MODELS": """[
            {"name": "docstrings", "context_tokens": 8192, "max_output_tokens": 8192, "default_max_tokens": 64,
             "tokenizer": "models/docstrings/tokenizer.json"},
            {"name": "structured", "context_tokens": 8192, "max_output_tokens": 8192, "default_max_tokens": 64,
             "structured_output": true},
            {"name": "idle", "context_tokens": 2000000, "max_output_tokens": 8192, "default_max_tokens": 64,
             "queue": "llm-gpu-activities.idle"}
        ]""",
    },
    "gpu-worker": {
        "GPU_WORKER_ENGINE_OPTIONS": '{"tokens_per_second": 200}',
        "GPU_WORKER_HEARTBEAT_INTERVAL": "PT0.3S",
        "GPU_WORKER_MAX_CONCURRENT": "64",
        "GPU_WORKER_SHUTDOWN_GRACE": "PT1S",
    },
    "notifier": {
        "NOTIFIER_WEBHOOK_TIMEOUT": "PT1S",
        "NOTIFIER_WEBHOOK_SECRETS": """[
            "whsec_bmV3ZXIgMDEyMzQ1Njc4OTAxMjM0NTY3", "whsec_b2xkZXIgMDEyMzQ1Njc4OTAxMjM0NTY3"
        ]""",
    },
}
"""Settings of the services under test, by kind of process.

The heartbeat timeout is left at its default: on a busy machine a live worker is silent for seconds, and an attempt
that is lost so is one more than a test expects. Tests that kill workers shorten it, and expect no exact number.
"""

_ids = itertools.count(1)


def stack_settings(folder: Any, **changes: Any) -> StackSettings:
    """Return settings for a stack of its own: any free ports, the simulated engine."""
    chosen = {name: 0 for name in StackSettings.model_fields if name.endswith("_port")}
    return StackSettings(**{**chosen, "state_dir": folder, "engine": "simulated", **changes})


@pytest.fixture(scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    async with Stack(stack_settings(tmp_path_factory.mktemp("stack")), environment=FAST) as running:
        yield running


@pytest.fixture(scope="session")
async def stub(stack: Stack) -> AsyncIterator[llm_pb2_grpc.LlmServiceStub]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield llm_pb2_grpc.LlmServiceStub(channel)


@pytest.fixture(scope="session")
async def temporal(stack: Stack) -> Client:
    return await Client.connect(stack.address("temporal"), data_converter=data_converter)


@asynccontextmanager
async def running(stack: Stack, notifier: Process, gateway: Process) -> AsyncIterator[llm_pb2_grpc.LlmServiceStub]:
    """Run a notifier and a gateway beside the stack's own while the context is open; yield a client of the gateway."""
    for process in (notifier, gateway):
        await process.start()
        await process.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
        yield llm_pb2_grpc.LlmServiceStub(channel)
    for process in (gateway, notifier):
        await process.terminate()


def tool(name: str) -> str:
    """Return the path of an installed program: beside the interpreter, or else in PATH."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert path, f"{name} is not installed"
    return path


async def temporal_cli(stack: Stack, *arguments: str) -> str:
    """Run Temporal's CLI against the stack and return what it prints."""
    process = await asyncio.create_subprocess_exec(
        *(tool("temporal"), *arguments, "--address", stack.address("temporal")),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, problem = await process.communicate()
    assert process.returncode == 0, problem.decode()
    return output.decode()


def new_job(prompt: str = "Say something.", **changes: Any) -> llm_pb2.JobRequest:
    """Return a job under a key of its own; `params` may be a dict."""
    number = next(_ids)
    values = {"user_id": f"user-{number}", "request_id": f"req-{number}", "model": "docstrings", **changes}
    if "messages" not in values:
        values["prompt"] = prompt
    return llm_pb2.JobRequest(**values)


@dataclass
class Seen:
    """What a watcher has received."""

    messages: list[llm_pb2.StreamStatusResponse] = field(default_factory=list)
    output: bytes = b""
    rewinds: int = 0
    next_offset: int = 0
    resume_token: str = ""

    @property
    def states(self) -> list[str]:
        """The states in order, repeats left out."""
        names = [
            llm_pb2.JobState.Name(message.status.state).removeprefix("JOB_STATE_")
            for message in self.messages
            if message.HasField("status")
        ]
        return [name for name, _ in itertools.groupby(names)]

    @property
    def final(self) -> llm_pb2.StreamStatusResponse:
        return self.messages[-1]

    def add(self, message: llm_pb2.StreamStatusResponse) -> None:
        self.messages.append(message)
        if message.HasField("delta"):
            delta = message.delta
            assert delta.offset <= len(self.output), "a gap"
            assert delta.rewind == (delta.offset < len(self.output)), "rewind says what the offset says"
            self.rewinds += delta.rewind
            self.output = self.output[: delta.offset] + delta.text.encode()
        self.next_offset = message.next_offset
        self.resume_token = message.resume_token or self.resume_token


def assert_not_tried_again(seen: Seen) -> None:
    """Assert that no attempt followed the one that ended with the job's final error."""
    error = seen.final.status.error
    goes_on = (llm_pb2.JOB_STATE_QUEUED, llm_pb2.JOB_STATE_RUNNING)
    assert not [m for m in seen.messages if m.status.state in goes_on and m.status.error.details == error.details]


async def watch(stub: llm_pb2_grpc.LlmServiceStub, workflow_id: str) -> Seen:
    """Watch a job from the start of its output to its end."""
    seen = Seen()
    async for message in stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=workflow_id), timeout=60):
        seen.add(message)
    return seen


async def run_job(stub: llm_pb2_grpc.LlmServiceStub, job: llm_pb2.JobRequest) -> Seen:
    """Submit a job and watch it to its end."""
    response = await stub.Submit(llm_pb2.SubmitRequest(job=job), timeout=20)
    return await watch(stub, response.workflow_id)


async def until_output(stub: llm_pb2_grpc.LlmServiceStub, workflow_id: str) -> None:
    """Return once the job has made output."""
    async for message in stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=workflow_id), timeout=60):
        if message.HasField("delta"):
            return


def details_of(error: grpc.RpcError) -> dict[str, Any]:
    """Return the google.rpc details of a failed call by type name: BadRequest, ErrorInfo, RetryInfo."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    return unpack(status)


def unpack(status: status_pb2.Status) -> dict[str, Any]:
    """Return the details of a status by type name."""
    found = {}
    for packed in status.details:
        detail = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])()
        packed.Unpack(detail)
        found[type(detail).__name__] = detail
    return found


class Receiver:
    """A webhook receiver: keeps what it is sent, answers 200 or what a path like /status/503 asks for."""

    def __init__(self) -> None:
        self.url = ""
        self._requests: defaultdict[str, list[tuple[dict[str, str], dict[str, Any]]]] = defaultdict(list)
        self._arrived = asyncio.Condition()

    async def handle(self, request: web.Request) -> web.Response:
        async with self._arrived:
            self._requests[request.path].append((dict(request.headers), await request.json()))
            self._arrived.notify_all()
        _, _, status = request.path.partition("/status/")
        return web.Response(status=int(status or 200), headers={"Location": "/elsewhere"})

    async def received(self, path: str, count: int = 1) -> list[tuple[dict[str, str], dict[str, Any]]]:
        """Return headers and bodies once there are so many for the path."""
        async with asyncio.timeout(30), self._arrived:
            await self._arrived.wait_for(lambda: len(self._requests[path]) >= count)
            return self._requests[path]


@pytest.fixture(scope="session")
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/{path:.*}", receiver.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield receiver
    await runner.cleanup()


def webhook(url: str) -> list[llm_pb2.NotifyTarget]:
    """Return JobRequest.notify for one webhook."""
    return [llm_pb2.NotifyTarget(webhook=llm_pb2.Webhook(url=url))]


def interrupt(pid: int) -> None:
    """Send SIGINT to a process, as Ctrl-C does."""
    os.kill(pid, signal.SIGINT)


def interrupt_another_thread(pid: int) -> None:
    """Send SIGINT to another thread than the main one, which sleeps on, as after a signal just before its sleep."""
    if sys.platform != "linux":
        pytest.skip("only Linux sends a signal to one thread")
    thread = max(int(thread) for thread in os.listdir(f"/proc/{pid}/task"))
    assert thread != pid
    assert ctypes.CDLL(None).tgkill(pid, thread, signal.SIGINT) == 0
