"""One attempt at an item of a batch: an attempt at a job whose output is published in larger pieces, for no watcher."""

import asyncio
from dataclasses import replace
from typing import Any, Final

from jobs.errors import Cancelled, JobError, WorkerLost
from jobs.stages import PAUSED, PREFILL
from llm_pb import internal_pb2, llm_pb2
from services.gpu_worker.attempt import Attempt
from services.gpu_worker.batch.losses import Losses, has_lost_engine
from services.gpu_worker.engines.engine import Engine, Generation
from services.gpu_worker.seats import Seat

LOG_SECONDS: Final = 0.1
"""Time for which tokens are held back. So much of an output is generated again after a kill, three times that at most:
they wait in the engine, in the attempt and in the log."""
_FEW_TOKENS: Final = 4
"""Number of tokens that a slow engine joins all the same, if they take at most a second."""


class Pace:
    """How fast a worker's engine generates for one item, by the last item that has ended."""

    def __init__(self) -> None:
        self._tokens_per_second = 0.0

    def note(self, metadata: llm_pb2.ResultMetadata) -> None:
        """Note what the engine has generated for an item."""
        if seconds := metadata.engine_time.ToTimedelta().total_seconds():
            self._tokens_per_second = metadata.output_tokens / seconds

    @property
    def held_back(self) -> int:
        """Number of tokens of an item that come while its output is held back, or a few; at least 1."""
        return max(int(self._tokens_per_second * LOG_SECONDS), min(int(self._tokens_per_second), _FEW_TOKENS), 1)


class ItemAttempt(Attempt):
    """See Attempt. The text and the tokens of a tenth of a second become one record."""

    def __init__(self, *arguments: Any, losses: Losses, pace: Pace) -> None:
        super().__init__(*arguments)
        self._losses = losses
        self._pace = pace

    def generation(self, tenant: str = "") -> Generation:
        """See Attempt. Tokens that would be held back come together, which costs engine and worker less."""
        return replace(super().generation(tenant), stream_interval=self._pace.held_back)

    async def start(self, *, first: bool) -> bool:
        """See Attempt. Raises WorkerLost for an item that too many workers were lost with."""
        continues = await super().start(first=first)
        if self._losses.are_too_many:
            raise WorkerLost(f"{self._losses.total} workers that ran the item were lost")
        return continues

    async def read_back(self) -> None:
        """Take the output of earlier attempts, for an item that ends before this one has begun."""
        await self._writer.read_back()

    async def enter(self, stage: str) -> None:
        """See Attempt. The log knows of an item before the engine has it, because it may kill the worker."""
        await super().enter(stage)
        if stage == PREFILL:
            began = internal_pb2.EngineBegan(lost_in_vain=self._losses.in_vain)
            await self._writer.write(internal_pb2.FeedRecord(engine_began=began))

    @property
    def failures(self) -> int:
        """Number of attempts that have failed, this one included. The item is not to blame for a lost engine."""
        failed = (llm_pb2.ATTEMPT_END_FAILED, llm_pb2.ATTEMPT_END_TIMED_OUT)
        return sum(attempt.end in failed and not has_lost_engine(attempt) for attempt in self.output.attempts)

    def item_result(
        self, engine: Engine, error: JobError | None, reason: "llm_pb2.FinishReason.ValueType | None"
    ) -> llm_pb2.JobResult:
        """Return the result of the item. Its attempts are numbered by the item, not by its chunk."""
        if reason is None:
            cancelled = isinstance(error, Cancelled)
            reason = llm_pb2.FINISH_REASON_CANCELLED if cancelled else llm_pb2.FINISH_REASON_ERROR
        result = self.result(engine, reason)
        for number, attempt in enumerate(result.attempts, 1):
            attempt.attempt = number
        result.metadata.attempts = len(result.attempts)
        return result

    async def _publish_progress(self) -> None:
        """Do nothing: the batch's progress is that of its items."""


class ItemWaits:
    """The waits of an item for its seat. They have no end of their own: see ChunkRun."""

    def __init__(self, attempt: ItemAttempt, seat: Seat, limit: asyncio.Timeout) -> None:
        """`limit` ends the attempt after its maximum duration, of which the waits are no part."""
        self.seat = seat
        self._attempt = attempt
        self._limit = limit

    async def take_seat(self) -> None:
        """See Waits."""
        if self.seat.taken or self.seat.ask():
            return
        await self._attempt.enter(PAUSED)
        now, end = asyncio.get_running_loop().time, self._limit.when()
        if end is None or self._limit.expired():
            await self.seat.wait(None)
            return
        left = end - now()
        self._limit.reschedule(None)
        await self.seat.wait(None)
        self._limit.reschedule(now() + left)

    def pause(self) -> None:
        """See Waits."""
        self._attempt.times.pauses += 1
        self.seat.free()
