"""A running stack's gateway, as its users call it."""

from deploy.local.probes import CHANNEL_OPTIONS
from deploy.local.stack import Stack
from durable_llm import AsyncClient


def gateway_client(stack: Stack) -> AsyncClient:
    """Return a client of the gateway."""
    return AsyncClient(stack.address("gateway"), options=CHANNEL_OPTIONS)


async def first_model(client: AsyncClient) -> str:
    """Return the name of a model that jobs may name; there is always one."""
    return (await client.models())[0].name
