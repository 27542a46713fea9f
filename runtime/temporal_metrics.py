"""The metrics of Temporal's SDK, served with those of the process.

The SDK can serve its own metrics only on a second port. So it buffers them, and this module copies them into
instruments of the same names. Metrics of workflow code take the same way.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, Final

from opentelemetry.metrics import Meter
from temporalio.runtime import (
    BUFFERED_METRIC_KIND_COUNTER,
    BUFFERED_METRIC_KIND_GAUGE,
    BUFFERED_METRIC_KIND_HISTOGRAM,
    BufferedMetric,
    MetricBuffer,
    MetricBufferDurationFormat,
    Runtime,
    TelemetryConfig,
)

from runtime.metrics import LONG_SECONDS, Metrics
from runtime.temporal_log import core_logging

_BUFFERED: Final = 20_000
"""Maximum number of updates that the SDK buffers. It drops further ones. A job has about 60. The whole buffer is
allocated at the start, 100 bytes an update."""
_COMMAND_QUEUES: Final = "temporal-sys/worker-commands"
_FETCH_INTERVAL: Final = timedelta(seconds=0.5)
"""Interval at which the buffer is emptied. It is short, so that no fetch blocks the event loop for long."""


@asynccontextmanager
async def temporal_runtime(metrics: Metrics) -> AsyncIterator[Runtime]:
    """Yield the runtime for temporal.connect. Its metrics are copied into the instruments of the process meanwhile."""
    buffered = _BufferedMetrics(metrics.meter("temporalio"))
    fetching = asyncio.create_task(buffered.keep_fetching())
    try:
        yield buffered.runtime
    finally:
        fetching.cancel()


class _BufferedMetrics:
    """Copies the metrics of Temporal's SDK into OpenTelemetry's instruments."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._buffer = MetricBuffer(_BUFFERED, MetricBufferDurationFormat.SECONDS)
        self._instruments: dict[str, Callable[[Any, Any], None]] = {}
        self.runtime = Runtime(
            telemetry=TelemetryConfig(logging=core_logging(), metrics=self._buffer, attach_service_name=False)
        )
        """The runtime that buffers its metrics here."""

    async def keep_fetching(self) -> None:
        """Call fetch() every half second until cancelled."""
        while True:
            self.fetch()
            await asyncio.sleep(_FETCH_INTERVAL.total_seconds())

    def fetch(self) -> None:
        """Record all updates since the last call."""
        merged: dict[tuple[str, frozenset[Any]], tuple[BufferedMetric, Any, Mapping[str, Any]]] = {}
        for update in self._buffer.retrieve_updates():
            metric, value, labels = update.metric, update.value, _bounded(update.attributes)
            if metric.kind == BUFFERED_METRIC_KIND_HISTOGRAM:
                self._record(metric, value, labels)
                continue
            # Most updates are of a few counters and gauges. Only a counter's sum and a gauge's last value count.
            key = metric.name, frozenset(labels.items())
            if metric.kind == BUFFERED_METRIC_KIND_COUNTER and key in merged:
                value += merged[key][1]
            merged[key] = metric, value, labels
        for one in merged.values():
            self._record(*one)

    def _record(self, metric: BufferedMetric, value: Any, labels: Mapping[str, Any]) -> None:
        record = self._instruments.get(metric.name)
        if record is None:
            record = self._instruments[metric.name] = self._instrument(metric)
        record(value, labels)

    def _instrument(self, metric: BufferedMetric) -> Callable[[Any, Any], None]:
        about = {"name": metric.name, "unit": metric.unit or "", "description": metric.description or ""}
        if metric.kind == BUFFERED_METRIC_KIND_COUNTER:
            return self._meter.create_counter(**about).add
        if metric.kind == BUFFERED_METRIC_KIND_GAUGE:
            return self._meter.create_gauge(**about).set
        return self._meter.create_histogram(**about, explicit_bucket_boundaries_advisory=LONG_SECONDS).record


def _bounded(labels: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the labels with one name for all queues of worker commands, whose names are random in each process."""
    if str(labels.get("task_queue", "")).startswith(_COMMAND_QUEUES):
        return {**labels, "task_queue": _COMMAND_QUEUES}
    return labels
