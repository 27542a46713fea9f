"""Fixtures of all tests: one stack of real processes, started once, and the clients that call it.

The stack's worker runs the simulated engine. A prompt can script faults of that engine.
"""

import gc
import os
from collections.abc import AsyncIterator, Generator
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import HealthCheck, settings
from temporalio.client import Client

from deploy.local.process import Process
from deploy.local.stack import Stack
from llm_pb import llm_pb2_grpc
from payload_converter import data_converter
from tests.support import fork_server
from tests.support.pipelines import WITH_PIPELINES
from tests.support.receivers import Receiver, receiving
from tests.support.stacks import stack_settings

Process.start_program = staticmethod(fork_server.start)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each of several processes would give torch a thread for every core, and the threads would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# A busy machine makes an example slow. That says nothing of the code.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# That of `make check`. All other runs try more examples.
settings.register_profile("quick", settings.get_profile("suite"), max_examples=20)
settings.load_profile("suite")
IMPORT_TORCH = frozenset(
    {
        "tests/chaos/test_training.py",
        "tests/contract/test_engine_torch.py",
        "tests/contract/test_engines.py",
        "tests/contract/test_image_engines.py",
        "tests/stack/test_model.py",
        "tests/stack/test_real_engines.py",
        "tests/unit/test_training.py",
    }
)
"""Test modules that import torch, or start workers with it, in `make test`. Either takes a process seconds, once."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect no garbage while modules are imported: what they consist of lives as long as the process."""
    gc.disable()
    result = yield
    gc.freeze()
    gc.enable()
    return result


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return the scheduler of `--dist loadfile`, for which the modules that import torch are one file."""
    from xdist.scheduler import LoadFileScheduling

    class TorchOnce(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            scope: str = super()._split_scope(nodeid)
            return "torch" if scope in IMPORT_TORCH else scope

    return TorchOnce(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    async with Stack(stack_settings(tmp_path_factory.mktemp("stack")), environment=WITH_PIPELINES) as running:
        yield running


@pytest.fixture(scope="session")
async def stub(stack: Stack) -> AsyncIterator[llm_pb2_grpc.LlmServiceStub]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield llm_pb2_grpc.LlmServiceStub(channel)


@pytest.fixture(scope="session")
async def http(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    base = f"http://{stack.address('http')}"
    async with httpx.AsyncClient(base_url=base, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
async def temporal(stack: Stack) -> Client:
    return await Client.connect(stack.address("temporal"), data_converter=data_converter)


@pytest.fixture(scope="session")
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver
