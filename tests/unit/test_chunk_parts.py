"""The parts of RunBatchChunk on their own: its segments, its log, its seats."""

from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path

import pytest

from batches.chunk import Chunk
from batches.segment_writer import MAX_SEGMENTS, SegmentWriter
from batches.segments import read_segment
from feed.memory import MemoryFeed
from jobs.batches import done_count
from jobs.errors import EngineDead, EngineFailed, JobError, to_status
from llm_pb import batch_pb2, common_pb2, internal_pb2, llm_pb2
from services.gpu_worker.batch import chunk_log
from services.gpu_worker.batch.chunk_log import ChunkLog
from services.gpu_worker.batch.losses import Losses, losses_of
from services.gpu_worker.batch.retries import rest_of_wait
from services.gpu_worker.seats import Demand, Seats
from store.objects import ObjectStore, open_objects
from store.settings import StoreSettings
from store.store import StoredObject

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
REQUEST = internal_pb2.ChunkRequest(batch_id="llmbatch-u-r", count=128)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_objects(StoreSettings(url=(tmp_path / "store").as_uri()))


def item(index: int, size: int = 10) -> batch_pb2.BatchItem:
    return batch_pb2.BatchItem(
        index=index, state=llm_pb2.JOB_STATE_SUCCEEDED, result=llm_pb2.JobResult(output="x" * size)
    )


async def indexes(store: ObjectStore, refs: list[common_pb2.FileRef]) -> list[int]:
    found: list[int] = []
    for ref in refs:
        data = b"".join([piece async for piece in store.read(StoredObject(ref.file_id, ref.size_bytes))])
        of_one = [read.index for read in read_segment(BytesIO(data))]
        assert of_one == sorted(of_one)
        found += of_one
    return found


@pytest.mark.parametrize("size", [10, 50_000])
async def test_a_chunk_has_few_segments_and_each_item_once(store: ObjectStore, size: int) -> None:
    """Whatever is written when. The segments of an earlier attempt are among them."""
    writer, written = SegmentWriter(store, REQUEST, []), list[int]()
    for number in range(64):
        if number == 40:
            writer = SegmentWriter(store, REQUEST, writer.refs)
        # In the order in which they end.
        some = [item(index, size) for index in (127 - number, number)]
        before = [*writer.refs]
        refs = await writer.with_items(some)
        # Readers of the last heartbeat still find what it named.
        assert sorted(await indexes(store, before)) == sorted(written)
        writer.keep(refs)
        written += [one.index for one in some]
        assert len(refs) <= MAX_SEGMENTS
    assert sorted(await indexes(store, refs)) == list(range(128))


async def test_a_chunk_counts_each_item_once() -> None:
    chunk = Chunk(REQUEST, internal_pb2.ChunkResult(), 1)
    ref = common_pb2.FileRef(file_id="one", size_bytes=1)
    priced = item(5)
    priced.result.metadata.cost_micros = 7
    priced.result.metadata.output_tokens = 3
    # Shown, and paid by nobody.
    priced.result.metadata.wasted_tokens = 5
    chunk.add([(5, priced), (127, priced)], [ref])
    known = chunk.result(running=4)
    assert (done_count(known), known.usage.output_tokens, known.usage.cost_micros) == (2, 6, 14)
    assert known.usage.wasted_tokens == 10
    assert (known.counts.total, known.counts.succeeded, known.counts.running) == (128, 2, 4)
    again = Chunk(REQUEST, known, 2)
    assert again.todo() == [place for place in range(128) if place not in (5, 127)]
    rest = [(place, item(place)) for place in again.todo()]
    for _, one in rest:
        one.result.metadata.output_tokens = 1
    again.add(rest, [ref])
    assert again.is_done
    # The cost of the others is not known.
    assert not again.usage.HasField("cost_micros")


def record(text: str) -> internal_pb2.FeedRecord:
    return internal_pb2.FeedRecord(writer="item", tokens_made=internal_pb2.TokensMade(text=text))


async def texts(log: ChunkLog, *places: int) -> dict[int, str]:
    """Take a log over and return what it holds of the items."""
    await log.take_over(set(places))
    found: dict[int, str] = {}
    for place in places:
        parts: list[str] = []
        await log.item(place).read("", lambda one, parts=parts: parts.append(one.tokens_made.text))  # type: ignore[misc]
        found[place] = "".join(parts)
    return found


async def test_the_next_attempt_reads_the_log_and_the_last_one_writes_in_vain() -> None:
    feed = MemoryFeed()
    first = ChunkLog(feed, "batch/0", 1, "w")
    one, other = first.item(3), first.item(4)
    for text in ("a", "b"):
        await one.append("", record(text))
        await other.append("", record(text.upper()))
        await first.flush()
    second = ChunkLog(feed, "batch/0", 2, "w")
    assert await texts(second, 3, 9) == {3: "ab", 9: ""}
    await one.append("", record("late"))
    await first.flush()
    await second.item(9).append("", record("c"))
    await second.flush()
    assert await texts(ChunkLog(feed, "batch/0", 3, "w"), 3, 4, 9) == {3: "ab", 4: "AB", 9: "c"}
    # An attempt that was given up before it began.
    await first.flush()
    await second.remove()
    assert await texts(ChunkLog(feed, "batch/0", 4, "w"), 3) == {3: ""}


async def test_the_log_is_taken_over_once_the_feed_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_log, "_TAKEOVER_PAUSES", (0, 0, 0, 0, 0))
    feed = MemoryFeed()
    first = ChunkLog(feed, "batch/0", 1, "w")
    await first.item(3).append("", record("a"))
    await first.flush()
    stored, refused = feed.sync, iter([False] * 4)

    async def sync(key: str, one: internal_pb2.FeedRecord) -> bool:
        return next(refused, True) and await stored(key, one)

    monkeypatch.setattr(feed, "sync", sync)
    assert await texts(ChunkLog(feed, "batch/0", 2, "w"), 3) == {3: "a"}


async def test_a_log_of_ended_items_is_written_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not grow with the chunk. The items that run write theirs again."""
    monkeypatch.setattr(chunk_log, "_MAX_UNNEEDED_BYTES", 10_000)
    feed = MemoryFeed()
    log = ChunkLog(feed, "batch/0", 1, "w")
    running, recoveries = log.item(0), log.recoveries
    await running.append("", record("kept"))
    for place in range(1, 40):
        ended = log.item(place)
        await ended.append("", record("x" * 1000))
        await log.flush()
        ended.forget()
        if log.recoveries != recoveries:
            recoveries = log.recoveries
            await running.append("", record("kept"))
    await log.flush()
    size = 0

    def count(one: internal_pb2.FeedRecord) -> bool:
        nonlocal size
        size += one.ByteSize()
        return one.writer == "end"

    await feed.append("batch/0", internal_pb2.FeedRecord(writer="end"))
    await feed.read("batch/0", count)
    assert size < 15_000
    assert (await texts(ChunkLog(feed, "batch/0", 2, "w"), 0))[0].startswith("kept")


def attempt(number: int, *records: internal_pb2.FeedRecord) -> list[internal_pb2.FeedRecord]:
    """Return the records of an attempt at an item."""
    started = internal_pb2.FeedRecord(attempt_started=internal_pb2.AttemptStarted(attempt=number))
    found = [started, *records]
    for one in found:
        one.writer = str(number)
    return found


def tokens(first: int, count: int) -> internal_pb2.FeedRecord:
    return internal_pb2.FeedRecord(tokens_made=internal_pb2.TokensMade(token_offset=first, token_ids=range(count)))


def end(kind: "llm_pb2.AttemptEnd.ValueType", error: JobError | None = None) -> internal_pb2.FeedRecord:
    ended = llm_pb2.JobAttempt(end=kind)
    if error is not None:
        ended.error.CopyFrom(to_status(error))
    return internal_pb2.FeedRecord(attempt_ended=internal_pb2.AttemptEnded(attempt=ended))


def begun(lost_in_vain: int) -> internal_pb2.FeedRecord:
    return internal_pb2.FeedRecord(engine_began=internal_pb2.EngineBegan(lost_in_vain=lost_in_vain))


BEGUN = internal_pb2.FeedRecord(engine_began=internal_pb2.EngineBegan())
DEAD = end(llm_pb2.ATTEMPT_END_FAILED, EngineDead("it died"))


@pytest.mark.parametrize(
    ("records", "losses"),
    [
        ([], (0, 0)),
        # The engine had not got the item.
        (attempt(1), (0, 0)),
        (attempt(1, BEGUN), (1, 1)),
        (attempt(1, BEGUN, tokens(0, 5)), (1, 0)),
        ([*attempt(1, BEGUN), *attempt(2, BEGUN)], (2, 2)),
        # A repeat of the takeover, after the broker was away.
        (attempt(1, BEGUN, attempt(1)[0]), (1, 1)),
        # The second one starts over and comes as far as the first one, the third one comes further.
        ([*attempt(1, BEGUN, tokens(0, 5)), *attempt(2, BEGUN, tokens(0, 5))], (2, 1)),
        ([*attempt(1, BEGUN, tokens(0, 5)), *attempt(2, BEGUN), *attempt(3, BEGUN, tokens(5, 1))], (3, 0)),
        (attempt(1, BEGUN, DEAD), (1, 1)),
        ([*attempt(1, BEGUN, DEAD), *attempt(2, BEGUN, end(llm_pb2.ATTEMPT_END_HANDED_OVER))], (1, 0)),
        (attempt(1, BEGUN, end(llm_pb2.ATTEMPT_END_FAILED, EngineFailed("it failed"))), (0, 0)),
        ([*attempt(1, begun(0)), *attempt(2, begun(1)), *attempt(3, begun(2))], (3, 3)),
        # The second and the third one could not read the log.
        ([*attempt(1, begun(0)), *attempt(2, begun(0)), *attempt(3, begun(0)), *attempt(4, begun(1))], (4, 2)),
    ],
)
def test_the_losses_of_an_item_are_those_that_it_may_be_to_blame_for(
    records: list[internal_pb2.FeedRecord], losses: tuple[int, int]
) -> None:
    assert losses_of(records) == Losses(*losses)


def failed(seconds: float | None, ago: float, writer: str = "1") -> internal_pb2.FeedRecord:
    """Return the record of an attempt that ended so many seconds ago, with its wait for the next one."""
    one = end(llm_pb2.ATTEMPT_END_FAILED, EngineFailed("it failed"))
    one.writer = writer
    one.attempt_ended.attempt.end_time.FromDatetime(NOW - timedelta(seconds=ago))
    if seconds is not None:
        one.attempt_ended.retry_after.FromTimedelta(timedelta(seconds=seconds))
    return one


@pytest.mark.parametrize(
    ("records", "seconds"),
    [
        ([], 0),
        ([*attempt(1), failed(60, 10)], 50),
        ([*attempt(1), failed(60, 70)], 0),
        # The worker that has written it is of an earlier version.
        ([*attempt(1), failed(None, 10)], 0),
        # The next attempt has begun.
        ([*attempt(1), failed(60, 10), *attempt(2)], 0),
        ([*attempt(1), failed(60, 30), *attempt(2), failed(60, 10, "2")], 50),
        # A repeat of the takeover, after the broker was away.
        ([*attempt(1), failed(60, 10), *attempt(1)], 50),
        # The clock of the worker that has written it is a day ahead.
        ([*attempt(1), failed(60, -86_400)], 60),
        ([*attempt(1), failed(86_400, 0)], 3600),
        ([*attempt(1), failed(86_400, -86_400)], 3600),
    ],
)
def test_an_item_waits_for_the_rest_of_what_its_log_says(
    records: list[internal_pb2.FeedRecord], seconds: float
) -> None:
    assert rest_of_wait(records, NOW) == timedelta(seconds=seconds)


async def test_a_log_that_is_written_anew_keeps_the_items_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits here, and one that has waited at an earlier worker and has no room yet."""
    monkeypatch.setattr(chunk_log, "_MAX_UNNEEDED_BYTES", 10_000)
    feed, now = MemoryFeed(), datetime.now(UTC)
    waiting = [*attempt(1, tokens(0, 3)), failed(600, (NOW - now).total_seconds())]
    first = ChunkLog(feed, "batch/0", 1, "w")
    for place in (0, 1):
        log = first.item(place)
        for one in waiting:
            await log.append("", one)
    await first.flush()
    second = ChunkLog(feed, "batch/0", 2, "w")
    await second.take_over({0, 1})
    recoveries = second.recoveries
    with second.item(0).waiting():
        for place in range(2, 20):
            ended = second.item(place)
            await ended.append("", record("x" * 1000))
            await second.flush()
            ended.forget()
        assert second.recoveries == recoveries + 1
    third = ChunkLog(feed, "batch/0", 3, "w")
    await third.take_over({0, 1})
    for place in (0, 1):
        assert third.rest_of_wait(place) > timedelta(minutes=5)
        found: list[internal_pb2.FeedRecord] = []
        await third.item(place).read("", found.append)
        assert found == waiting


async def test_a_worker_takes_no_more_chunks_than_it_has_seats_for() -> None:
    seats = Seats(16, 1)
    assert seats.slots(background=True) == 16
    demand = Demand()
    demand.items = 16
    with seats.chunk(demand):
        # The chunk itself is one of them.
        assert seats.slots(background=True) == 1
        # Interactive jobs come nevertheless.
        assert seats.slots(background=False) == 16
        demand.items = 6
        assert seats.slots(background=True) == 11
    assert seats.slots(background=True) == 16
