"""A client for the gateway of a running stack."""

import grpc

from deploy.local.probes import CHANNEL_OPTIONS
from deploy.local.stack import Stack
from durable_llm import AsyncClient


def gateway_client(stack: Stack) -> AsyncClient:
    """Return a client of the gateway."""
    credentials = grpc.ssl_channel_credentials(stack.ca.read_bytes()) if stack.ca is not None else None
    return AsyncClient(stack.address("gateway"), credentials=credentials, options=CHANNEL_OPTIONS)


async def first_model(client: AsyncClient) -> str:
    """Return the name of the first model of the gateway. There is always one. Raises ApiError."""
    return (await client.models())[0].name
