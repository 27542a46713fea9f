"""How the feed's bandwidth grows with the gateways that watch a job, and what leaf nodes of NATS change.

A gateway reads the feed of a watched job once, however many clients watch there (bench.watchers measures those). So the
broker sends each record once to each gateway at which the job is watched. The script writes records of tokens with the
suite's own feed, at a steady rate, and reads them with as many feeds as there are gateways. Each server of NATS is a
process of its own; its counts are its own, of all that it sends, and include acknowledgements and heartbeats.

- `suite`: all gateways are connected to the one server that holds the stream.
- `peer_leaves`: they are connected to leaf nodes of it, which hold nothing.
- `peer_mirrors`: each leaf node holds a mirror of the stream, which the gateways there read. Not what the suite is made
  for: a gateway also writes, and deletes from a stream that it can purge. It is the bound of what such nodes can save.

Not measured: the network, TLS, replicas of the stream.

    python -m bench.feed_fanout
"""

import asyncio
import logging
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from bench.support import script
from bench.support.nats_servers import Server, Traffic, hub_and_leaves, mirror
from bench.support.report import Report
from feed.feed import FeedSettings
from feed.nats import NatsFeed
from llm_pb import internal_pb2


@dataclass(frozen=True)
class Sizes:
    """The options of the command line. `records` is the number of each job's records."""

    rounds: int = 3
    gateways: tuple[int, ...] = (1, 2, 4, 8)
    leaves: int = 2
    jobs: int = 20
    records: int = 100
    records_per_second: int = 1000


WAYS: Final = ("suite", "peer_leaves", "peer_mirrors")
WRITER: Final = "9f0c2b8e-5d1a-4c37-8e64-0b7a3f21d95c"


async def measure(sizes: Sizes) -> Report:
    """Return the report."""
    report = Report(
        "How does the feed's bandwidth grow?",
        "For each record of one token that was written: messages and bytes that the server with the stream sent, its"
        " processor time in microseconds, and that of all servers together.",
    )
    # The feed warns that a mirror is no stream of its own, which is what is measured here.
    logging.getLogger("feed").setLevel(logging.ERROR)
    for _ in range(sizes.rounds):
        for gateways in sizes.gateways:
            for who in WAYS:
                report.add(case(gateways), who, await sent(sizes, gateways, who))
    most, least = max(sizes.gateways), min(sizes.gateways)
    for who in WAYS:
        pairs = zip(
            report.rounds(case(most), who, "hub_bytes"), report.rounds(case(least), who, "hub_bytes"), strict=True
        )
        report.judge(f"bytes of the hub, {who}, {most} / {least} gateways", [a / b for a, b in pairs])
    return report


def case(gateways: int) -> str:
    """Return the name of a case."""
    return f"{gateways} gateways"


async def sent(sizes: Sizes, gateways: int, who: str) -> dict[str, float]:
    """Write and read all records; return what the servers sent and used for each."""
    with tempfile.TemporaryDirectory() as folder:
        leaves = 0 if who == "suite" else sizes.leaves
        async with AsyncExitStack() as opened:
            servers = hub_and_leaves(Path(folder), leaves, jetstream=who == "peer_mirrors")
            hub, nodes = await opened.enter_async_context(servers)
            writer = await opened.enter_async_context(running_feed(hub))
            if who == "peer_mirrors":
                for node in nodes:
                    await mirror(node, FeedSettings().stream)
            places = nodes or [hub]
            feeds = [
                await opened.enter_async_context(running_feed(places[number % len(places)]))
                for number in range(gateways)
            ]
            return await written_and_read(sizes, writer, feeds, [hub, *nodes])


async def written_and_read(
    sizes: Sizes, writer: NatsFeed, feeds: list[NatsFeed], servers: list[Server]
) -> dict[str, float]:
    """Write and read all records; return the figures."""
    begun = asyncio.Semaphore(0)
    reading = [
        asyncio.create_task(read(feed, f"job-{job}", sizes.records, begun))
        for feed in feeds
        for job in range(sizes.jobs)
    ]
    async with asyncio.timeout(120):
        for _ in reading:
            await begun.acquire()
        before = [await server.traffic() for server in servers]
        await write(sizes, writer)
        await asyncio.gather(*reading)
    used = [await server.traffic() - earlier for server, earlier in zip(servers, before, strict=True)]
    records = sizes.jobs * sizes.records
    hub: Traffic = used[0]
    return {
        "hub_messages": hub.messages / records,
        "hub_bytes": hub.bytes / records,
        "hub_cpu_us": hub.cpu_seconds / records * 1e6,
        "all_cpu_us": sum(each.cpu_seconds for each in used) / records * 1e6,
    }


async def write(sizes: Sizes, feed: NatsFeed) -> None:
    """Write the records of all jobs in turn, at the rate."""
    begin = time.monotonic()
    for number in range(sizes.records):
        for job in range(sizes.jobs):
            await feed.append(f"job-{job}", record(number))
        due = begin + (number + 1) * sizes.jobs / sizes.records_per_second
        await asyncio.sleep(max(0.0, due - time.monotonic()))


async def read(feed: NatsFeed, key: str, count: int, begun: asyncio.Semaphore) -> None:
    """Read a job's records from before the first one to the last one."""
    left = count

    def on_record(_: internal_pb2.FeedRecord) -> bool:
        nonlocal left
        left -= 1
        return left == 0

    await feed.read(key, on_record, begun.release)


def record(number: int) -> internal_pb2.FeedRecord:
    """Return the record of one token, of the size that the suite writes."""
    made = internal_pb2.TokensMade(offset=5 * number, text=" word", token_ids=[1000 + number], token_offset=number)
    return internal_pb2.FeedRecord(writer=WRITER, tokens_made=made)


@asynccontextmanager
async def running_feed(server: Server) -> AsyncIterator[NatsFeed]:
    """Yield a feed that is connected to the server and has its stream."""
    feed = NatsFeed(FeedSettings(url=SecretStr(server.url)))
    feed.start()
    try:
        async with asyncio.timeout(60):
            await feed.wait_ready()
        yield feed
    finally:
        await feed.close()


if __name__ == "__main__":
    quick = Sizes(rounds=1, gateways=(1, 2), leaves=1, jobs=2, records=5)
    script.run(measure, Sizes(), quick, __doc__)
