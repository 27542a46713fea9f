"""The contract of the live feed. Every implementation must keep it."""

import asyncio
import shutil
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import nats
import pytest
from nats.js import JetStreamContext
from pydantic import SecretStr

from deploy.local.stack import Stack
from encryption import Encryption
from feed.encrypted import EncryptedFeed
from feed.feed import Feed, FeedSettings, want_feed
from feed.memory import MemoryFeed
from feed.nats import NatsFeed
from llm_pb import internal_pb2
from runtime.health import Readiness
from tests.support.encryption import Keys
from tests.support.peers import until_stopped
from tests.support.stacks import stack_settings


def record(number: int) -> internal_pb2.FeedRecord:
    return internal_pb2.FeedRecord(writer="w", tokens_made=internal_pb2.TokensMade(offset=number, text=str(number)))


async def read(feed: Feed, key: str, count: int) -> list[int]:
    """Return the numbers of the first `count` records."""
    numbers: list[int] = []

    def take(item: internal_pb2.FeedRecord) -> bool:
        numbers.append(item.tokens_made.offset)
        return len(numbers) == count

    async with asyncio.timeout(60):
        await feed.read(key, take)
    return numbers


class Follower:
    """A reader that follows a feed, and the numbers that it has read."""

    def __init__(self, feed: Feed, key: str) -> None:
        self.numbers: list[int] = []
        self._grown = asyncio.Event()
        self._task = asyncio.create_task(feed.read(key, self._take))

    def _take(self, item: internal_pb2.FeedRecord) -> None:
        self.numbers.append(item.tokens_made.offset)
        self._grown.set()

    async def until(self, number: int) -> list[int]:
        """Return all numbers read so far once `number` is among them."""
        async with asyncio.timeout(60):
            while number not in self.numbers:
                self._grown.clear()
                await self._grown.wait()
        return self.numbers

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@pytest.fixture(scope="module")
async def broker(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    async with Stack(stack_settings(tmp_path_factory.mktemp("feed")), only=("nats",)) as stack:
        yield stack


async def nats_feed(broker: Stack) -> NatsFeed:
    feed = NatsFeed(FeedSettings(url=SecretStr(f"nats://{broker.address('nats')}")))
    feed.start()
    return feed


@asynccontextmanager
async def jetstream(broker: Stack) -> AsyncIterator[JetStreamContext]:
    """Open a client, as an operator would."""
    client = await nats.connect(f"nats://{broker.address('nats')}")
    try:
        yield client.jetstream()
    finally:
        await client.close()


@pytest.fixture(params=["memory", "nats", "memory-encrypted", "nats-encrypted"])
async def feed(request: pytest.FixtureRequest, broker: Stack, tmp_path: Path) -> AsyncIterator[Feed]:
    feed: Feed = MemoryFeed() if "memory" in request.param else await nats_feed(broker)
    if isinstance(feed, NatsFeed):
        await feed.wait_ready()
    if "encrypted" in request.param:
        feed = EncryptedFeed(feed, Keys(tmp_path).encryption())
    yield feed
    await feed.close()


async def test_a_late_reader_gets_all_in_order(feed: Feed, request: pytest.FixtureRequest) -> None:
    key = request.node.name
    for number in range(1000):
        await feed.append(key, record(number))
    assert await feed.sync(key, record(1000))
    assert await read(feed, key, 1001) == list(range(1001))


async def test_readers_follow_live(feed: Feed, request: pytest.FixtureRequest) -> None:
    """A reader from before the first record and a later one get the same records."""
    key = request.node.name
    early = asyncio.create_task(read(feed, key, 20))
    for number in range(10):
        await feed.append(key, record(number))
    late = asyncio.create_task(read(feed, key, 20))
    await read(feed, key, 10)
    for number in range(10, 20):
        await feed.append(key, record(number))
    assert await early == await late == list(range(20))


async def test_a_reader_learns_when_it_has_caught_up(feed: Feed, request: pytest.FixtureRequest) -> None:
    """It is notified after the last stored record, with no record and with as many as come in several batches."""
    key = request.node.name
    for stored in (0, 2000):
        for number in range(stored):
            await feed.append(key, record(number))
        if stored:
            await feed.sync(key, record(stored))
        numbers: list[int] = []
        had: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def take(item: internal_pb2.FeedRecord, numbers: list[int] = numbers) -> None:
            numbers.append(item.tokens_made.offset)

        def caught_up(numbers: list[int] = numbers, had: "asyncio.Future[int]" = had) -> None:
            if not had.done():
                had.set_result(len(numbers))

        reading = asyncio.create_task(feed.read(key, take, caught_up))
        async with asyncio.timeout(20):
            assert await had == (stored + 1 if stored else 0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def test_a_reader_catches_up_although_what_is_stored_goes_meanwhile(
    feed: Feed, request: pytest.FixtureRequest
) -> None:
    """As by a limit of the stream: records that were counted as its reading began are never sent."""
    key = request.node.name
    large = record(0)
    large.tokens_made.text = "x" * 500_000
    stored = 0
    while stored < 40:
        stored += await feed.sync(key, large)
    removing: list[asyncio.Task[bool]] = []
    caught_up = asyncio.Event()

    def take(_: internal_pb2.FeedRecord) -> None:
        if not removing:
            removing.append(asyncio.create_task(feed.remove(key)))

    reading = asyncio.create_task(feed.read(key, take, caught_up.set))
    async with asyncio.timeout(20):
        await caught_up.wait()
    assert await removing[0]
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


async def test_jobs_do_not_mix(feed: Feed, request: pytest.FixtureRequest) -> None:
    key = request.node.name
    await feed.append(f"{key}-one", record(1))
    await feed.append(f"{key}-two", record(2))
    assert await read(feed, f"{key}-one", 1) == [1]
    assert await read(feed, f"{key}-two", 1) == [2]


async def test_a_key_is_any_text(feed: Feed, request: pytest.FixtureRequest) -> None:
    """A key may even contain characters that have a meaning in NATS subjects."""
    keys = [f"{request.node.name} {key}" for key in ("a", "a.b", "a b", "*", ">", "a/b", "a%2Eb", "é🙂", ".")]
    for number, key in enumerate(keys):
        assert await feed.sync(key, record(number))
    await feed.remove(keys[3])
    await feed.sync(keys[3], record(100))
    assert [await read(feed, key, 1) for key in keys] == [[0], [1], [2], [100], [4], [5], [6], [7], [8]]


async def test_a_removed_job_is_forgotten(feed: Feed, request: pytest.FixtureRequest) -> None:
    key = request.node.name
    await feed.sync(key, record(1))
    await feed.remove(key)
    await feed.append(key, record(2))
    assert await read(feed, key, 1) == [2]


async def test_a_reader_goes_on_after_a_removal(feed: Feed, request: pytest.FixtureRequest) -> None:
    key = request.node.name
    for number in range(3):
        await feed.sync(key, record(number))
    follower = Follower(feed, key)
    await follower.until(2)
    await feed.remove(key)
    await feed.sync(key, record(3))
    assert await follower.until(3) == [0, 1, 2, 3]
    await follower.close()


@pytest.mark.parametrize("kind", [ArithmeticError, TimeoutError])
async def test_what_a_reader_raises_ends_its_reading(
    feed: Feed, request: pytest.FixtureRequest, kind: type[Exception]
) -> None:
    """It ends no other reader. It ends the reading even where the same error of a broker would not."""
    key = request.node.name

    def take(item: internal_pb2.FeedRecord) -> None:
        raise kind(item.tokens_made.text)

    for number in range(2):
        await feed.sync(key, record(number))
    async with asyncio.timeout(60):
        with pytest.raises(kind, match="0"):
            await feed.read(key, take)
    assert await read(feed, key, 2) == [0, 1]


async def test_a_message_of_somebody_else_changes_nothing(broker: Stack, request: pytest.FixtureRequest) -> None:
    """Whoever knows a reader's inbox can send to it. The reader gets each record once, and others are not disturbed."""
    feed, key = await nats_feed(broker), request.node.name
    await feed.wait_ready()
    readers = [Follower(feed, key), Follower(feed, f"{key}-other")]
    for of, reader in zip((key, f"{key}-other"), readers, strict=True):
        await feed.append(of, record(0))
        await reader.until(0)
    client = await nats.connect(f"nats://{broker.address('nats')}")
    consumers = await client.jetstream().consumers_info("LLM_FEED")
    (inbox,) = (
        one.config.deliver_subject or "" for one in consumers if (one.config.filter_subject or "").endswith(key)
    )
    for reply in ("not.of.jetstream", "", "$JS.ACK.LLM_FEED.c.1.9.9.9.0"):
        await client.publish(inbox, b"not a record", reply=reply)
    await client.flush()
    for of, reader in zip((key, f"{key}-other"), readers, strict=True):
        assert await feed.sync(of, record(1))
        assert await reader.until(1) == [0, 1]
        await reader.close()
    await client.close()
    await feed.close()


async def test_a_feed_closes_at_any_moment_of_its_start(broker: Stack) -> None:
    """One of the moments is that of the broker's answer, in which a cancellation can be lost."""
    for moment in range(300):
        feed = await nats_feed(broker)
        for _ in range(moment // 10):
            await asyncio.sleep(0)
        async with asyncio.timeout(60):
            await feed.close()


@pytest.fixture
async def own_broker(tmp_path: Path) -> AsyncIterator[Stack]:
    """Run a broker that the test may break."""
    async with Stack(stack_settings(tmp_path), only=("nats",)) as stack:
        yield stack


@pytest.fixture
async def own_feed(own_broker: Stack) -> AsyncIterator[NatsFeed]:
    feed = await nats_feed(own_broker)
    await feed.wait_ready()
    yield feed
    await feed.close()


async def until_stored(feed: Feed, key: str, number: int) -> None:
    """Return once the feed is connected again and has stored the record. Nothing notifies of the connection."""
    async with asyncio.timeout(60):
        while not await feed.sync(key, record(number)):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_a_feed_without_a_broker_loses_records_and_nothing_else(own_broker: Stack) -> None:
    """Append and sync return early while the broker is unavailable, and work later. `recoveries` reports the loss."""
    await own_broker.processes["nats"].kill()
    feed = await nats_feed(own_broker)
    async with asyncio.timeout(20):
        await feed.append("job", record(1))
        assert not await feed.sync("job", record(2))
        await feed.remove("job")
    assert feed.recoveries == 0
    await own_broker.processes["nats"].start()
    async with asyncio.timeout(60):
        await feed.wait_ready()
    await feed.append("job", record(3))
    await feed.append("job", record(4))
    assert feed.recoveries == 1
    assert await read(feed, "job", 2) == [3, 4]
    await feed.close()


async def test_readers_and_records_survive_the_broker(own_broker: Stack, own_feed: NatsFeed) -> None:
    """After SIGKILL a reader continues with each record once and in order. A late reader gets the whole log."""
    follower = Follower(own_feed, "job")
    for number in range(100):
        assert await own_feed.sync("job", record(number))
    await follower.until(99)
    for round_ in range(2):
        await own_broker.processes["nats"].kill()
        await own_broker.processes["nats"].start()
        await until_stored(own_feed, "job", 100 + round_)
    assert await follower.until(101) == list(range(102))
    assert await read(own_feed, "job", 102) == list(range(102))
    await follower.close()


async def test_a_store_that_is_lost_is_made_anew(own_broker: Stack, own_feed: NatsFeed) -> None:
    """Readers continue with the new store's records, although it numbers them from the start again."""
    follower = Follower(own_feed, "job")
    for number in range(10):
        assert await own_feed.sync("job", record(number))
    await follower.until(9)
    await own_broker.processes["nats"].kill()
    shutil.rmtree(own_broker.state_dir / "nats")
    await own_broker.processes["nats"].start()
    for number in range(10, 13):
        await until_stored(own_feed, "job", number)
    assert await follower.until(12) == list(range(13))
    assert await read(own_feed, "job", 3) == [10, 11, 12]
    await follower.close()


# nats-py leaves the sockets of refused connections to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_broker_that_ends_the_connection_is_tried_again(own_broker: Stack, tmp_path: Path) -> None:
    """The broker's credentials change and change back, after which nats-py has closed its client for good."""
    broker, config = own_broker.processes["nats"], tmp_path / "nats.conf"
    config.write_text("")
    broker.command = (*broker.command, "-c", str(config))
    await broker.kill()
    await broker.start()
    await broker.wait_ready()
    feed = await nats_feed(own_broker)
    follower = Follower(feed, "job")
    await until_stored(feed, "job", 0)
    await follower.until(0)
    config.write_text("authorization { user: another, password: word }")
    broker.signal(signal.SIGHUP)
    async with asyncio.timeout(60):
        while "authentication error" not in broker.log:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    config.write_text("")
    broker.signal(signal.SIGHUP)
    await until_stored(feed, "job", 1)
    assert await follower.until(1) == [0, 1]
    await follower.close()
    await feed.close()


async def test_a_stream_that_an_operator_deletes_is_made_anew(own_broker: Stack, own_feed: NatsFeed) -> None:
    follower = Follower(own_feed, "job")
    assert await own_feed.sync("job", record(0))
    await follower.until(0)
    async with jetstream(own_broker) as stream:
        await stream.delete_stream(FeedSettings().stream)
    await until_stored(own_feed, "job", 1)
    assert await follower.until(1) == [0, 1]
    await follower.close()


async def test_a_feed_knows_whether_its_broker_stores(own_broker: Stack, own_feed: NatsFeed) -> None:
    """A broker may stay connected and store nothing, as after its disk was full. Here the records are too large."""
    settings, readiness = FeedSettings(), Readiness("test")
    want_feed(readiness, own_feed, "watchers see less")

    async def degraded() -> dict[str, str]:
        found: dict[str, str] = (await asyncio.to_thread(readiness.readyz))["degraded"]
        return found

    async with jetstream(own_broker) as stream:
        config = (await stream.stream_info(settings.stream)).config
        config.max_msg_size = 1
        await stream.update_stream(config)
        assert await degraded() == {}
        assert not await own_feed.sync("job", record(0))
        assert (own_feed.storing, own_feed.available) == (False, True)
        assert await degraded() == {"feed": "is connected and stores nothing: watchers see less"}
        config.max_msg_size = -1
        await stream.update_stream(config)
    assert await own_feed.sync("job", record(1))
    assert await degraded() == {}


async def test_a_feed_of_a_broker_that_has_started_again_is_expected_to_store(
    own_broker: Stack, own_feed: NatsFeed
) -> None:
    own_broker.processes["nats"].signal(signal.SIGSTOP)
    until_stopped(own_broker.processes["nats"].pid)
    assert not await own_feed.sync("job", record(0))
    assert not own_feed.storing
    await own_broker.processes["nats"].kill()
    async with asyncio.timeout(60):
        while own_feed.available:  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.05)
    assert own_feed.storing


async def test_a_broker_that_hangs_holds_nobody_up(own_broker: Stack, own_feed: NatsFeed) -> None:
    """Append returns immediately and buffers a few MiB. Further records are lost, and `recoveries` reports the loss."""
    follower = Follower(own_feed, "job")
    own_broker.processes["nats"].signal(signal.SIGSTOP)
    big = internal_pb2.FeedRecord(writer="w", tokens_made=internal_pb2.TokensMade(text="x" * 100_000))
    since = time.monotonic()
    for number in range(200):
        big.tokens_made.offset = number
        await own_feed.append("job", big)
        # Let the client send what it can, as between two tokens.
        await asyncio.sleep(0)
    # An append that waited for the broker would take seconds.
    assert time.monotonic() - since < 20
    assert own_feed.recoveries == 0
    own_broker.processes["nats"].signal(signal.SIGCONT)
    await until_stored(own_feed, "job", 1000)
    await own_feed.append("job", record(1001))
    assert own_feed.recoveries == 1
    *numbers, last, after = await follower.until(1001)
    # The feed buffers up to 4 MiB, in addition to the sockets' buffers.
    assert numbers == list(range(len(numbers)))
    assert 40 < len(numbers) < 150
    assert (last, after) == (1000, 1001)
    await follower.close()


async def test_changed_limits_are_taken_over(own_broker: Stack, own_feed: NatsFeed) -> None:
    """The next process that starts with new limits sets them on the stream. The records stay."""
    assert await own_feed.sync("job", record(0))
    address = f"nats://{own_broker.address('nats')}"
    limits = {"max_age": timedelta(hours=1), "max_bytes": 1 << 20, "max_readers": 2000}
    other = NatsFeed(FeedSettings(url=SecretStr(address), **limits))
    other.start()
    async with asyncio.timeout(60):
        await other.wait_ready()
    assert await read(other, "job", 1) == [0]
    async with jetstream(own_broker) as stream:
        config = (await stream.stream_info(FeedSettings().stream)).config
    assert (config.max_age, config.max_bytes, config.max_consumers) == (3600, 1 << 20, 2000)
    await other.close()


async def test_more_jobs_are_watched_than_nats_expects_of_a_stream(own_feed: NatsFeed) -> None:
    """By itself nats-server gives a stream 1,000 consumers."""
    jobs, begun = 1050, asyncio.Semaphore(0)
    reading = [asyncio.create_task(own_feed.read(f"{job}", lambda _: True, begun.release)) for job in range(jobs)]
    async with asyncio.timeout(120):
        for _ in range(jobs):
            await begun.acquire()
        for job in (0, jobs - 1):
            assert await own_feed.sync(f"{job}", record(0))
            await reading[job]
    for task in reading:
        task.cancel()
    await asyncio.gather(*reading, return_exceptions=True)


async def test_an_encrypted_feed_reads_records_in_clear_and_of_several_keys(tmp_path: Path) -> None:
    """The keys are not in the reader's memory, and come one after the other, each record once and in order."""
    keys, store = Keys(tmp_path), MemoryFeed()
    months = [datetime(2026, month, 15, tzinfo=UTC) for month in (1, 2, 3)]
    await store.append("job", record(0))
    for number, month in enumerate(months, 1):
        writer = EncryptedFeed(store, Encryption(keys.data_keys(lambda month=month: month)))  # type: ignore[misc]
        for offset in (2 * number - 1, 2 * number):
            # It waits for the key only so long.
            while not await writer.sync("job", record(offset)):
                pass
    assert await read(EncryptedFeed(store, keys.encryption()), "job", 7) == list(range(7))


async def test_an_encrypted_feed_leaves_out_what_cannot_be_read_any_more(tmp_path: Path) -> None:
    """Records of a deleted key, and those of another job put in their place: a gap, for which Temporal is asked."""
    keys, store = Keys(tmp_path), MemoryFeed()
    january = Encryption(keys.data_keys(lambda: datetime(2026, 1, 15, tzinfo=UTC)))
    await EncryptedFeed(store, january).append("job", record(0))
    keys.store.delete("")
    feed = EncryptedFeed(store, keys.encryption())
    await feed.append("job", record(1))
    await feed.append("other", record(2))
    forged: list[internal_pb2.FeedRecord] = []
    await store.read("other", lambda item: not forged.append(item))
    await store.append("job", forged[0])
    await feed.append("job", record(3))
    assert await read(feed, "job", 2) == [1, 3]


async def test_an_encrypted_feed_without_its_keys_loses_records_and_says_so(tmp_path: Path) -> None:
    keys, store = Keys(tmp_path), MemoryFeed()
    feed, ring = EncryptedFeed(store, keys.encryption()), keys.ring
    keys.ring = ""
    await feed.append("job", record(0))
    assert not await feed.sync("job", record(1))
    assert (feed.available, feed.recoveries) == (False, 0)
    keys.ring = ring
    async with asyncio.timeout(60):
        while not await feed.sync("job", record(2)):  # noqa: ASYNC110  # the keys are asked for again
            await asyncio.sleep(0.1)
    assert (feed.available, feed.recoveries) == (True, 1)
    assert await read(feed, "job", 1) == [2]
