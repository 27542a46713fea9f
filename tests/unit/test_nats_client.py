"""The client of NATS leaves a server that takes nothing any more."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pydantic import SecretStr

from feed.feed import FeedSettings
from runtime.nats_client import DirectClient, connect_options, new_client
from services.gateway.settings import GatewaySettings
from services.notifier.settings import NotifierSettings

SECONDS = 20
MEGABYTES = 16
"""More than the system keeps for a peer that does not read."""


@asynccontextmanager
async def silent_server() -> AsyncIterator[tuple[str, asyncio.Queue[None]]]:
    """Yield the URL of a server that greets its clients and then reads nothing, and what counts its clients."""
    clients: asyncio.Queue[None] = asyncio.Queue()
    ended = asyncio.Event()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id": "silent", "max_payload": 1048576, "headers": true}\r\n')
        while not (await reader.readline()).startswith(b"PING"):
            pass
        writer.write(b"PONG\r\n")
        # asyncio reads ahead until it is told not to.
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        clients.put_nowait(None)
        await ended.wait()
        writer.transport.abort()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    try:
        yield f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}", clients
    finally:
        ended.set()
        server.close()


async def stuffed(url: str) -> DirectClient:
    """Return a client with more to send than its connection takes."""
    client = new_client(SecretStr(url), None)
    await client.connect(
        url,
        ping_interval=1,
        max_outstanding_pings=1,
        reconnect_time_wait=0,
        max_reconnect_attempts=-1,
        pending_size=2 * MEGABYTES * 1024 * 1024,
    )
    for _ in range(MEGABYTES):
        await client.publish("subject", bytes(1024 * 1024))
    return client


async def test_a_client_connects_again_when_the_server_takes_nothing() -> None:
    async with silent_server() as (url, clients), asyncio.timeout(SECONDS):
        client = await stuffed(url)
        await clients.get()
        await clients.get()
        await client.close()


async def test_a_client_ends_although_the_server_takes_nothing() -> None:
    async with silent_server() as (url, _), asyncio.timeout(SECONDS):
        client = await stuffed(url)
        await client.close()
        assert client.is_closed


def test_every_client_soon_notices_that_its_server_is_gone() -> None:
    """The feed's, the notifier's and the audit log's. nats-py gives a server up after its third unanswered ping."""
    notifier = NotifierSettings(nats_url=SecretStr("nats://server"))
    gateway = GatewaySettings(audit=SecretStr("nats://server/AUDIT"))
    for one, prefix in ((FeedSettings(), ""), (notifier, "nats_"), (gateway, "audit_")):
        assert 3 * connect_options(one, "role", prefix)["ping_interval"] <= 15
