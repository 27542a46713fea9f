"""The times of an attempt, as the job's result reports them."""

from datetime import UTC, datetime, timedelta

from jobs.options import duration
from llm_pb import internal_pb2, llm_pb2


class AttemptTimes:
    """When an attempt's job was accepted, and when the attempt started and generated its last token."""

    def __init__(self, request: internal_pb2.RunRequest) -> None:
        """Start the attempt now."""
        self.started = datetime.now(UTC)
        self.last_token: datetime | None = None
        """None before this attempt's first token."""
        self._created = request.create_time.ToDatetime(UTC)
        self.queue_time = duration(max(self.started - self._created, timedelta()))
        """From Submit to the start of the job's first attempt."""

    @property
    def seconds(self) -> float:
        """How long the attempt has run."""
        return (datetime.now(UTC) - self.started).total_seconds()

    def describe(self, metadata: llm_pb2.ResultMetadata, first_token: datetime | None) -> None:
        """Write the durations into the result's metadata; `first_token` is that of the output."""
        metadata.queue_time.CopyFrom(self.queue_time)
        if first_token is not None:
            metadata.time_to_first_token.CopyFrom(duration(first_token - self._created))
            metadata.latency.CopyFrom(duration((self.last_token or first_token) - self._created))
