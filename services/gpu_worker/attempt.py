"""One attempt at one job: its output so far, and its reports to the live feed and to Temporal.

Output is published to the live feed immediately. Where many attempts generate more than the feed is to take, tokens are
held back for a moment and published together, but never a job's first token, nor its end. Progress is published to the
feed at intervals, and to Temporal with each heartbeat.
"""

import asyncio
import math
import time
from datetime import UTC, datetime

from google.protobuf import duration_pb2

from feed.feed import Feed
from feed.output import GeneratedOutput
from feed.writer import FeedWriter
from jobs.attempts import close, has_ended, pause
from jobs.errors import EngineFailed, InvalidJob, JobError, ResultTooLarge
from jobs.limits import MAX_OUTPUT_BYTES
from jobs.stages import DECODE, DONE, LOADING
from llm_pb import common_pb2, internal_pb2, llm_pb2
from runtime.telemetry import current_headers, current_traceparent, link_to
from services.gpu_worker.answer_pieces import rest_of
from services.gpu_worker.attempt_times import AttemptTimes
from services.gpu_worker.budget import require_more_than, require_time
from services.gpu_worker.engines.engine import Engine, Generation, Image, Output
from services.gpu_worker.held_output import HeldOutput, logprobs_size
from services.gpu_worker.report_throttle import ReportThrottle, ReportTimer
from services.gpu_worker.settings import GpuWorkerSettings
from services.gpu_worker.spans import ATTEMPT, CONTINUED_TOKENS
from services.gpu_worker.watchdog import Watchdog


class Attempt:
    """One attempt, from the takeover of the feed to the result."""

    def __init__(
        self,
        request: internal_pb2.RunRequest,
        number: int,
        started: datetime,
        key: str,
        worker: str,
        feed: Feed,
        settings: GpuWorkerSettings,
        throttle: ReportThrottle,
    ) -> None:
        """`number` counts from 1; `started` is Temporal's time of the start; `key` is the job's key in the feed;
        `worker` is this worker's name."""
        self.job = llm_pb2.JobRequest()
        self.job.CopyFrom(request.job)
        if not self.job.params.HasField("max_tokens"):
            self.job.params.max_tokens = request.default_max_tokens or settings.default_max_tokens
        self.number = number
        self.times = AttemptTimes(request, started)
        self._price = request.price if request.HasField("price") else None
        self.watchdog = Watchdog(settings)
        self.rewinds = False
        """Whether it generates again what an earlier attempt has generated, or may have generated."""
        event = internal_pb2.AttemptStarted(attempt=number, traceparent=current_traceparent(), worker=worker)
        event.start_time.FromDatetime(started)
        self._writer = FeedWriter(feed, key, event)
        self._throttle = throttle
        self._progress_timer = ReportTimer(throttle, settings.progress_interval)
        self._held = HeldOutput()
        self._published_at = -math.inf
        self._publishing = asyncio.Lock()
        self._logprobs_bytes = 0
        self.uses_cache = request.cache and request.job.HasField("cache")
        """Whether the job uses the cache of answers."""
        self.cached = False
        """Whether the output is another job's."""
        self.provider_response = internal_pb2.ProviderResponse()
        """See Generation."""
        self.beat_now = asyncio.Event()
        """Set when the next heartbeat must not wait."""
        self._known_response = ""
        """The id of the response that Temporal knows, or is being told."""
        self._last: Output | None = None
        """The engine's last output, once there is one."""
        self.max_output_bytes = 0
        """Maximum size of output and logprobs, where the output may be a file; 0 where it may not."""
        self.max_inline_bytes = request.max_inline_bytes
        """As in RunRequest."""
        self.image: Image | None = None
        """What the engine has made, if it makes images."""
        self.image_file: common_pb2.FileRef | None = None
        """The image's file, once it is written."""

    @property
    def output(self) -> GeneratedOutput:
        """The output that is published so far. Read-only."""
        return self._writer.output

    def heartbeat(self) -> internal_pb2.RunHeartbeat:
        """Return the attempt's progress, for readers of Temporal, and the state that the next attempt restores."""
        metadata = self._writer.output.metadata()
        self.times.describe(metadata, None)
        metadata.provider_response_id = self.provider_response.response_id
        heartbeat = internal_pb2.RunHeartbeat(progress=self.progress(), metadata=metadata)
        if self.provider_response.response_id:
            heartbeat.provider_response.CopyFrom(self.provider_response)
        if len(attempts := self._writer.output.attempts) > 1:
            # The metadata describe a first attempt.
            heartbeat.attempts.extend(attempts)
        return heartbeat

    @property
    def output_bytes(self) -> int:
        """Size of the output so far and of its log probabilities, in bytes."""
        return len(self._writer.output.text) + self._logprobs_bytes

    def restore(self, heartbeat: internal_pb2.RunHeartbeat) -> None:
        """Restore the state and the progress that an earlier attempt reported."""
        self.times.restore(heartbeat.metadata)
        # A hand-over leaves the id alone.
        self.provider_response.response_id = heartbeat.metadata.provider_response_id
        if heartbeat.HasField("provider_response"):
            self.provider_response.CopyFrom(heartbeat.provider_response)
        self._writer.restore(heartbeat)

    async def start(self, *, first: bool) -> bool:
        """Take the feed over from earlier attempts and, unless this is the `first`, continue their output.

        Return whether the attempt continues it. From here on every reader ignores what an earlier attempt may still
        write.
        """
        if first:
            await self._writer.begin()
            return False
        earlier, output = await self._writer.take_over(), self._writer.output
        continues = output.can_continue
        if self.job.params.HasField("logprobs"):
            # Workers of earlier versions publish none.
            continues = continues and len(output.logprobs) == len(output.token_ids)
            self._logprobs_bytes = logprobs_size(output.logprobs) if continues else 0
        tokens = len(output.token_ids) if continues else 0
        link_to(earlier.traceparent, {ATTEMPT: earlier.attempt, CONTINUED_TOKENS: tokens})
        if not continues:
            # An attempt that is known to have generated nothing leaves nothing to rewind.
            self.rewinds = not (earlier.attempt and output.whole and not output.token_ids)
            self._writer.start_over()
        return continues

    def generation(self, tenant: str = "") -> Generation:
        """Return the request to the engine: the tenant's job, or the rest of it, as a part of the current span."""
        output = self._writer.output
        return Generation(
            # An engine may still be ending the generation before a pause.
            request_id=f"{self._writer.name}-{self.times.pauses}",
            job=self.job,
            resume_token_ids=tuple(output.token_ids),
            resume_text=output.text.decode(),
            trace_headers=current_headers(),
            tenant=tenant,
            price=self._price,
            provider_response=self.provider_response,
        )

    def start_over(self) -> None:
        """Drop the output of earlier attempts."""
        self.rewinds = True
        self._logprobs_bytes = 0
        self._writer.start_over()

    async def enter(self, stage: str) -> None:
        """Enter a stage, and publish it."""
        self.watchdog.move(stage)
        await self._publish_progress()

    async def add(self, output: Output) -> None:
        """Add what the engine generated, and publish it now or a moment later: see publish().

        Raises ResultTooLarge if it exceeds what the job's result may hold, which then lacks it.
        """
        so_far, held = self._writer.output, self._held
        if (response_id := self.provider_response.response_id) and response_id != self._known_response:
            # A worker that is lost before Temporal knows the id pays twice.
            self._known_response = response_id
            self.beat_now.set()
        self.watchdog.move(DECODE if output.token_ids else None)
        logprobs_bytes = self._logprobs_bytes + logprobs_size(output.logprobs)
        text_bytes = len(output.text.encode())
        size, most = len(so_far.text) + held.text_bytes + text_bytes + logprobs_bytes, self.max_output_bytes
        # Logprobs are in the result itself, wherever the text is.
        if size > (most or MAX_OUTPUT_BYTES) or logprobs_bytes > MAX_OUTPUT_BYTES:
            limit = most if size > most > 0 else MAX_OUTPUT_BYTES
            raise ResultTooLarge(f"output and logprobs exceed {limit} bytes; ask for fewer tokens or logprobs")
        self._logprobs_bytes = logprobs_bytes
        if output.image is not None:
            self._keep_image(output.image)
        if output.finish_reason is not None:
            self._last = output
        if output.token_ids:
            self.times.last_token = datetime.now(UTC)
            if so_far.first_token is None:
                self._progress_timer.expire()
        may_wait = so_far.first_token is not None and output.finish_reason is None and not response_id
        held.add(output, text_bytes)
        if may_wait and held.is_small and time.monotonic() - self._published_at < self._throttle.output_seconds:
            self._throttle.publish_later(self)
        else:
            await self.publish()
        if self._progress_timer.expired:
            await self._publish_progress()

    async def publish(self) -> None:
        """Publish what is held back. Returns after what another task publishes is written, too."""
        async with self._publishing:
            if self._held:
                self._published_at = time.monotonic()
                output = self._held.take()
                await self._writer.append(
                    output.text,
                    output.token_ids,
                    output.logprobs,
                    prompt_tokens=output.prompt_tokens,
                    at=self.times.last_token or datetime.now(UTC),
                )

    async def replay(self, answer: internal_pb2.CachedAnswer) -> "llm_pb2.FinishReason.ValueType | None":
        """Publish the answer of another job, as if it were generated; return its finish reason.

        None, and nothing is published, if what earlier attempts have published is no part of it.
        """
        if (rest := rest_of(answer, self._writer.output)) is None:
            return None
        self.cached = True
        try:
            for index, piece in enumerate(rest):
                last = index == len(rest) - 1
                reason = answer.finish_reason if last else None
                token_ids, logprobs = tuple(piece.token_ids), tuple(piece.logprobs)
                await self.add(Output(piece.text, token_ids, answer.prompt_tokens, reason, logprobs))
        finally:
            await self.publish()
        await self.enter(DONE)
        return answer.finish_reason

    def _keep_image(self, image: Image) -> None:
        if not self.max_output_bytes:
            raise InvalidJob("model: images need a store at gateway and worker (STORE_URL), and are of no batch")
        if len(image.data) > self.max_output_bytes:
            raise ResultTooLarge(f"the image exceeds {self.max_output_bytes} bytes; ask for a smaller one")
        self.image = image

    def require_budget(self, context_tokens: int = 0, reason: "llm_pb2.FinishReason.ValueType | None" = None) -> None:
        """Raise BudgetSpent if the job's budget lets it generate no more, or has ended its output for that reason."""
        if reason is None:
            require_time(self.job.budget, self.times.engine_time)
        elif reason == llm_pb2.FINISH_REASON_LENGTH:
            require_more_than(self.job, self._price, self._writer.output.prompt_tokens, context_tokens)

    def close(self, error: JobError | None) -> None:
        """Note why the attempt ends: for an error, or for None because it has finished its answer."""
        close(self._writer.output.attempts[-1], error)

    def pause(self) -> None:
        """Note that the attempt ends because the worker has no seat for the job."""
        pause(self._writer.output.attempts[-1])

    async def end(
        self, reason: "llm_pb2.FinishReason.ValueType", retry_after: duration_pb2.Duration | None = None
    ) -> None:
        """Write into the feed that the attempt is over. `retry_after` is as in AttemptEnded."""
        attempt = self._writer.output.attempts[-1]
        if not has_ended(attempt):
            close(attempt, EngineFailed("the worker failed on this job"))
        event = internal_pb2.AttemptEnded(finish_reason=reason, attempt=attempt, retry_after=retry_after)
        await self._writer.write(internal_pb2.FeedRecord(attempt_ended=event))

    def progress(self) -> llm_pb2.JobProgress:
        """Return the attempt's progress."""
        stage, output = self.watchdog.stage, self._writer.output
        share = 1.0 if stage == DONE else len(output.token_ids) / self.job.params.max_tokens
        report = llm_pb2.JobProgress(
            percent=round(100 * min(share, 1.0), 1),
            stage=stage,
            output_tokens=len(output.token_ids),
            output_bytes=len(output.text),
            worker=output.worker,
        )
        report.updated_at.GetCurrentTime()
        return report

    def result(
        self, engine: Engine, reason: "llm_pb2.FinishReason.ValueType", file: common_pb2.FileRef | None = None
    ) -> llm_pb2.JobResult:
        """Return the job's result as far as this attempt generated it. `file` holds its output, if it is large."""
        output = self._writer.output
        result = output.result(reason, file)
        if self.image_file is not None:
            result.images.append(self.image_file)
        result.metadata.engine = engine.name
        result.metadata.model = self.job.model
        result.metadata.cached = self.cached
        result.metadata.provider_response_id = self.provider_response.response_id
        if self.watchdog.stage != LOADING and not self.cached:
            result.metadata.gpu.CopyFrom(engine.gpu)
        if self._last is not None:
            result.metadata.cached_prompt_tokens = self._last.cached_prompt_tokens
            if self._last.cost_micros is not None:
                result.metadata.cost_micros = self._last.cost_micros
        self.times.describe(result.metadata, output.first_token)
        return result

    def figures(self, reason: "llm_pb2.FinishReason.ValueType") -> dict[str, object]:
        """Return the attempt's figures for a log line."""
        return {
            "finish_reason": llm_pb2.FinishReason.Name(reason),
            "output_tokens": len(self._writer.output.token_ids),
            "seconds": round(self.times.seconds, 3),
        }

    async def _publish_progress(self) -> None:
        self._progress_timer.restart()
        # It may repeat the output, which tokens that another task publishes must not overtake.
        async with self._publishing:
            await self._writer.write(internal_pb2.FeedRecord(progress=self.progress()))
