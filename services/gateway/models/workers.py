"""The GPU workers that report themselves: the last report of each, kept for some of its intervals.

A report comes from the network, and whoever may publish on its subject decides what is in it. So nothing in it is
trusted: what is invalid is ignored and counted, and the number of workers is bounded.
"""

import logging
import math
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from google.protobuf.message import DecodeError
from opentelemetry.metrics import Counter

from feed.worker_reports import MAX_REPORT_BYTES, WorkerReports
from llm_pb import internal_pb2, llm_pb2
from services.gateway.errors import feed_unavailable

_log = logging.getLogger(__name__)
MAX_WORKERS: Final = 1000
"""Maximum number of workers that a gateway keeps."""
KEPT_INTERVALS: Final = 3
"""Number of a worker's intervals without a report after which it is gone."""
MAX_INTERVAL: Final = 60.0
"""Maximum interval of reports in seconds. A longer one counts as this."""


class _Entry(NamedTuple):
    info: llm_pb2.WorkerInfo
    gone_at: float
    """When the worker is gone unless it reports again, by the clock."""


class Workers:
    """The table of workers, by name."""

    def __init__(self, reports: WorkerReports, ignored: Counter, clock: Callable[[], float] = time.monotonic) -> None:
        """`ignored` counts the reports that are not kept. `clock` returns seconds."""
        self._reports = reports
        self._ignored = ignored
        self._clock = clock
        self._entries: dict[str, _Entry] = {}

    def take(self, data: bytes) -> None:
        """Keep a serialized WorkerReport as its worker's last one. Never raises."""
        try:
            report = _parse(data)
            self._keep(report)
        except (DecodeError, ValueError) as error:
            self._ignored.add(1)
            # Not at a higher level: whoever sends such reports could fill the log.
            _log.debug("a report of a worker is ignored: %s", error)

    def infos(self, model: str = "") -> list[llm_pb2.WorkerInfo]:
        """Return the workers that serve the model, or all, by name. Raises ApiError UNAVAILABLE if no reports come."""
        if not self._reports.receiving:
            raise feed_unavailable()
        self._drop_gone()
        entries = sorted(self._entries.items())
        return [entry.info for _, entry in entries if not model or entry.info.model == model]

    def serves(self, queue: str) -> bool:
        """Return whether a worker has reported lately that it serves a task queue."""
        self._drop_gone()
        infos = (entry.info for entry in self._entries.values())
        return any(info.state == llm_pb2.WORKER_STATE_SERVING and queue in info.task_queues for info in infos)

    def _keep(self, report: internal_pb2.WorkerReport) -> None:
        name = report.worker.worker
        if report.ended:
            self._entries.pop(name, None)
            return
        if name not in self._entries and len(self._entries) >= MAX_WORKERS:
            self._drop_gone()
            if len(self._entries) >= MAX_WORKERS:
                raise ValueError(f"there are {MAX_WORKERS} workers already")
        report.worker.report_time.GetCurrentTime()
        interval = min(report.interval.seconds + report.interval.nanos / 1e9, MAX_INTERVAL)
        self._entries[name] = _Entry(report.worker, self._clock() + KEPT_INTERVALS * interval)

    def _drop_gone(self) -> None:
        now = self._clock()
        for name in [name for name, entry in self._entries.items() if entry.gone_at <= now]:
            del self._entries[name]


def _parse(data: bytes) -> internal_pb2.WorkerReport:
    """Return the report. Raises DecodeError or ValueError for one that no worker sends."""
    if len(data) > MAX_REPORT_BYTES:
        raise ValueError(f"it has more than {MAX_REPORT_BYTES} bytes")
    report = internal_pb2.WorkerReport.FromString(data)
    worker = report.worker
    if not worker.worker:
        raise ValueError("it names no worker")
    texts = (worker.worker, worker.version, worker.model, worker.engine, worker.gpu.name, *worker.task_queues)
    if not all(text.isprintable() for text in texts):
        raise ValueError("it holds characters that cannot be shown")
    counts = (worker.seats, worker.seats_in_use, worker.running_sequences, worker.waiting_sequences)
    if min(counts) < 0 or not (0 <= worker.kv_cache_usage <= 1 and 0 <= worker.tokens_per_second < math.inf):
        raise ValueError("it holds a number that no worker counts")
    # It raises for a time out of protobuf's range, of which no JSON could be made.
    worker.start_time.ToDatetime()
    return report
