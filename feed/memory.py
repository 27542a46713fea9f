"""The live feed inside one process: for tests, and for a gateway and worker that run in one."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple, Self

from feed.answers import CLAIM_SECONDS, Entry
from feed.feed import RecordHandler, ignore
from llm_pb import internal_pb2


class MemoryFeed:
    """A Feed whose records live as long as the process."""

    recoveries = 0
    """See Feed. This one never loses a record."""
    available = True
    """See Feed."""
    storing = True
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


class _Timed(NamedTuple):
    turn: int
    data: bytes
    until: float


class MemoryAnswers:
    """An AnswerStore whose entries live as long as the process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns seconds."""
        self._clock = clock
        self._turns = 0
        self._claims: dict[str, _Timed] = {}
        self._answers: dict[tuple[str, str], _Timed] = {}

    async def find(self, key: str) -> Entry:
        """See AnswerStore."""
        now, claim = self._clock(), self._claim(key)
        answers = [timed for (at, _), timed in self._answers.items() if at == key and timed.until > now]
        last = max(answers, default=None)
        return Entry(last and last.data, claim is not None and bool(claim.data), claim.turn if claim else 0)

    async def claim(self, key: str, turn: int) -> int | None:
        """See AnswerStore."""
        return self._set_claim(key, turn, b"claimed", CLAIM_SECONDS)

    async def release(self, key: str, turn: int) -> None:
        """See AnswerStore."""
        self._set_claim(key, turn, b"", 1)

    async def put(self, key: str, job_id: str, data: bytes, ttl: timedelta) -> None:
        """See AnswerStore."""
        self._turns += 1
        self._answers[key, job_id] = _Timed(self._turns, data, self._clock() + ttl.total_seconds())

    async def forget(self, job_id: str) -> bool:
        """See AnswerStore."""
        self._answers = {place: timed for place, timed in self._answers.items() if place[1] != job_id}
        return True

    def _claim(self, key: str) -> _Timed | None:
        claim = self._claims.get(key)
        return claim if claim is not None and claim.until > self._clock() else None

    def _set_claim(self, key: str, turn: int, data: bytes, seconds: float) -> int | None:
        claim = self._claim(key)
        if turn != (claim.turn if claim else 0):
            return None
        self._turns += 1
        self._claims[key] = _Timed(self._turns, data, self._clock() + seconds)
        return self._turns
