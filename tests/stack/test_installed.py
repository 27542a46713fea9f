"""The services as they are deployed: installed from a wheel, started in an empty directory by another user.

The wheel is built from a copy of this checkout and installed beside this environment's packages.
"""

import asyncio
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from deploy.local.ports import free_port
from deploy.local.stack import Stack
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.stack.test_polyglot import ROOT
from tests.stack.test_readiness import SECONDS, get
from tests.support.jobs import new_job, run_job, webhook
from tests.support.receivers import Receiver
from tests.support.stacks import stack_settings

PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOBODY: Final = 65534
LOOPBACK: Final = {
    "NOTIFIER_WEBHOOK_NETWORKS": '["127.0.0.0/8"]',
    "NOTIFIER_WEBHOOK_SCHEMES": '["http"]',
    "NOTIFIER_WEBHOOK_PORTS": "[]",
}


class Installed:
    """An installation."""

    def __init__(self, python: Path, empty: Path, wheel: Path) -> None:
        self.python = python
        self.empty = empty
        self.wheel = wheel
        self.user = self._user()

    def _user(self) -> dict[str, Any]:
        """Return the arguments that run a process as another user, where that can be and it can read the packages."""
        other = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        try:
            command = (self.python, "-c", "import grpc, temporalio")
            subprocess.run(command, cwd=self.empty, check=True, capture_output=True, **other)
        except (PermissionError, subprocess.CalledProcessError):
            return {}
        return other

    async def start(self, service: str, **environment: str) -> asyncio.subprocess.Process:
        """Start a service. It has nothing of this process's environment."""
        return await asyncio.create_subprocess_exec(
            *(str(self.python), "-m", f"services.{service}"),
            cwd=self.empty,
            env={"PATH": os.defpath, "TEMPORAL_CONFIG_FILE": os.devnull, **environment},
            stderr=asyncio.subprocess.PIPE,
            **self.user,
        )

    async def refusal(self, service: str, **environment: str) -> str:
        """Return the log of a service that does not start."""
        process = await self.start(service, **environment)
        _, log = await asyncio.wait_for(process.communicate(), SECONDS)
        assert process.returncode == 1
        return log.decode()


@pytest.fixture(scope="module")
def installed() -> Iterator[Installed]:
    # Not pytest's folder, which is for its user alone.
    with tempfile.TemporaryDirectory(prefix="installed-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        leave_out = shutil.ignore_patterns(".*", "__pycache__", "node_modules", "build", "*.egg-info", "tests", "bench")
        shutil.copytree(ROOT, folder / "source", ignore=leave_out)
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
        no_others = ("--no-deps", "--no-index")
        subprocess.run(
            (*pip, "wheel", *no_others, "--no-build-isolation", "-w", folder, folder / "source"), check=True, cwd=folder
        )
        shutil.rmtree(folder / "source")
        (wheel,) = folder.glob("*.whl")
        python = folder / "venv" / "bin" / "python"
        subprocess.run((sys.executable, "-m", "venv", "--without-pip", folder / "venv"), check=True)
        subprocess.run((*pip, "--python", python, "install", *no_others, wheel), check=True)
        (packages,) = (folder / "venv").glob("lib/python*/site-packages")
        (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (folder / "empty").mkdir()
        yield Installed(python, folder / "empty", wheel)


@asynccontextmanager
async def running(installed: Installed, service: str, **environment: str) -> AsyncIterator[Any]:
    """Run a service while the context is open; yield what it says at /readyz once it is ready."""
    port = free_port()
    variable = f"{service.upper()}_METRICS_PORT"
    process = await installed.start(service, **{variable: str(port), **environment})
    assert process.stderr is not None
    log = asyncio.create_task(process.stderr.read())
    try:
        async with asyncio.timeout(SECONDS):
            while True:
                assert process.returncode is None, (await log).decode()
                try:
                    answer = await get(f"http://127.0.0.1:{port}/readyz")
                except OSError:
                    pass
                else:
                    if answer.status == 200:
                        break
                await asyncio.sleep(0.1)
        yield answer.body
        process.terminate()
        assert await asyncio.wait_for(process.wait(), SECONDS) == 0, (await log).decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await log


async def test_a_job_runs_through_installed_services(installed: Installed, tmp_path: Path, receiver: Receiver) -> None:
    """With the default model, whose tokenizer the gateway has from the wheel."""
    async with Stack(stack_settings(tmp_path), only=("temporal", "nats")) as stack, AsyncExitStack() as opened:
        temporal = {"TEMPORAL_ADDRESS": stack.address("temporal")}
        feed = {"FEED_URL": f"nats://{stack.address('nats')}"}
        async with asyncio.TaskGroup() as starting:
            ready = {
                service: starting.create_task(opened.enter_async_context(running(installed, service, **environment)))
                for service, environment in {
                    "gateway": {**temporal, **feed, "GATEWAY_PORT": "0"},
                    "gpu_worker": {**temporal, **feed, "GPU_WORKER_ENGINE": "simulated"},
                    "notifier": {**temporal, **LOOPBACK},
                    "codec": {"CODEC_PORT": "0"},
                }.items()
            }
        told = {service: task.result() for service, task in ready.items()}
        assert {service["versions"][PROJECT["name"]] for service in told.values()} == {PROJECT["version"]}
        async with grpc.aio.insecure_channel(told["gateway"]["address"]) as channel:
            client = LlmServiceStub(channel)
            job = new_job(params={"max_tokens": 5}, notify=webhook(f"{receiver.url}/installed"))
            assert (await run_job(client, job)).states[-1] == "SUCCEEDED"
            await receiver.received("/installed")
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await run_job(client, new_job("word " * 5000))
            assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert list(installed.empty.iterdir()) == []


def test_the_wheel_holds_the_model_that_comes_along(installed: Installed) -> None:
    """All that the default of GPU_WORKER_MODEL_PATH needs."""
    model = {path.relative_to(ROOT).as_posix() for path in (ROOT / "models" / "docstrings").iterdir()}
    with zipfile.ZipFile(installed.wheel) as wheel:
        assert model <= set(wheel.namelist())


async def test_what_has_no_default_is_named_by_its_setting(installed: Installed) -> None:
    """A model that does not come along, the tokenizer of one, and the address of Temporal."""
    model = '{"name": "a", "context_tokens": 9, "max_output_tokens": 9, "default_max_tokens": 9, "tokenizer": "a.json"}'
    worker, gateway, notifier = await asyncio.gather(
        installed.refusal("gpu_worker", GPU_WORKER_ENGINE="torch", GPU_WORKER_MODEL="llama"),
        installed.refusal("gateway", GATEWAY_MODELS=f"[{model}]"),
        installed.refusal("notifier", NOTIFIER_METRICS_PORT="0"),
    )
    assert re.search(r"GPU_WORKER_MODEL_PATH: .*llama", worker)
    assert "GATEWAY_MODELS.0.tokenizer: " in gateway
    assert "Traceback" not in worker + gateway
    assert "TEMPORAL_ADDRESS" in notifier
