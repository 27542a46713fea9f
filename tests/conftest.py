"""Fixtures of all tests: one stack of real processes, started once, and the clients that call it.

The stack's worker runs the simulated engine. A prompt can script faults of that engine.
"""

from collections.abc import AsyncIterator

import grpc
import httpx
import pytest
from hypothesis import HealthCheck, settings
from temporalio.client import Client

from deploy.local.stack import Stack
from llm_pb import llm_pb2_grpc
from payload_converter import data_converter
from tests.support.pipelines import WITH_PIPELINES
from tests.support.receivers import Receiver, receiving
from tests.support.stacks import stack_settings

# A busy machine makes an example slow. That says nothing of the code.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# That of `make check`. All other runs try more examples.
settings.register_profile("quick", settings.get_profile("suite"), max_examples=20)
settings.load_profile("suite")


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
