"""One attempt at one job: what it has made so far, and everybody who is told of it as it is made.

Output goes to the live feed at once, progress to the feed now and then and to Temporal with each heartbeat.
"""

import asyncio
import time
import uuid
from datetime import UTC, datetime, timedelta
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from jobs.errors import ResultTooLarge
from jobs.feed import Feed
from jobs.limits import MAX_OUTPUT_BYTES, MAX_RESULT_BYTES
from jobs.made_output import MadeOutput, read_made_output
from jobs.options import duration
from jobs.transcript import Transcript
from llm_pb import llm_pb2
from runtime.telemetry import current_headers, current_traceparent, link_to
from services.gpu_worker.engine import Engine, Generation, Output
from services.gpu_worker.pace import Pace
from services.gpu_worker.settings import GpuWorkerSettings
from services.gpu_worker.spans import ATTEMPT, CONTINUED_TOKENS

LOADING: Final = "loading"
PREFILL: Final = "prefill"
DECODE: Final = "decode"
DONE: Final = "done"
_TAKEOVER_PAUSES: Final = (0, 1, 2)
"""Seconds before each try to take the feed over: a broker that restarts is back by then."""
_REPEAT_SECONDS: Final = 5
"""Least time between two tries to repeat: a broker that does not answer must not slow the job."""
_REPEATED_AT_ONCE: Final = 100_000
"""Characters and tokens in one record of what is repeated: less than the megabyte that a broker takes."""


class Attempt:
    """The record of one attempt."""

    def __init__(
        self,
        request: llm_pb2.RunRequest,
        number: int,
        key: str,
        worker: str,
        feed: Feed,
        settings: GpuWorkerSettings,
        pace: Pace,
    ) -> None:
        """`number` counts from 1; `key` is the job's in the feed; `worker` is this worker's name."""
        self.job = llm_pb2.JobRequest()
        self.job.CopyFrom(request.job)
        if not self.job.params.HasField("max_tokens"):
            self.job.params.max_tokens = request.default_max_tokens or settings.default_max_tokens
        self.writer = uuid.uuid4().hex
        self._traceparent = current_traceparent()
        self._number = number
        self._key = key
        self._worker = worker
        self._feed = feed
        self._outages = feed.outages
        self._settings = settings
        self._pace = pace
        self._created = request.create_time.ToDatetime(UTC)
        self._started = datetime.now(UTC)
        self._first_token: datetime | None = None
        self._last_token: datetime | None = None
        self._queue_time = duration(max(self._started - self._created, timedelta()))
        self.stage = LOADING
        """LOADING, PREFILL, DECODE or DONE."""
        self._transcript = Transcript()
        self._reported_bytes = 0
        """How much output an earlier attempt said that it had published."""
        self._texts: list[str] = []
        self._output_bytes = 0
        self._token_ids: list[int] = []
        self._prompt_tokens = 0
        self._logprobs: list[llm_pb2.TokenLogprobs] = []
        self._logprobs_bytes = 0
        self.moved_at = time.monotonic()
        """When it last went on, by the monotonic clock."""
        self.rewinds = False
        """Whether it makes again, or may, what an earlier attempt has made."""
        self._progress_at = 0.0
        self._repeat_at = 0.0

    @property
    def queue_time(self) -> Duration:
        """From Submit to the first attempt's start."""
        return self._queue_time

    def carried(self) -> llm_pb2.ResultMetadata:
        """Return what a heartbeat carries beside progress: for the next attempt, and for those who ask Temporal."""
        return llm_pb2.ResultMetadata(
            queue_time=self._queue_time,
            attempts=self._number,
            rewinds=self._transcript.rewinds,
            lowest_rewind_offset=self._transcript.lowest_rewind,
        )

    def continue_from(self, earlier: llm_pb2.ResultMetadata, report: llm_pb2.JobProgress | None = None) -> None:
        """Take over what an earlier attempt knew, and how far it said that it was."""
        self._queue_time = earlier.queue_time
        self._transcript.add_rewinds(earlier.rewinds, earlier.lowest_rewind_offset)
        self._reported_bytes = report.output_bytes if report else 0

    @property
    def hangs(self) -> bool:
        """Whether nothing has moved for longer than it may in this stage. A load has its limit elsewhere."""
        limit = {
            PREFILL: self._settings.prefill_timeout,
            DECODE: self._settings.decode_timeout,
        }.get(self.stage)
        return limit is not None and time.monotonic() - self.moved_at > limit.total_seconds()

    async def start(self, *, first: bool) -> bool:
        """Take the feed over from earlier attempts and, unless this is the `first`, what they made: True if so.

        From here on every reader ignores what an earlier attempt may still write.
        """
        record = self._takeover()
        if first:
            await self._tell(record)
            return False
        self.rewinds = True
        made = await self._read_made_output(record)
        # The feed keeps no logprobs, so with those the job starts over.
        continues = made.can_continue and not self.job.params.HasField("logprobs")
        last, tokens = made.last_attempt, len(made.token_ids) if continues else 0
        link_to(last.traceparent, {ATTEMPT: last.attempt, CONTINUED_TOKENS: tokens})
        if continues:
            self._take_over(made)
            self.rewinds = False
            return True
        # An attempt that is known to have made nothing leaves nothing to take back.
        self.rewinds = not (last.attempt and made.whole and not made.token_ids)
        return False

    async def _read_made_output(self, record: llm_pb2.FeedRecord) -> MadeOutput:
        """Take the feed over and return what is in it; nothing when the feed is away."""
        made = MadeOutput()
        if await self._take_feed_over(record):
            made = await read_made_output(self._feed, self._key, self.writer)
        transcript = made.transcript
        transcript.add_rewinds(self._transcript.rewinds, self._transcript.lowest_rewind)
        if not (made.last_attempt.attempt and made.whole) or self._reported_bytes > len(transcript.data):
            # Watchers may hold output that is lost here, and whose place other output takes.
            transcript.add_rewinds(transcript.rewinds + 1, len(transcript.data))
        self._transcript = transcript
        return made

    async def _take_feed_over(self, record: llm_pb2.FeedRecord) -> bool:
        """Return whether the feed has stored the record: tried for a while, for without it the job starts over."""
        for pause in _TAKEOVER_PAUSES:
            await asyncio.sleep(pause)
            if await self._feed.sync(self._key, record):
                return True
        return False

    def generation(self) -> Generation:
        """Return what the engine is asked for: the job, or what is left of it, as a part of the current span."""
        return Generation(
            request_id=self.writer,
            job=self.job,
            resume_token_ids=tuple(self._token_ids),
            resume_text="".join(self._texts),
            trace_headers=current_headers(),
        )

    def start_over(self) -> None:
        """Forget what earlier attempts made."""
        self.rewinds = True
        self._take_over(MadeOutput())

    def _take_over(self, made: MadeOutput) -> None:
        self._texts = [made.text.decode()]
        self._output_bytes = len(made.text)
        self._token_ids = made.token_ids
        self._prompt_tokens = made.prompt_tokens
        self._first_token = self._last_token = made.first_token

    async def enter(self, stage: str) -> None:
        """Move on to a stage."""
        self.stage = stage
        self.moved_at = time.monotonic()
        await self._tell_progress()

    async def add(self, output: Output) -> None:
        """Take what the engine made. Raises ResultTooLarge when no more would fit into the job's result."""
        self.moved_at = time.monotonic()
        self._prompt_tokens = output.prompt_tokens
        made = llm_pb2.TokensMade(
            offset=self._output_bytes,
            text=output.text,
            token_offset=len(self._token_ids),
            token_ids=output.token_ids,
        )
        if output.token_ids:
            self.stage = DECODE
            self._last_token = datetime.now(UTC)
            if self._first_token is None:
                self._first_token = self._last_token
                self._progress_at = 0.0
                self._describe_first(made)
        self._texts.append(output.text)
        self._output_bytes += len(output.text.encode())
        self._token_ids += output.token_ids
        self._logprobs += output.logprobs
        self._logprobs_bytes += sum(logprobs.ByteSize() + 4 for logprobs in output.logprobs)
        if self._output_bytes + self._logprobs_bytes > MAX_OUTPUT_BYTES:
            raise ResultTooLarge(f"the output exceeds {MAX_RESULT_BYTES} bytes; ask for fewer tokens or logprobs")
        if made.text or made.token_ids:
            self._transcript.put(made.offset, made.text)
            self._describe_rewinds(made)
            await self._tell(llm_pb2.FeedRecord(writer=self.writer, tokens_made=made))
        if time.monotonic() - self._progress_at >= self._pace.seconds(self._settings.progress_interval):
            await self._tell_progress()

    async def end(self, reason: "llm_pb2.FinishReason.ValueType") -> None:
        """Say in the feed that the attempt is over."""
        event = llm_pb2.AttemptEnded(finish_reason=reason)
        await self._tell(llm_pb2.FeedRecord(writer=self.writer, attempt_ended=event))

    def progress(self) -> llm_pb2.JobProgress:
        """Return how far the attempt is."""
        share = 1.0 if self.stage == DONE else len(self._token_ids) / self.job.params.max_tokens
        report = llm_pb2.JobProgress(
            percent=round(100 * min(share, 1.0), 1),
            stage=self.stage,
            output_tokens=len(self._token_ids),
            output_bytes=self._output_bytes,
            worker=self._worker,
        )
        report.updated_at.GetCurrentTime()
        return report

    def result(self, engine: Engine, reason: "llm_pb2.FinishReason.ValueType") -> llm_pb2.JobResult:
        """Return the job's result as far as this attempt made it; without logprobs when they are too large."""
        fits = self._output_bytes + self._logprobs_bytes <= MAX_OUTPUT_BYTES
        output = "".join(self._texts)
        if self._output_bytes > MAX_OUTPUT_BYTES:
            output = output.encode()[:MAX_OUTPUT_BYTES].decode(errors="ignore")
        self._transcript.settle(output)
        metadata = llm_pb2.ResultMetadata(
            prompt_tokens=self._prompt_tokens,
            output_tokens=len(self._token_ids),
            queue_time=self._queue_time,
            engine=engine.name,
            model=self.job.model,
            worker=self._worker,
            attempts=self._number,
            start_time=_timestamp(self._started),
            rewinds=self._transcript.rewinds,
            lowest_rewind_offset=self._transcript.lowest_rewind,
        )
        if self.stage != LOADING:
            metadata.gpu.CopyFrom(engine.gpu)
        if self._first_token is not None and self._last_token is not None:
            metadata.first_token_time.CopyFrom(_timestamp(self._first_token))
            metadata.time_to_first_token.CopyFrom(duration(self._first_token - self._created))
            metadata.latency.CopyFrom(duration(self._last_token - self._created))
        return llm_pb2.JobResult(
            output=output, finish_reason=reason, metadata=metadata, logprobs=self._logprobs if fits else ()
        )

    def figures(self, reason: "llm_pb2.FinishReason.ValueType") -> dict[str, object]:
        """Return what a log line says of the attempt."""
        return {
            "finish_reason": llm_pb2.FinishReason.Name(reason),
            "output_tokens": len(self._token_ids),
            "seconds": round((datetime.now(UTC) - self._started).total_seconds(), 3),
        }

    async def _tell_progress(self) -> None:
        self._progress_at = time.monotonic()
        await self._tell(llm_pb2.FeedRecord(writer=self.writer, progress=self.progress()))

    async def _tell(self, record: llm_pb2.FeedRecord) -> None:
        await self._feed.append(self._key, record)
        outages, now = self._feed.outages, time.monotonic()
        if outages != self._outages and now >= self._repeat_at:
            self._repeat_at = now + _REPEAT_SECONDS
            if await self._repeat():
                self._outages, self._repeat_at = outages, 0.0

    async def _repeat(self) -> bool:
        """Write all output into the feed again, which has lost a part of it: so that readers need not wait for the end.

        Those that have it already pass over it. Waits for each piece, lest many jobs at once overrun the feed again.
        Returns whether all of it is stored; if not, it is to be tried again.
        """
        text, ids, offset = "".join(self._texts), self._token_ids, 0
        stored = await self._feed.sync(self._key, self._takeover())
        for start in range(0, max(len(text), len(ids)), _REPEATED_AT_ONCE):
            if not stored:
                return False
            end = start + _REPEATED_AT_ONCE
            made = llm_pb2.TokensMade(
                offset=offset, text=text[start:end], token_offset=min(start, len(ids)), token_ids=ids[start:end]
            )
            if start == 0:
                self._describe_first(made)
                self._describe_rewinds(made)
            stored = await self._feed.sync(self._key, llm_pb2.FeedRecord(writer=self.writer, tokens_made=made))
            offset += len(made.text.encode())
        return stored

    def _describe_first(self, made: llm_pb2.TokensMade) -> None:
        """Say with the first token what is not known before it, and does not change after it."""
        made.prompt_tokens = self._prompt_tokens
        if self._first_token is not None:
            made.made_at.CopyFrom(_timestamp(self._first_token))

    def _describe_rewinds(self, made: llm_pb2.TokensMade) -> None:
        made.rewinds = self._transcript.rewinds
        made.lowest_rewind_offset = self._transcript.lowest_rewind

    def _takeover(self) -> llm_pb2.FeedRecord:
        event = llm_pb2.AttemptStarted(
            attempt=self._number, start_time=_timestamp(self._started), traceparent=self._traceparent
        )
        return llm_pb2.FeedRecord(writer=self.writer, attempt_started=event)


def _timestamp(moment: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(moment)
    return message
