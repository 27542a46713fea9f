"""The log of a chunk in the live feed: what its items have generated, for the attempt that goes on.

One log for all items costs one record for all their tokens of a tenth of a second, and the next attempt reads it once.
It has the fence of a job's: an attempt that Temporal has given up writes in vain.
"""

import asyncio
import logging
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Final

from feed.feed import Feed, Fence, RecordHandler, ignore
from llm_pb import internal_pb2
from services.gpu_worker.batch.losses import Losses, losses_of
from services.gpu_worker.batch.retries import rest_of_wait

_log = logging.getLogger(__name__)
_TAKEOVER_PAUSES: Final = (0, 1, 2, 4, 8)
"""Seconds before each try to take the log over. A worker may get work before it has the feed, on a busy machine."""
_SILENCE_SECONDS: Final = 10
"""Maximum wait for the next record of a log that holds more."""
_MAX_RECORD_BYTES: Final = 512 * 1024
"""Size beyond which a record of the log is not made larger. A broker accepts a megabyte."""
_MAX_UNNEEDED_BYTES: Final = 4 * 1024 * 1024
"""Maximum size of the records of ended items in a log. A larger log is rewritten without them."""


class ChunkLog:
    """One attempt's log of a chunk."""

    def __init__(self, feed: Feed, key: str, attempt: int, worker: str) -> None:
        """`attempt` is the number of the attempt, higher than that of each earlier one."""
        self.name: Final = uuid.uuid4().hex
        self._feed = feed
        self._key = key
        started = internal_pb2.AttemptStarted(attempt=attempt, worker=worker)
        started.start_time.GetCurrentTime()
        self._takeover = internal_pb2.FeedRecord(writer=self.name, attempt_started=started)
        self._begun = False
        self._recoveries = feed.recoveries
        self._renewals = 0
        self._pending: list[internal_pb2.ItemRecord] = []
        self._earlier: dict[int, list[internal_pb2.FeedRecord]] = {}
        self._engine_times: dict[int, timedelta] = {}
        self._waiting: dict[int, ItemLog] = {}
        self._needed_bytes = 0
        self._bytes = 0
        self._flushing = asyncio.Lock()

    @property
    def recoveries(self) -> int:
        """Changes whenever items have to write their outputs again."""
        return self._feed.recoveries + self._renewals

    async def take_over(self, wanted: Collection[int]) -> None:
        """Take the log over from earlier attempts, with what it holds of the items that are wanted.

        Nothing is known of them if the feed is away.
        """
        for pause in _TAKEOVER_PAUSES:
            await asyncio.sleep(pause)
            if await self._feed.sync(self._key, self._takeover):
                self._begun = True
                self._earlier = await self._read(wanted)
                return

    def losses(self, place: int) -> Losses:
        """Return the losses of an item whose log was not asked for yet."""
        return losses_of(self._earlier.get(place, ()))

    def rest_of_wait(self, place: int) -> timedelta:
        """Return how long an item still has to wait whose log was not asked for yet. 0: it need not wait."""
        return rest_of_wait(self._earlier.get(place, ()), datetime.now(UTC))

    def item(self, place: int) -> "ItemLog":
        """Return the log of an item, with what earlier attempts have written. Call it once for each item."""
        return ItemLog(self, place, self._earlier.pop(place, []), self._engine_times.pop(place, timedelta()))

    def add(self, place: int, record: internal_pb2.FeedRecord, engine_time: timedelta) -> int:
        """Add a record of an item, to be written with the next flush, and return its size in bytes."""
        added = _item_record(place, record, engine_time)
        self._pending.append(added)
        size = added.ByteSize()
        self._needed_bytes += size
        return size

    def forget(self, size: int) -> None:
        """Note that so many bytes of the log are of no use, because their item is durable."""
        self._needed_bytes -= size

    async def flush(self) -> None:
        """Write what was added. Never raises."""
        async with self._flushing:
            if self._pending:
                await self._flush()

    async def _flush(self) -> None:
        if self._feed.recoveries != self._recoveries:
            # The record of the takeover may be among those that were lost. The items repeat theirs.
            self._recoveries, self._begun = self._feed.recoveries, False
        elif self._bytes > _MAX_UNNEEDED_BYTES + 2 * self._needed_bytes and await self._feed.remove(self._key):
            self._renewals, self._begun, self._bytes = self._renewals + 1, False, 0
            self._repeat_idle()
        if not self._begun:
            self._begun = True
            await self._feed.append(self._key, self._takeover)
        pending, self._pending = self._pending, []
        group, size = internal_pb2.ItemRecords(), 0
        for record in pending:
            more = record.ByteSize()
            if size and size + more > _MAX_RECORD_BYTES:
                await self._write(group, size)
                group, size = internal_pb2.ItemRecords(), 0
            group.records.append(record)
            size += more
        await self._write(group, size)

    @contextmanager
    def waiting(self, place: int, log: "ItemLog") -> Iterator[None]:
        """Keep what the log holds of an item that writes nothing while the context is open."""
        self._waiting[place] = log
        try:
            yield
        finally:
            del self._waiting[place]

    def _repeat_idle(self) -> None:
        """Have what the removed log held of items that do not run written again. Those that run repeat theirs."""
        repeated = [
            _item_record(place, record, self._engine_times.get(place, timedelta()))
            for place, records in self._earlier.items()
            for record in records
        ]
        for log in self._waiting.values():
            repeated += log.repeated()
        places = {record.item for record in repeated}
        self._pending = repeated + [record for record in self._pending if record.item not in places]
        # No log is written anew because of them.
        self._bytes -= sum(record.ByteSize() for record in repeated)

    async def remove(self) -> None:
        """Remove the log, because all that it holds is durable or of no use."""
        self._pending.clear()
        if self._begun:
            await self._feed.remove(self._key)

    async def _write(self, records: internal_pb2.ItemRecords, size: int) -> None:
        self._bytes += size
        await self._feed.append(self._key, internal_pb2.FeedRecord(writer=self.name, item_records=records))

    async def _read(self, wanted: Collection[int]) -> dict[int, list[internal_pb2.FeedRecord]]:
        """Return what each of the items has written before this attempt's takeover, which is stored."""
        fence, found = Fence(), defaultdict(list)
        try:
            async with asyncio.timeout(_SILENCE_SECONDS) as silence:

                def on_record(record: internal_pb2.FeedRecord) -> bool:
                    silence.reschedule(asyncio.get_running_loop().time() + _SILENCE_SECONDS)
                    if record.writer == self.name:
                        return True
                    if fence.admits(record):
                        for part in record.item_records.records:
                            if part.item in wanted:
                                found[part.item].append(part.record)
                                self._engine_times[part.item] = part.engine_time.ToTimedelta()
                    return False

                await self._feed.read(self._key, on_record)
        except TimeoutError:
            _log.warning("the log of %s could not be read", self._key)
            return {}
        return dict(found)


class ItemLog:
    """A Feed that holds one item's records, in memory and in the log of its chunk.

    The log's takeover is that of all items, so an item waits for nothing: what its earlier attempts have written is
    here.
    """

    def __init__(
        self, log: ChunkLog, place: int, earlier: list[internal_pb2.FeedRecord], engine_time: timedelta
    ) -> None:
        """`engine_time` is that of earlier attempts."""
        self.engine_time: Callable[[], timedelta] = lambda: engine_time
        """Returns for how long engines have generated for the item, in all attempts."""
        self._log = log
        self._place = place
        self._records = earlier
        self._bytes = 0

    @property
    def is_new(self) -> bool:
        """Whether no attempt at the item has written anything."""
        return not self._records

    @property
    def recoveries(self) -> int:
        """See Feed."""
        return self._log.recoveries

    @property
    def available(self) -> bool:
        """See Feed."""
        return True

    def of_tenant(self, tenant: str) -> "ItemLog":
        """See Feed."""
        return self

    async def append(self, key: str, record: internal_pb2.FeedRecord) -> None:
        """See Feed."""
        self._records.append(record)
        self._bytes += self._log.add(self._place, record, self.engine_time())
        if record.HasField("engine_began"):
            # Those that begin in the same moment share a record of the log. It is under way before the engine begins.
            await asyncio.sleep(0)
            await self._log.flush()
            await asyncio.sleep(0)

    async def sync(self, key: str, record: internal_pb2.FeedRecord) -> bool:
        """See Feed. The record is stored with the next flush of the chunk's log."""
        await self.append(key, record)
        return True

    async def read(self, key: str, on_record: RecordHandler, caught_up: Callable[[], None] = ignore) -> None:
        """See Feed. Ends after the last record."""
        for record in [*self._records]:
            if on_record(record):
                break

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Keep what the chunk's log holds of the item, which writes nothing while the context is open."""
        with self._log.waiting(self._place, self):
            yield

    def repeated(self) -> list[internal_pb2.ItemRecord]:
        """Return all records of the item, for a log that is written anew."""
        return [_item_record(self._place, record, self.engine_time()) for record in self._records]

    def forget(self) -> None:
        """Note that the item is durable. What it has written is removed with the log."""
        self._records.clear()
        self._log.forget(self._bytes)
        self._bytes = 0

    async def remove(self, key: str) -> bool:
        """Do nothing: the log of all items is removed at once."""
        return False

    async def close(self) -> None:
        """See Feed."""


def _item_record(place: int, record: internal_pb2.FeedRecord, engine_time: timedelta) -> internal_pb2.ItemRecord:
    made = internal_pb2.ItemRecord(item=place, record=record)
    if engine_time:
        made.engine_time.FromTimedelta(engine_time)
    return made
