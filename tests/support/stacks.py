"""Stacks of real processes. Ordinary settings make their timeouts and retry intervals short."""

import asyncio
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from deploy.local.process import Process
from deploy.local.settings import StackSettings
from deploy.local.stack import Stack
from llm_pb import llm_pb2_grpc

FAST = {
    "gateway": {
        "GATEWAY_RETRY_INTERVAL": "PT0.1S",
        "GATEWAY_NOTIFY_HOLD": "PT2S",
        "GATEWAY_NOTIFY_INTERVAL": "PT0.1S",
        "GATEWAY_NOTIFY_BACKOFF": "2",
        "GATEWAY_NOTIFY_MAX_DURATION": "PT20S",
        "GATEWAY_NOTIFY_TIMEOUT": "PT2S",
        "GATEWAY_POLL": "PT0.3S",
        "GATEWAY_REDELIVER_INTERVAL": "PT0S",
        "GATEWAY_DELETE_SETTLE": "PT3S",
        "GATEWAY_SCHEDULE_MIN_INTERVAL": "PT1S",
        "GATEWAY_KEEPALIVE": "PT1S",
        "GATEWAY_SHUTDOWN_GRACE": "PT2S",
        "GATEWAY_BATCH_MANIFEST_CHUNKS": "5",
        "GATEWAY_BATCH_RUN_CHUNKS": "13",
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

The heartbeat timeout keeps its default. On a busy machine a live worker can be silent for seconds, and with a shorter
timeout the test would see one attempt more. Tests that kill workers shorten it and expect no exact number of attempts.
"""
SOON_LOST = {"GATEWAY_HEARTBEAT_TIMEOUT": "PT1.5S", "GATEWAY_RETRY_ATTEMPTS": "10"}
"""Settings of a gateway whose jobs soon leave a dead worker, and sometimes a live one that is kept waiting."""


def stack_settings(folder: Any, **changes: Any) -> StackSettings:
    """Return settings of a new stack with free ports and the simulated engine."""
    return StackSettings.with_free_ports(**{"state_dir": folder, "engine": "simulated", **changes})


@asynccontextmanager
async def running(stack: Stack, notifier: Process, gateway: Process) -> AsyncIterator[llm_pb2_grpc.LlmServiceStub]:
    """Run a further notifier and gateway while the context is open, and yield a client of that gateway."""
    for process in (notifier, gateway):
        await process.start()
        await process.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
        yield llm_pb2_grpc.LlmServiceStub(channel)
    for process in (gateway, notifier):
        await process.terminate()


def tool(name: str) -> str:
    """Return the path of an installed program, from the interpreter's folder or from PATH."""
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
