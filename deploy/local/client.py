"""A running stack's gateway, as its users call it."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import grpc

from deploy.local.probes import CHANNEL_OPTIONS
from deploy.local.stack import Stack
from llm_pb import llm_pb2, llm_pb2_grpc


@asynccontextmanager
async def gateway_client(stack: Stack) -> AsyncGenerator[llm_pb2_grpc.LlmServiceStub]:
    """Provide a client of the gateway."""
    address = stack.address("gateway")
    async with (
        grpc.aio.insecure_channel(address, CHANNEL_OPTIONS)
        if stack.ca is None
        else grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(stack.ca.read_bytes()), CHANNEL_OPTIONS)
    ) as channel:
        yield llm_pb2_grpc.LlmServiceStub(channel)


async def first_model(client: llm_pb2_grpc.LlmServiceStub) -> str:
    """Return the name of a model that jobs may name; there is always one."""
    return (await client.ListModels(llm_pb2.ListModelsRequest())).models[0].name
