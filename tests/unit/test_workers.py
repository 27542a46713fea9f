"""The gateway's table of GPU workers, and what a worker counts for it."""

import math
import os
import random

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from opentelemetry.metrics import NoOpMeter

from feed.worker_reports import MAX_REPORT_BYTES, ReportHandler
from jobs.errors import reason_of
from llm_pb import internal_pb2, llm_pb2
from services.gateway.errors import ApiError
from services.gateway.metrics import GatewayMetrics
from services.gateway.models.workers import MAX_WORKERS, Workers
from services.gpu_worker.reporting import Rate
from services.http.rest.messages import to_json


class Reports:
    """A way of reports that is there or not."""

    receiving = True

    async def publish_report(self, report: internal_pb2.WorkerReport) -> bool:
        return self.receiving

    async def receive_reports(self, on_report: ReportHandler) -> None:
        pass


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Table:
    """A table with a clock of its own."""

    def __init__(self) -> None:
        self.clock, self.reports = Clock(), Reports()
        self.workers = Workers(self.reports, GatewayMetrics(NoOpMeter("test"), {}).ignored_reports, self.clock)

    def take(self, name: str, *, ended: bool = False, interval: float = 5.0, **info: object) -> None:
        worker = llm_pb2.WorkerInfo(worker=name, **{"model": "m", **info})  # type: ignore[arg-type]
        report = internal_pb2.WorkerReport(worker=worker, ended=ended)
        report.interval.FromNanoseconds(int(interval * 1e9))
        self.workers.take(report.SerializeToString())

    @property
    def names(self) -> list[str]:
        return [info.worker for info in self.workers.infos()]


@pytest.fixture
def table() -> Table:
    return Table()


def test_workers_are_listed_by_name_with_their_last_report(table: Table) -> None:
    for name in ("b", "a"):
        table.take(name, seats=4, seats_in_use=1)
    table.take("b", seats=4, seats_in_use=3)
    assert [(info.worker, info.seats_in_use) for info in table.workers.infos()] == [("a", 1), ("b", 3)]
    assert all(info.HasField("report_time") for info in table.workers.infos())


def test_a_worker_serves_its_queues_from_its_loading_to_its_end(table: Table) -> None:
    """A full one as well: that it takes no further job now does not count."""
    queues = {"task_queues": ["q", "q.background"]}
    table.take("a", state=llm_pb2.WORKER_STATE_LOADING, **queues)
    assert not table.workers.serves("q")
    table.take("a", state=llm_pb2.WORKER_STATE_SERVING, seats=4, seats_in_use=4, **queues)
    assert table.workers.serves("q")
    assert not table.workers.serves("other")
    table.reports.receiving = False
    assert table.workers.serves("q")
    table.clock.now += 15
    assert not table.workers.serves("q")
    table.take("a", state=llm_pb2.WORKER_STATE_DRAINING, **queues)
    assert not table.workers.serves("q")


def test_workers_are_filtered_by_model(table: Table) -> None:
    table.take("a", model="small")
    table.take("b", model="large")
    assert [info.worker for info in table.workers.infos("large")] == ["b"]
    assert table.workers.infos("none") == []


def test_a_silent_worker_is_gone_after_three_of_its_intervals(table: Table) -> None:
    table.take("a", interval=5)
    table.take("b", interval=1)
    table.clock.now += 2.5
    assert table.names == ["a", "b"]
    table.clock.now += 0.5
    assert table.names == ["a"]
    table.clock.now += 11.5
    table.take("a")
    table.clock.now += 14.5
    assert table.names == ["a"]
    table.clock.now += 0.5
    assert table.names == []


@pytest.mark.parametrize("interval", [Duration(seconds=2**62), Duration(seconds=3600), Duration(nanos=-1), Duration()])
def test_no_interval_keeps_a_worker_for_long(table: Table, interval: Duration) -> None:
    report = internal_pb2.WorkerReport(worker=llm_pb2.WorkerInfo(worker="a"), interval=interval)
    table.workers.take(report.SerializeToString())
    table.clock.now += 180
    assert table.names == []


def test_a_worker_that_has_ended_is_gone_at_once(table: Table) -> None:
    table.take("a")
    table.take("a", ended=True)
    assert table.names == []
    table.take("never", ended=True)
    assert table.names == []


def test_the_number_of_workers_is_bounded(table: Table) -> None:
    """Those that are known stay known. The place of one that is gone is free again."""
    for number in range(MAX_WORKERS + 10):
        table.take(f"{number:05}")
    assert table.names == [f"{number:05}" for number in range(MAX_WORKERS)]
    table.take("00007", seats=9)
    assert table.workers.infos()[7].seats == 9
    table.clock.now += 15
    table.take("late")
    assert table.names == ["late"]


def test_a_gateway_that_gets_no_reports_says_so(table: Table) -> None:
    """An empty list would mean that there are no workers."""
    table.take("a")
    table.reports.receiving = False
    with pytest.raises(ApiError) as refused:
        table.workers.infos()
    assert reason_of(refused.value.status) == "FEED_UNAVAILABLE"
    table.reports.receiving = True
    assert table.names == ["a"]


@pytest.mark.parametrize(
    "info",
    [
        {},
        {"worker": "a\x1b[2J"},
        {"worker": "a", "model": "m\n"},
        {"worker": "a", "gpu": {"name": "\u202e"}},
        {"worker": "a", "task_queues": ["q", "\x00"]},
        {"worker": "a", "kv_cache_usage": math.nan},
        {"worker": "a", "tokens_per_second": math.inf},
        {"worker": "a", "tokens_per_second": -1.0},
        {"worker": "a", "kv_cache_usage": 40.0},
        {"worker": "a", "seats": -5},
        {"worker": "a", "seats_in_use": -7},
        {"worker": "a", "running_sequences": -1},
        {"worker": "a", "waiting_sequences": -1},
        {"worker": "a", "start_time": Timestamp(seconds=2**62)},
        {"worker": "a", "start_time": Timestamp(nanos=-1)},
        {"worker": "a" * MAX_REPORT_BYTES},
    ],
    ids=repr,
)
def test_a_report_that_no_worker_sends_is_ignored(table: Table, info: dict[str, object]) -> None:
    report = internal_pb2.WorkerReport(worker=llm_pb2.WorkerInfo(**info))  # type: ignore[arg-type]
    report.interval.FromSeconds(5)
    table.workers.take(report.SerializeToString())
    assert table.names == []


def test_no_bytes_break_the_table(table: Table) -> None:
    """Whatever is listed can be shown as JSON."""
    rng = random.Random(1)
    table.take("good", start_time=Timestamp(seconds=1), gpu=llm_pb2.GpuInfo(name="cpu"), kv_cache_usage=0.5)
    report = internal_pb2.WorkerReport()
    report.worker.CopyFrom(table.workers.infos()[0])
    report.interval.FromSeconds(5)
    valid = report.SerializeToString()
    for data in (b"", b"\x00", b"{}", b"\xff" * 10, os.urandom(MAX_REPORT_BYTES), os.urandom(1 << 20)):
        table.workers.take(data)
    for _ in range(3000):
        damaged = bytearray(valid)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        table.workers.take(bytes(damaged))
    assert "good" in table.names
    to_json(llm_pb2.ListWorkersResponse(workers=table.workers.infos()))


def test_the_rate_counts_the_last_ten_seconds() -> None:
    clock = Clock()
    rate = Rate(clock)
    assert rate.per_second(100) == 0
    clock.now += 5
    assert rate.per_second(200) == 20
    # A report that comes at once after another one shows no burst.
    assert rate.per_second(200) == 20
    for _ in range(10):
        clock.now += 5
        assert rate.per_second(200) <= 20
    assert rate.per_second(200) == 0
    clock.now += 60
    assert rate.per_second(800) == 10
