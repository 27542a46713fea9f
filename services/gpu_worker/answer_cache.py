"""How an attempt uses the cache of answers: it takes an answer that is there, or generates one for the others.

Of equal jobs one generates at a time, while it has a seat. The others wait without one. Whatever goes wrong with the
cache, the attempt generates as if there were none.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from hashlib import sha256
from typing import Final

from opentelemetry.metrics import Meter

from feed.answers import CLAIM_SECONDS, MAX_ANSWER_BYTES, Answers, CacheUnavailable
from jobs.ids import tenant_of
from jobs.stages import QUEUED
from llm_pb import internal_pb2, llm_pb2
from services.gpu_worker.answer_pieces import add_output
from services.gpu_worker.attempt import Attempt
from services.gpu_worker.engines.engine import Output
from services.gpu_worker.recipe import Recipe

_log = logging.getLogger(__name__)
_FIRST_POLL_SECONDS: Final = 0.25
"""Interval at which an attempt looks for the answer of another one, at first."""
_LAST_POLL_SECONDS: Final = 2
"""The same, after a wait of 16 s. In between it is an eighth of the wait so far."""
_RENEW_SECONDS: Final = CLAIM_SECONDS / 3


def job_digest(job: llm_pb2.JobRequest, recipe: bytes) -> bytes:
    """Return a digest that is equal for jobs whose answers are the same, of a worker of this recipe."""
    same = llm_pb2.JobRequest(model=job.model, prompt=job.prompt, messages=job.messages, params=job.params)
    return sha256(recipe + same.SerializeToString(deterministic=True)).digest()


class AnswerCache:
    """The cache as one worker uses it."""

    def __init__(self, answers: Answers | None, recipe: Recipe | None, meter: Meter) -> None:
        """Without `answers` each job generates."""
        self._answers = answers
        self._recipe = recipe
        self._jobs = meter.create_counter(
            "llm.job.cache", "{job}", "Attempts at jobs that use the cache of answers, by whether it had the answer."
        )

    @asynccontextmanager
    async def flight(self, attempt: Attempt, job_id: str) -> AsyncIterator["Flight"]:
        """Use the cache for an attempt whose prompt is known, while the context is open."""
        flight = Flight(attempt, job_id, await self._place(attempt, job_id))
        try:
            yield flight
        finally:
            await flight.release()
            if flight.asked:
                self._jobs.add(1, {"llm.cache.result": "hit" if attempt.cached else "miss"})

    async def _place(self, attempt: Attempt, job_id: str) -> "tuple[Answers, str] | None":
        if not attempt.uses_cache or self._answers is None or self._recipe is None:
            return None
        if (recipe := await self._recipe.digest()) is None:
            return None
        answers = self._answers.of_tenant(tenant_of(job_id))
        try:
            return answers, await answers.key(job_digest(attempt.job, recipe))
        except CacheUnavailable as why:
            _log.info("a job generates without the cache: %s", why)
            return None


class Flight:
    """One attempt's use of the cache."""

    def __init__(self, attempt: Attempt, job_id: str, place: tuple[Answers, str] | None) -> None:
        """`place` is where its answer is. None: the attempt generates."""
        self.asked = place is not None
        """Whether the attempt uses the cache."""
        self._attempt = attempt
        self._job_id = job_id
        self._place = place
        self._ttl = attempt.job.cache.ttl.ToTimedelta()
        self._turn = 0
        self._renewing: asyncio.Task[None] | None = None
        self._ends = asyncio.Event()
        self._pieces: list[internal_pb2.CachedPiece] = []
        self._size = 0
        # What another worker has begun may be of another model.
        self._whole = not attempt.output.token_ids

    async def landed(self) -> "llm_pb2.FinishReason.ValueType | None":
        """Publish the answer if there is one, after a wait while an equal job generates it; return its finish reason.

        None: the attempt is to generate.
        """
        waits_since: float | None = None
        # An attempt that holds the claim would wait for itself.
        while self._place is not None and self._renewing is None:
            answers, key = self._place
            try:
                answer, entry = await answers.find(key)
            except CacheUnavailable as why:
                self._give_up(why)
                break
            if answer is not None and datetime.now(UTC) - answer.made_at.ToDatetime(UTC) <= self._ttl:
                if (reason := await self._attempt.replay(answer)) is not None:
                    return reason
                # The attempt goes on with what it has, which is of no use for others.
                self._place = None
                break
            self._turn = entry.turn
            if not entry.claimed:
                break
            if waits_since is None:
                waits_since = time.monotonic()
                await self._attempt.enter(QUEUED)
            waited = time.monotonic() - waits_since
            await asyncio.sleep(min(max(_FIRST_POLL_SECONDS, waited / 8), _LAST_POLL_SECONDS))
        return None

    async def take_off(self) -> bool:
        """Claim the answer, to generate it; return False if another attempt was faster."""
        if self._place is None or self._renewing is not None:
            return True
        answers, key = self._place
        try:
            turn = await answers.store.claim(key, self._turn)
        except CacheUnavailable as why:
            self._give_up(why)
            return True
        if turn is None:
            return False
        self._turn = turn
        self._renewing = asyncio.create_task(self._keep_claim(answers, key))
        return True

    def note(self, output: Output) -> None:
        """Note what the engine has generated."""
        if self._place is None:
            return
        if not self._attempt.output.token_ids:
            # It begins, or starts over.
            self._pieces, self._size, self._whole = [], 0, True
        self._size += len(output.text.encode()) + 4 * len(output.token_ids)
        if self._size > MAX_ANSWER_BYTES:
            self._whole, self._pieces = False, []
        elif self._whole:
            add_output(self._pieces, output)

    async def keep(self, reason: "llm_pb2.FinishReason.ValueType") -> None:
        """Store the answer that the attempt has generated, if it still holds the claim."""
        if self._place is None or not self._whole or self._renewing is None or self._renewing.done():
            # It has lost the claim.
            return
        answers, key = self._place
        answer = internal_pb2.CachedAnswer(
            pieces=self._pieces, finish_reason=reason, prompt_tokens=self._attempt.output.prompt_tokens
        )
        answer.made_at.GetCurrentTime()
        await self._stop_renewing()
        try:
            # A worker that was suspended must not bring back what was deleted meanwhile.
            if (turn := await answers.store.claim(key, self._turn)) is not None:
                self._turn = turn
                await answers.put(key, self._job_id, answer, self._ttl)
                await answers.store.release(key, self._turn)
        except CacheUnavailable as why:
            _log.info("an answer is not kept: %s", why)
        self._place = None

    async def release(self) -> None:
        """Release the flight, so that another attempt generates."""
        if self._place is None or self._renewing is None:
            return
        await self._stop_renewing()
        answers, key = self._place
        with contextlib.suppress(CacheUnavailable):
            await answers.store.release(key, self._turn)

    async def _keep_claim(self, answers: Answers, key: str) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RENEW_SECONDS):
                    await self._ends.wait()
                return
            try:
                turn = await answers.store.claim(key, self._turn)
            except CacheUnavailable:
                continue
            if turn is None:
                return
            self._turn = turn

    async def _stop_renewing(self) -> None:
        if self._renewing is not None:
            # A renewal that is under way must not be cut off: the turn that it brings would be unknown.
            self._ends.set()
            await asyncio.gather(self._renewing, return_exceptions=True)
            self._renewing = None
            self._ends.clear()

    def _give_up(self, why: CacheUnavailable) -> None:
        _log.info("a job generates without the cache: %s", why)
        self._place = None
