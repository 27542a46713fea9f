"""The metrics of a notifier: every attempt at a delivery, by kind of target and outcome."""

from opentelemetry.metrics import Meter

from jobs.errors import JobError
from runtime.metrics import SHORT_SECONDS


class NotifierMetrics:
    """The instruments of one notifier."""

    def __init__(self, meter: Meter) -> None:
        self._duration = meter.create_histogram(
            "llm.notification.attempt.duration",
            "s",
            "Duration of attempts of deliveries. Without an error.type the receiver took the event.",
            explicit_bucket_boundaries_advisory=SHORT_SECONDS,
        )

    def attempted(self, kind: str, seconds: float, error: JobError | None) -> None:
        """Record an attempt that has ended; `kind` is the name of the target's field in NotifyTarget."""
        labels = {"llm.notification.target": kind or "_OTHER"}
        if error is not None:
            labels["error.type"] = error.reason
        self._duration.record(seconds, labels)
