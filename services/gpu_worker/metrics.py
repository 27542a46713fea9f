"""The metrics of a GPU worker: how long jobs waited for it, and the speed and load of its engine.

Names and labels follow OpenTelemetry's semantic conventions for generative AI where those have them
(https://github.com/open-telemetry/semantic-conventions-genai). A token costs one reading of the clock and two
additions. Everything else is recorded once for each generation, or read from the engine at each scrape.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Final

from opentelemetry.metrics import CallbackOptions, Histogram, Meter, Observation

from jobs.errors import error_type
from llm_pb import llm_pb2
from runtime.metrics import LONG_SECONDS
from services.gpu_worker.engines.engine import Engine, Output
from services.gpu_worker.seats import Seats
from services.gpu_worker.spans import operation_name

_CLASSES: Final = {
    number: name.removeprefix("JOB_CLASS_").lower() for name, number in llm_pb2.JobClass.items() if number
}
_TOKENS: Final = tuple(4**power for power in range(11))
_FIRST_TOKEN_SECONDS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(30.0, 60.0, 300.0),
)
_TOKEN_SECONDS: Final = (
    *(0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)


class WorkerMetrics:
    """The instruments of one worker."""

    def __init__(self, meter: Meter, engine: Engine, model: str, seats: Seats) -> None:
        self._engine = engine
        self._seats = seats
        self._model = {"gen_ai.request.model": model}
        self._tokens_read = 0
        self._tokens_made = 0
        self._continuations = meter.create_counter(
            "llm.job.continuations", "{attempt}", "Attempts that continued where an earlier one stopped."
        )
        self._rewinds = meter.create_counter(
            "llm.job.rewinds", "{attempt}", "Attempts that started over what an earlier one had begun."
        )
        self._queue = _seconds(meter, "llm.job.queue.duration", "Time from Submit to the first attempt.", LONG_SECONDS)
        self._first_token = _seconds(
            meter,
            "gen_ai.server.time_to_first_token",
            "Time from the engine's start on a job to its first token.",
            _FIRST_TOKEN_SECONDS,
        )
        self._per_token = _seconds(
            meter,
            "gen_ai.server.time_per_output_token",
            "Mean time for each of a generation's tokens after the first.",
            _TOKEN_SECONDS,
        )
        self._duration = _seconds(
            meter, "gen_ai.server.request.duration", "Time from the engine's start on a job to its end.", LONG_SECONDS
        )
        self._usage = meter.create_histogram(
            "gen_ai.client.token.usage",
            "{token}",
            "Tokens of a generation, counted at its end.",
            explicit_bucket_boundaries_advisory=_TOKENS,
        )
        meter.create_observable_counter(
            "llm.engine.tokens", [self._observe_tokens], "{token}", "Tokens read and generated, counted as they occur."
        )
        meter.create_observable_gauge(
            "llm.engine.requests",
            [self._observe_requests],
            "{request}",
            "Number of generations that run or wait in the engine.",
        )
        meter.create_observable_gauge(
            "llm.engine.capacity", [self._observe_capacity], "{request}", "Maximum number of concurrent generations."
        )
        meter.create_observable_gauge(
            "llm.engine.kv_cache.usage_ratio",
            [self._observe_kv_cache],
            "1",
            "Share of the engine's KV cache that is in use.",
        )
        self._pauses = meter.create_counter(
            "llm.job.pauses", "{pause}", "Seats that jobs gave up before their end, to go on later."
        )
        freed = _seconds(
            meter,
            "llm.engine.seat.release.duration",
            "Time in which a job gave its seat up, from when it was asked to.",
            _FIRST_TOKEN_SECONDS,
        )
        seats.on_freed = lambda seconds: freed.record(seconds, self._model)
        meter.create_observable_gauge(
            "llm.engine.seats", [self._observe_seats], "{seat}", "Seats in use, by the class of the job."
        )
        for counter in (self._continuations, self._rewinds, self._pauses):
            counter.add(0, self._model)

    @property
    def tokens_made(self) -> int:
        """The number of output tokens generated so far."""
        return self._tokens_made

    def started(self, waited: timedelta) -> None:
        """Record that a job's first attempt begins."""
        self._queue.record(waited.total_seconds(), self._model)

    def continued(self) -> None:
        """Record that an attempt continued where an earlier one stopped."""
        self._continuations.add(1, self._model)

    def rewound(self) -> None:
        """Record that an attempt starts over."""
        self._rewinds.add(1, self._model)

    def paused(self) -> None:
        """Record that a job has given up its seat before its end."""
        self._pauses.add(1, self._model)

    @contextmanager
    def generation(self, job: llm_pb2.JobRequest) -> Iterator[Callable[[Output], None]]:
        """Measure one generation while the context is open. Yields a function to call with each output."""
        labels = {
            "gen_ai.operation.name": operation_name(job),
            "gen_ai.provider.name": self._engine.name,
            **self._model,
        }
        started = time.perf_counter()
        first = last = 0.0
        read = made = 0

        def record(output: Output) -> None:
            nonlocal first, last, read, made
            if not read:
                read = output.prompt_tokens
                self._tokens_read += read
            if output.token_ids:
                last = time.perf_counter()
                if not made:
                    first = last
                    self._first_token.record(first - started, labels)
                made += len(output.token_ids)
                self._tokens_made += len(output.token_ids)

        failure = {}
        try:
            yield record
        except BaseException as error:
            failure = {"error.type": error_type(error)}
            raise
        finally:
            self._duration.record(time.perf_counter() - started, {**labels, **failure})
            if made > 1:
                self._per_token.record((last - first) / (made - 1), labels)
            if read:
                self._usage.record(read, {**labels, "gen_ai.token.type": "input"})
                self._usage.record(made, {**labels, "gen_ai.token.type": "output"})

    def _observe_tokens(self, _: CallbackOptions) -> Iterable[Observation]:
        for kind, tokens in (("input", self._tokens_read), ("output", self._tokens_made)):
            yield Observation(tokens, {**self._model, "gen_ai.token.type": kind})

    def _observe_requests(self, _: CallbackOptions) -> Iterable[Observation]:
        load = self._engine.load()
        for state, requests in (("running", load.running), ("waiting", load.waiting)):
            yield Observation(requests, {**self._model, "llm.engine.request.state": state})

    def _observe_capacity(self, _: CallbackOptions) -> Iterable[Observation]:
        yield Observation(self._seats.total, self._model)

    def _observe_seats(self, _: CallbackOptions) -> Iterable[Observation]:
        classes = Counter(seat.job_class for seat in self._seats.taken)
        for job_class, name in _CLASSES.items():
            yield Observation(classes[job_class], {**self._model, "llm.job.class": name})

    def _observe_kv_cache(self, _: CallbackOptions) -> Iterable[Observation]:
        yield Observation(self._engine.load().kv_cache_usage, self._model)


def _seconds(meter: Meter, name: str, description: str, boundaries: Sequence[float]) -> Histogram:
    return meter.create_histogram(name, "s", description, explicit_bucket_boundaries_advisory=boundaries)
