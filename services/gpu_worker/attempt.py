"""One attempt at one job: what it has made so far, and everybody who is told of it as it is made.

Output goes to the live feed at once, progress to the feed now and then and to Temporal with each heartbeat.
"""

import time
from datetime import UTC, datetime, timedelta
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from feed.feed import Feed
from feed.output import MadeOutput
from feed.writer import FeedWriter
from jobs.errors import ResultTooLarge
from jobs.limits import MAX_OUTPUT_BYTES, MAX_RESULT_BYTES
from jobs.options import duration
from llm_pb import llm_pb2
from runtime.telemetry import current_headers, current_traceparent, link_to
from services.gpu_worker.engines.engine import Engine, Generation, Output
from services.gpu_worker.report_throttle import Pace
from services.gpu_worker.settings import GpuWorkerSettings
from services.gpu_worker.spans import ATTEMPT, CONTINUED_TOKENS

LOADING: Final = "loading"
PREFILL: Final = "prefill"
DECODE: Final = "decode"
DONE: Final = "done"


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
        self._number = number
        self._worker = worker
        self._settings = settings
        self._pace = pace
        self._created = request.create_time.ToDatetime(UTC)
        self._started = datetime.now(UTC)
        started = llm_pb2.AttemptStarted(
            attempt=number, start_time=_timestamp(self._started), traceparent=current_traceparent()
        )
        self._writer = FeedWriter(feed, key, started)
        self._last_token: datetime | None = None
        self._queue_time = duration(max(self._started - self._created, timedelta()))
        self.stage = LOADING
        """LOADING, PREFILL, DECODE or DONE."""
        self._reported_bytes = 0
        """How much output an earlier attempt said that it had published."""
        self._logprobs: list[llm_pb2.TokenLogprobs] = []
        self._logprobs_bytes = 0
        self.moved_at = time.monotonic()
        """When it last went on, by the monotonic clock."""
        self.rewinds = False
        """Whether it makes again, or may, what an earlier attempt has made."""
        self._progress_at = 0.0

    @property
    def queue_time(self) -> Duration:
        """From Submit to the first attempt's start."""
        return self._queue_time

    def carried(self) -> llm_pb2.ResultMetadata:
        """Return what a heartbeat carries beside progress: for the next attempt, and for those who ask Temporal."""
        return llm_pb2.ResultMetadata(
            queue_time=self._queue_time,
            attempts=self._number,
            rewinds=self._writer.transcript.rewinds,
            lowest_rewind_offset=self._writer.transcript.lowest_rewind,
        )

    def continue_from(self, earlier: llm_pb2.ResultMetadata, report: llm_pb2.JobProgress | None = None) -> None:
        """Take over what an earlier attempt knew, and how far it said that it was."""
        self._queue_time = earlier.queue_time
        self._writer.transcript.add_rewinds(earlier.rewinds, earlier.lowest_rewind_offset)
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
        if first:
            await self._writer.begin()
            return False
        made = await self._writer.take_over(self._reported_bytes)
        # The feed keeps no logprobs, so with those the job starts over.
        continues = made.can_continue and not self.job.params.HasField("logprobs")
        last, tokens = made.last_attempt, len(made.token_ids) if continues else 0
        link_to(last.traceparent, {ATTEMPT: last.attempt, CONTINUED_TOKENS: tokens})
        if continues:
            self._continue(made)
            return True
        # An attempt that is known to have made nothing leaves nothing to take back.
        self.rewinds = not (last.attempt and made.whole and not made.token_ids)
        return False

    def generation(self) -> Generation:
        """Return what the engine is asked for: the job, or what is left of it, as a part of the current span."""
        return Generation(
            request_id=self._writer.name,
            job=self.job,
            resume_token_ids=tuple(self._writer.token_ids),
            resume_text=self._writer.text,
            trace_headers=current_headers(),
        )

    def start_over(self) -> None:
        """Forget what earlier attempts made."""
        self.rewinds = True
        self._continue(MadeOutput())

    def _continue(self, made: MadeOutput) -> None:
        self._writer.restore(made)
        self._last_token = made.first_token

    async def enter(self, stage: str) -> None:
        """Move on to a stage."""
        self.stage = stage
        self.moved_at = time.monotonic()
        await self._tell_progress()

    async def add(self, output: Output) -> None:
        """Take what the engine made. Raises ResultTooLarge when no more would fit into the job's result."""
        self.moved_at = time.monotonic()
        writer = self._writer
        writer.prompt_tokens = output.prompt_tokens
        if output.token_ids:
            self.stage = DECODE
            self._last_token = datetime.now(UTC)
            if writer.first_token is None:
                writer.first_token = self._last_token
                self._progress_at = 0.0
        made = writer.keep(output.text, output.token_ids)
        self._logprobs += output.logprobs
        self._logprobs_bytes += sum(logprobs.ByteSize() + 4 for logprobs in output.logprobs)
        if not self._fits:
            raise ResultTooLarge(f"the output exceeds {MAX_RESULT_BYTES} bytes; ask for fewer tokens or logprobs")
        await writer.publish(made)
        if time.monotonic() - self._progress_at >= self._pace.seconds(self._settings.progress_interval):
            await self._tell_progress()

    async def end(self, reason: "llm_pb2.FinishReason.ValueType") -> None:
        """Say in the feed that the attempt is over."""
        event = llm_pb2.AttemptEnded(finish_reason=reason)
        await self._writer.write(llm_pb2.FeedRecord(attempt_ended=event))

    def progress(self) -> llm_pb2.JobProgress:
        """Return how far the attempt is."""
        share = 1.0 if self.stage == DONE else len(self._writer.token_ids) / self.job.params.max_tokens
        report = llm_pb2.JobProgress(
            percent=round(100 * min(share, 1.0), 1),
            stage=self.stage,
            output_tokens=len(self._writer.token_ids),
            output_bytes=self._writer.output_bytes,
            worker=self._worker,
        )
        report.updated_at.GetCurrentTime()
        return report

    def result(self, engine: Engine, reason: "llm_pb2.FinishReason.ValueType") -> llm_pb2.JobResult:
        """Return the job's result as far as this attempt made it; without logprobs when they are too large."""
        writer, transcript = self._writer, self._writer.transcript
        output = writer.text
        if writer.output_bytes > MAX_OUTPUT_BYTES:
            output = output.encode()[:MAX_OUTPUT_BYTES].decode(errors="ignore")
        transcript.settle(output)
        metadata = llm_pb2.ResultMetadata(
            prompt_tokens=writer.prompt_tokens,
            output_tokens=len(writer.token_ids),
            queue_time=self._queue_time,
            engine=engine.name,
            model=self.job.model,
            worker=self._worker,
            attempts=self._number,
            start_time=_timestamp(self._started),
            rewinds=transcript.rewinds,
            lowest_rewind_offset=transcript.lowest_rewind,
        )
        if self.stage != LOADING:
            metadata.gpu.CopyFrom(engine.gpu)
        if writer.first_token is not None and self._last_token is not None:
            metadata.first_token_time.CopyFrom(_timestamp(writer.first_token))
            metadata.time_to_first_token.CopyFrom(duration(writer.first_token - self._created))
            metadata.latency.CopyFrom(duration(self._last_token - self._created))
        return llm_pb2.JobResult(
            output=output, finish_reason=reason, metadata=metadata, logprobs=self._logprobs if self._fits else ()
        )

    def figures(self, reason: "llm_pb2.FinishReason.ValueType") -> dict[str, object]:
        """Return what a log line says of the attempt."""
        return {
            "finish_reason": llm_pb2.FinishReason.Name(reason),
            "output_tokens": len(self._writer.token_ids),
            "seconds": round((datetime.now(UTC) - self._started).total_seconds(), 3),
        }

    async def _tell_progress(self) -> None:
        self._progress_at = time.monotonic()
        await self._writer.write(llm_pb2.FeedRecord(progress=self.progress()))

    @property
    def _fits(self) -> bool:
        """Whether output and logprobs fit the job's result."""
        return self._writer.output_bytes + self._logprobs_bytes <= MAX_OUTPUT_BYTES


def _timestamp(moment: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(moment)
    return message
