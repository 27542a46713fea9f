"""The suite and its Python client as they are deployed: installed from wheels and run in an empty directory.

The wheels are built from a copy of this checkout, the client's from its sdist. The services run as another user, with
both wheels next to this environment's packages. The client runs with only the packages that its wheel requires.
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
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc
import pytest
from packaging.requirements import Requirement

from deploy.local.ports import free_port
from deploy.local.stack import Stack
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.stack.test_readiness import SECONDS, get
from tests.support.commands import run
from tests.support.jobs import new_job, run_job, webhook
from tests.support.paths import ROOT
from tests.support.receivers import Receiver
from tests.support.stacks import stack_settings

PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIP: Final = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
NO_OTHERS: Final = ("--no-deps", "--no-index")
NOBODY: Final = 65534
LOOPBACK: Final = {
    "NOTIFIER_WEBHOOK_NETWORKS": '["127.0.0.0/8"]',
    "NOTIFIER_WEBHOOK_SCHEMES": '["http"]',
    "NOTIFIER_WEBHOOK_PORTS": "[]",
}

BUILD_SDIST: Final = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
USE_CLIENT: Final = """
from durable_llm import Client, Output

with Client() as client:
    job = client.submit(user_id="installed", model="docstrings", prompt="x", params={"max_tokens": 20})
    output = Output()
    for piece in job.stream():
        output.add(piece)
    text: str = job.result().output
    print(text == output.text != "")
"""


class Wheels(NamedTuple):
    """The wheels that are installed."""

    suite: Path
    client: Path


class Installed:
    """An installation of the suite and its client."""

    def __init__(self, python: Path, empty: Path) -> None:
        self.python = python
        self.empty = empty
        self.user = self._user()

    def _user(self) -> dict[str, Any]:
        """Return arguments that run a process as another user, or none if that user cannot read the packages."""
        other = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        try:
            command = (self.python, "-c", "import grpc, temporalio")
            subprocess.run(command, cwd=self.empty, check=True, capture_output=True, **other)
        except (PermissionError, subprocess.CalledProcessError):
            return {}
        return other

    async def start(self, service: str, **environment: str) -> asyncio.subprocess.Process:
        """Start a service, which inherits nothing of this process's environment."""
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
def folder() -> Iterator[Path]:
    # Only its own user can read pytest's folder.
    with tempfile.TemporaryDirectory(prefix="installed-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


@pytest.fixture(scope="module")
def wheels(folder: Path) -> Wheels:
    leave_out = shutil.ignore_patterns(".*", "__pycache__", "node_modules", "build", "*.egg-info", "tests", "bench")
    shutil.copytree(ROOT, folder / "source", ignore=leave_out, symlinks=True)
    client = folder / "source" / "clients" / "python"
    subprocess.run((sys.executable, "-c", BUILD_SDIST, folder), check=True, cwd=client, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    for source, into in ((folder / "source", "suite"), (sdist, "client")):
        built = (*PIP, "wheel", *NO_OTHERS, "--no-build-isolation", "-w", folder / into, source)
        subprocess.run(built, check=True, cwd=folder)
    shutil.rmtree(folder / "source")
    return Wheels(*(next((folder / name).glob("*.whl")) for name in ("suite", "client")))


def environment(folder: Path, *wheels: Path) -> Path:
    """Create an environment with only the wheels, and return its folder of packages."""
    subprocess.run((sys.executable, "-m", "venv", "--without-pip", folder), check=True)
    subprocess.run((*PIP, "--python", folder / "bin" / "python", "install", *NO_OTHERS, *wheels), check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    return packages


@pytest.fixture(scope="module")
def installed(folder: Path, wheels: Wheels) -> Installed:
    packages = environment(folder / "venv", *wheels)
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "empty").mkdir()
    return Installed(folder / "venv" / "bin" / "python", folder / "empty")


def requirements(distribution: metadata.Distribution) -> set[str]:
    """Return the names of the packages that a distribution requires on this machine, without its extras."""
    required = (Requirement(text) for text in distribution.requires or ())
    return {one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})}


@pytest.fixture(scope="module")
def client_alone(folder: Path, wheels: Wheels) -> Path:
    """Create an environment with only the client's wheel and its requirements, and return its interpreter."""
    packages = environment(folder / "client-venv", wheels.client)
    (own,) = metadata.distributions(path=[str(packages)])
    assert own.name == "durable-llm"
    wanted, there = requirements(own), set[str]()
    assert wanted == {"googleapis-common-protos", "grpcio", "protobuf"}
    while wanted - there:
        name = (wanted - there).pop()
        there.add(name)
        distribution = metadata.distribution(name)
        wanted |= requirements(distribution)
        for file in distribution.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                (packages / file).parent.mkdir(parents=True, exist_ok=True)
                (packages / file).symlink_to(file.locate())
    return folder / "client-venv" / "bin" / "python"


@asynccontextmanager
async def running(installed: Installed, service: str, **environment: str) -> AsyncIterator[Any]:
    """Run a service while the context is open, and yield its response to /readyz once it is ready."""
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
    """The model is the default one, whose tokenizer the gateway reads from the wheel."""
    store = installed.empty.parent / "store"
    store.mkdir(mode=0o777)
    store.chmod(0o777)
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
                    "trainer": {**temporal, "STORE_URL": store.as_uri()},
                }.items()
            }
        told = {service: task.result() for service, task in ready.items()}
        gateway = told["gateway"]["address"]
        told["http"] = await opened.enter_async_context(running(installed, "http", HTTP_PORT="0", HTTP_GATEWAY=gateway))
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


def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_whatever_the_services_read(wheels: Wheels) -> None:
    """These are the model that comes along, the pages of the console, and what else is no code."""
    read = {
        path.relative_to(ROOT).as_posix()
        for folder in ("services", "pipelines", "models/docstrings")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".md", ".pyc")
    }
    assert "services/http/console/templates/base.html" in read
    assert read <= files(wheels.suite)


def test_the_generated_code_is_in_the_clients_wheel_alone(wheels: Wheels) -> None:
    """Two copies of it cannot be loaded into one process, so the suite requires the client's wheel."""
    assert not files(wheels.suite) & files(wheels.client)
    assert {name.partition("/")[0] for name in files(wheels.client)} == {"durable_llm", "llm_pb"}
    generated = {path.relative_to(ROOT).as_posix() for path in (ROOT / "llm_pb").glob("*[!c]") if path.is_file()}
    assert generated <= files(wheels.client)
    assert "durable-llm" in {Requirement(text).name for text in PROJECT["dependencies"]}


async def test_the_client_needs_nothing_but_its_wheel(client_alone: Path, stack: Stack, tmp_path: Path) -> None:
    """It submits and streams a job, and it has type annotations."""
    script = tmp_path / "use.py"
    script.write_text(USE_CLIENT)
    ended = await run(str(client_alone), "-I", str(script), LLM_ADDRESS=stack.address("gateway"))
    assert (ended.output, ended.errors) == ("True\n", "")
    options = ("--strict", "--config-file=", "--cache-dir", str(tmp_path), "--python-executable", str(client_alone))
    checked = await run(sys.executable, "-m", "mypy", *options, str(script), cwd=tmp_path)
    assert checked.status == 0, checked.output


async def test_the_clients_wheel_has_the_command(client_alone: Path) -> None:
    """Without the packages of its extra it says how to install them."""
    ended = await run(str(client_alone.with_name("durable-llm")), "models")
    assert (ended.status, ended.output) == (1, "")
    assert "pip install 'durable-llm[cli]'" in ended.errors


async def test_what_has_no_default_is_named_by_its_setting(installed: Installed) -> None:
    """These are the path of another model, its tokenizer, and the address of Temporal."""
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
