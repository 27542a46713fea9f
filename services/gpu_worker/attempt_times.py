"""The times of an attempt, as the job's result reports them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from jobs.options import duration
from llm_pb import internal_pb2, llm_pb2


class AttemptTimes:
    """When an attempt's job was accepted, when the attempt started and generated its last token, and how long it had an
    engine."""

    def __init__(self, request: internal_pb2.RunRequest, started: datetime) -> None:
        """`started` is when Temporal gave the attempt to this worker: the time that readers of Temporal see."""
        self.started = started
        self._began = time.monotonic()
        self.last_token: datetime | None = None
        """None before this attempt's first token."""
        self._created = request.create_time.ToDatetime(UTC)
        self.queue_time = duration(max(self.started - self._created, timedelta()))
        """From Submit to the start of the job's first attempt."""
        self.pauses = 0
        """How often the job gave up its seat before its end, in all attempts."""
        self._engine_seconds = 0.0
        self._generating_since: float | None = None

    @property
    def seconds(self) -> float:
        """How long the attempt has run."""
        return time.monotonic() - self._began

    @property
    def engine_time(self) -> timedelta:
        """For how long engines have generated for the job, in all attempts."""
        since = self._generating_since
        return timedelta(seconds=self._engine_seconds + (0.0 if since is None else time.monotonic() - since))

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Count the time while the context is open as the engine's."""
        self._generating_since = time.monotonic()
        try:
            yield
        finally:
            self._engine_seconds, self._generating_since = self.engine_time.total_seconds(), None

    def restore(self, metadata: llm_pb2.ResultMetadata) -> None:
        """Restore what an earlier attempt has written by `describe`."""
        self.queue_time = metadata.queue_time
        self.pauses = metadata.pauses
        self._engine_seconds = metadata.engine_time.ToTimedelta().total_seconds()

    def go_on_from(self, engine_time: timedelta) -> None:
        """Add for how long engines have generated in earlier attempts."""
        self._engine_seconds += engine_time.total_seconds()

    def describe(self, metadata: llm_pb2.ResultMetadata, first_token: datetime | None) -> None:
        """Write pauses and durations into the metadata; `first_token` is that of the output, None in a heartbeat."""
        metadata.queue_time.CopyFrom(self.queue_time)
        metadata.pauses = self.pauses
        if engine_time := self.engine_time:
            metadata.engine_time.CopyFrom(duration(engine_time))
        if first_token is not None:
            metadata.time_to_first_token.CopyFrom(duration(first_token - self._created))
            metadata.latency.CopyFrom(duration((self.last_token or first_token) - self._created))
