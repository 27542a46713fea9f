"""A client for the gateway of a running stack."""

from deploy.local.probes import CHANNEL_OPTIONS
from deploy.local.stack import Stack
from durable_llm import AsyncClient


def gateway_client(stack: Stack) -> AsyncClient:
    """Return a client of the gateway."""
    return AsyncClient(stack.address("gateway"), options=CHANNEL_OPTIONS)


async def first_model(client: AsyncClient) -> str:
    """Return the name of the first model of the gateway. There is always one."""
    return (await client.models())[0].name
