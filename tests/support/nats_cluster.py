"""A cluster of NATS servers on loopback."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import nats
from nats.errors import Error as NatsError

from deploy.local.ports import HOST, free_port
from deploy.local.probes import listens
from deploy.local.process import Process
from feed.feed import FeedSettings
from tests.support.paths import ROOT
from tests.support.stacks import tool

NAMES = ("one", "two", "three")


class Cluster:
    """Three NATS servers on loopback."""

    def __init__(self, folder: Path) -> None:
        clients, routes = ([free_port() for _ in NAMES] for _ in range(2))
        self.urls = {name: f"nats://{HOST}:{port}" for name, port in zip(NAMES, clients, strict=True)}
        self.url = ",".join(self.urls.values())
        others = ",".join(f"nats-route://{HOST}:{port}" for port in routes)
        self.servers: dict[str, Process] = {}
        for name, port, route in zip(NAMES, clients, routes, strict=True):
            cluster = ("--cluster_name", "feed", "--cluster", f"nats://{HOST}:{route}", "--routes", others)
            command = (tool("nats-server"), "-a", HOST, "-p", str(port), "-n", name, "-js", "-sd", str(folder / name))
            self.servers[name] = Process(
                name,
                (*command, *cluster),
                {},
                log_path=folder / f"{name}.log",
                probe=listens(f"{HOST}:{port}"),
                working_dir=ROOT,
                start_timeout=120,
                stop_grace=15,
            )

    async def leader(self, *, replicas: int = 1) -> Process:
        """Return the server that leads the stream, once so many others hold all of it."""
        async with asyncio.timeout(120):
            while True:
                try:
                    client = await nats.connect([*self.urls.values()])
                    try:
                        info = await client.jetstream().stream_info(FeedSettings().stream)
                    finally:
                        await client.close()
                except (NatsError, OSError, TimeoutError):
                    pass
                else:
                    cluster = info.cluster
                    whole = [peer for peer in cluster.replicas or [] if peer.current] if cluster else []
                    if cluster and cluster.leader and len(whole) >= replicas:
                        return self.servers[cluster.leader]
                await asyncio.sleep(0.2)


@asynccontextmanager
async def running_cluster(folder: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(folder)
    for server in cluster.servers.values():
        await server.start()
    try:
        for server in cluster.servers.values():
            await server.wait_ready()
        yield cluster
    finally:
        for server in cluster.servers.values():
            if server.running:
                await server.terminate()
