"""The live feed on three NATS servers, of which one dies: no record is lost."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import SecretStr

from feed.feed import FeedSettings
from feed.nats import NatsFeed
from feed.output import read_generated_output
from feed.writer import FeedWriter
from llm_pb import internal_pb2
from tests.support.nats_cluster import Cluster, running_cluster


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running_cluster(tmp_path) as cluster:
        yield cluster


async def replicated_feed(url: str) -> NatsFeed:
    feed = NatsFeed(FeedSettings(url=SecretStr(url), replicas=3))
    feed.start()
    async with asyncio.timeout(120):
        await feed.wait_ready()
    return feed


async def test_a_writer_repeats_what_came_while_the_stream_had_no_leader(cluster: Cluster) -> None:
    """The writer is connected to another server, so nothing but the election tells it. Its log is whole afterwards."""
    first = await replicated_feed(cluster.url)
    leader = await cluster.leader(replicas=2)
    other = next(url for name, url in cluster.urls.items() if name != leader.name)
    feed = await replicated_feed(other)
    writer = FeedWriter(feed, "job", internal_pb2.AttemptStarted(attempt=1))
    await writer.begin()
    written = 0

    async def write(until: "asyncio.Task[object]") -> None:
        nonlocal written
        while not until.done():
            await writer.append(f"{written} ", [written], prompt_tokens=1, at=datetime.now(UTC))
            written += 1
            await asyncio.sleep(0.02)

    await write(asyncio.create_task(asyncio.sleep(0.5)))
    await leader.kill()
    await write(asyncio.create_task(cluster.leader()))
    async with asyncio.timeout(60):
        for number in itertools.count():
            await write(asyncio.create_task(asyncio.sleep(0.2)))
            if await feed.sync("job", internal_pb2.FeedRecord(writer=f"reader-{number}")):
                output = await read_generated_output(feed, "job", f"reader-{number}")
                if output.whole and len(output.token_ids) == written:
                    break
    assert output.text.decode() == "".join(f"{number} " for number in range(written))
    for one in (first, feed):
        await one.close()
