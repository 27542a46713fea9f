"""Servers of NATS in topologies: a hub with JetStream, and leaf nodes that connect to it, with or without a mirror."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
from nats.aio.client import Client
from nats.js.api import ExternalStream, StorageType, StreamConfig, StreamSource

from bench.support.stacks import ROOT
from bench.support.usage import cpu_seconds
from deploy.local.ports import HOST, free_port
from deploy.local.probes import listens
from deploy.local.process import Process
from deploy.local.process_specs import program

HUB_DOMAIN: Final = "hub"


@dataclass(frozen=True)
class Traffic:
    """What a server has sent so far, on all its connections, and the processor time that it has used."""

    messages: int
    bytes: int
    cpu_seconds: float

    def __sub__(self, earlier: "Traffic") -> "Traffic":
        return Traffic(
            self.messages - earlier.messages, self.bytes - earlier.bytes, self.cpu_seconds - earlier.cpu_seconds
        )


class Server:
    """A running server."""

    def __init__(self, process: Process, port: int, monitoring: int, leaves: int) -> None:
        self.url = f"nats://{HOST}:{port}"
        self.leaf_url = f"nats-leaf://{HOST}:{leaves}"
        self._process = process
        self._monitoring = f"http://{HOST}:{monitoring}/varz"

    async def traffic(self) -> Traffic:
        """Return what the server itself counts."""
        async with aiohttp.ClientSession() as session, session.get(self._monitoring) as answer:
            counts = await answer.json()
        assert self._process.pid is not None
        return Traffic(counts["out_msgs"], counts["out_bytes"], cpu_seconds(self._process.pid))


@asynccontextmanager
async def running_server(
    folder: Path, name: str, *, hub: str = "", jetstream: bool = True, domain: str = HUB_DOMAIN
) -> AsyncIterator[Server]:
    """Run a server. `hub` is the leaf URL of the server that it is a leaf node of, `domain` that of its JetStream."""
    port, monitoring, leaves = free_port(), free_port(), free_port()
    leaf = {"remotes": [{"url": hub}]} if hub else {"listen": f"{HOST}:{leaves}"}
    config: dict[str, object] = {"leafnodes": leaf}
    if not jetstream:
        # Clients of the leaf node find the hub's JetStream under the usual names.
        config["default_js_domain"] = {"$G": HUB_DOMAIN}
    else:
        config["jetstream"] = {"store_dir": str(folder / name), "domain": domain}
    # nats-server reads JSON as its own format.
    path = folder / f"{name}.conf"
    path.write_text(json.dumps(config))
    process = Process(
        name,
        (program("nats-server"), "-c", str(path), "-a", HOST, "-p", str(port), "-m", str(monitoring), "-n", name),
        {},
        log_path=folder / f"{name}.log",
        probe=listens(f"{HOST}:{port}"),
        working_dir=ROOT,
        start_timeout=60,
        stop_grace=15,
    )
    await process.start()
    try:
        await process.wait_ready()
        yield Server(process, port, monitoring, leaves)
    finally:
        if process.running:
            await process.terminate()


@asynccontextmanager
async def hub_and_leaves(folder: Path, leaves: int, *, jetstream: bool) -> AsyncIterator[tuple[Server, list[Server]]]:
    """Run a hub and its leaf nodes, which have a JetStream of their own or use the hub's."""
    async with AsyncExitStack() as opened:
        hub = await opened.enter_async_context(running_server(folder, "hub"))
        nodes = []
        for name in (f"leaf{number}" for number in range(leaves)):
            node = running_server(folder, name, hub=hub.leaf_url, jetstream=jetstream, domain=name if jetstream else "")
            nodes.append(await opened.enter_async_context(node))
        yield hub, nodes


async def mirror(leaf: Server, stream: str) -> None:
    """Create a mirror of the hub's stream in the leaf's JetStream, under the same name."""
    client = Client()
    await client.connect(leaf.url)
    try:
        source = StreamSource(name=stream, external=ExternalStream(api=f"$JS.{HUB_DOMAIN}.API", deliver=""))
        await client.jetstream().add_stream(StreamConfig(name=stream, storage=StorageType.FILE, mirror=source))
    finally:
        await client.close()
