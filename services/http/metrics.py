"""The metrics of the HTTP front."""

from opentelemetry.metrics import Meter
from opentelemetry.semconv.metrics.http_metrics import HTTP_SERVER_REQUEST_DURATION

from runtime.metrics import SHORT_SECONDS


class HttpMetrics:
    """The instruments of the front."""

    def __init__(self, meter: Meter) -> None:
        self.duration = meter.create_histogram(
            HTTP_SERVER_REQUEST_DURATION,
            unit="s",
            description="Duration of HTTP requests. A stream lasts until its end.",
            explicit_bucket_boundaries_advisory=SHORT_SECONDS,
        )
        self.streams = meter.create_up_down_counter(
            "llm.http.streams", unit="{stream}", description="Open streams of server-sent events."
        )
        self.streams.add(0)
