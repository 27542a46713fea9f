"""The live feed inside one process: for tests, and for a gateway and worker that run in one."""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import Self

from feed.feed import RecordHandler, ignore
from llm_pb import internal_pb2


class MemoryFeed:
    """A Feed whose records live as long as the process."""

    recoveries = 0
    """See Feed. This one never loses a record."""
    available = True
    """See Feed."""

    def __init__(self) -> None:
        self._logs: defaultdict[str, list[internal_pb2.FeedRecord]] = defaultdict(list)
        self._grown = asyncio.Condition()

    def of_tenant(self, tenant: str) -> Self:  # one key is one job's, whoever its tenant is
        """See Feed."""
        return self

    async def append(self, key: str, record: internal_pb2.FeedRecord) -> None:
        """See Feed."""
        copy = internal_pb2.FeedRecord()
        copy.CopyFrom(record)
        async with self._grown:
            self._logs[key].append(copy)
            self._grown.notify_all()

    async def sync(self, key: str, record: internal_pb2.FeedRecord) -> bool:
        """See Feed."""
        await self.append(key, record)
        return True

    async def read(self, key: str, on_record: RecordHandler, caught_up: Callable[[], None] = ignore) -> None:
        """See Feed."""
        log, position = self._logs[key], 0
        while True:
            if len(log) <= position:
                caught_up()
            async with self._grown:
                while log is self._logs[key] and len(log) <= position:
                    await self._grown.wait()
                if log is not self._logs[key]:
                    log, position = self._logs[key], 0
                records = log[position:]
            position += len(records)
            if any(on_record(record) for record in records):
                return

    async def remove(self, key: str) -> bool:
        """See Feed."""
        self._logs.pop(key, None)
        return True

    async def close(self) -> None:
        """See Feed."""
