"""A service's process as runtime.process runs it: its exported spans, its log and its end."""

import asyncio
import json
import os
import signal
import sys
import time
from typing import Any

import pytest

from tests.support.otlp import Collector, HttpCollector
from tests.support.paths import ROOT

NOWHERE = {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
MAIN = """
import logging, warnings
from opentelemetry import trace
from runtime import process

async def main():
    with trace.get_tracer("test").start_as_current_span("work"):
        logging.getLogger("test").info("some %s", "words", extra={"answer": 42})
    THEN

process.run("worker", main)
"""


async def run(then: str, environment: dict[str, str], *stop: signal.Signals, nohup: bool = False) -> tuple[int, str]:
    """Run a process, and return its exit status and log. It gets the signals `stop` after its first log line."""
    process = await asyncio.create_subprocess_exec(
        # These tests may run under nohup themselves.
        *(("nohup",) if nohup else ("env", "--default-signal=HUP")),
        *(sys.executable, "-c", MAIN.replace("THEN", then)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert process.stderr is not None
    log = await process.stderr.readline()
    for number in stop:
        process.send_signal(number)
    log += await process.stderr.read()
    return await process.wait(), log.decode()


async def spans(receive: type[Collector | HttpCollector] = Collector, **environment: str) -> list[tuple[str, str]]:
    """Return the names and services of the spans that a collector receives."""
    async with receive() as collector:
        status, _ = await run("pass", {**collector.environment, **environment})
    assert status == 0
    return [(span.name, span.service) for span in collector.spans.all]


async def test_the_last_spans_are_sent_before_the_end() -> None:
    assert await spans(OTEL_BSP_SCHEDULE_DELAY="600000") == [("work", "worker")]


async def test_spans_are_sent_by_http_where_the_standard_variable_says_so() -> None:
    """The variables for traces alone work, too. Their endpoint is then used unchanged."""
    assert await spans(HttpCollector) == [("work", "worker")]
    async with HttpCollector() as collector:
        environment = {
            "OTEL_TRACES_EXPORTER": "otlp",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://{collector.address}/v1/traces",
        }
        status, _ = await run("pass", environment)
    assert status == 0
    assert [span.name for span in collector.spans.all] == ["work"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_process_ends_in_order_by_each_signal_that_asks_for_it(number: signal.Signals) -> None:
    """A shell that is closed sends SIGHUP."""
    then = "try:\n        await process.forever()\n    finally:\n        logging.getLogger('test').info('in order')"
    status, log = await run(then, {}, number)
    assert status == 0
    assert "in order" in log


async def test_nohup_keeps_a_process_from_ending_with_its_shell() -> None:
    then = "import signal; print(signal.getsignal(signal.SIGHUP).name, file=sys.stderr)"
    status, log = await run(f"import sys; {then}", {}, signal.SIGHUP, nohup=True)
    assert (status, log.splitlines()[-1]) == (0, "SIG_IGN")


async def test_a_stopped_process_sends_its_spans() -> None:
    async with Collector() as collector:
        environment = {**collector.environment, "OTEL_BSP_SCHEDULE_DELAY": "600000"}
        status, _ = await run("await process.forever()", environment, signal.SIGTERM)
    assert status == 0
    assert [span.name for span in collector.spans.all] == ["work"]


async def test_the_operators_name_for_the_service_counts() -> None:
    assert await spans(OTEL_SERVICE_NAME="mine") == [("work", "mine")]
    assert await spans(OTEL_RESOURCE_ATTRIBUTES="service.name=ours") == [("work", "ours")]


async def test_nothing_is_exported_unless_asked_for() -> None:
    """An endpoint alone does not turn the export on."""
    assert await spans(OTEL_TRACES_EXPORTER="") == []
    assert await spans(OTEL_TRACES_EXPORTER="none") == []


async def test_the_sdk_can_be_turned_off() -> None:
    assert await spans(OTEL_SDK_DISABLED="true") == []


async def test_the_standard_sampler_counts() -> None:
    assert await spans(OTEL_TRACES_SAMPLER="always_off") == []


async def test_an_unknown_exporter_is_an_error_that_says_so() -> None:
    status, log = await run("pass", {"OTEL_TRACES_EXPORTER": "nonsense"})
    assert status == 1
    assert "OTEL_TRACES_EXPORTER" in log
    assert "nonsense" in log


@pytest.mark.parametrize("variable", ["OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"])
@pytest.mark.parametrize("protocol", ["http/json", "carrier-pigeon"])
async def test_an_unknown_protocol_is_an_error_that_says_so(variable: str, protocol: str) -> None:
    """It ends the process at its start, and names the variables and their valid values."""
    status, log = await run("pass", {"OTEL_TRACES_EXPORTER": "otlp", variable: protocol})
    assert status == 1
    end = json.loads(log.splitlines()[-1])["exception"].splitlines()[-1]
    assert variable in end
    assert "has to be grpc (the default) or http/protobuf" in end
    assert repr(protocol) in end


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_a_collector_that_is_away_does_not_hold_up_the_end(protocol: str) -> None:
    begin = time.monotonic()
    environment = {**NOWHERE, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
    status, _ = await run("await process.forever()", environment, signal.SIGTERM)
    assert status == 0
    # The exporter itself would retry for a minute.
    assert time.monotonic() - begin < 45


async def lines(then: str = "pass", **environment: str) -> list[Any]:
    _, log = await run(then, environment)
    return [json.loads(line) for line in log.splitlines()]


async def test_a_line_is_json_where_no_person_looks() -> None:
    (line,) = await lines()
    assert line | {"level": "INFO", "logger": "test", "message": "some words", "answer": 42} == line
    assert len(line["trace_id"]) == 32


async def test_a_line_of_a_process_without_traces_has_no_trace() -> None:
    (line,) = await lines(OTEL_SDK_DISABLED="true")
    assert "trace_id" not in line


async def test_an_error_is_one_line() -> None:
    """This includes the error that ends the process, and a warning of Python."""
    _, warning, end = await lines("warnings.warn('look out'); 1 / 0")
    assert "look out" in warning["message"]
    assert end["message"] == "ended by an error"
    assert "ZeroDivisionError" in end["exception"]


async def test_a_level_can_be_set() -> None:
    (line,) = await lines("1 / 0", LOG_LEVEL="ERROR")
    assert line["level"] == "ERROR"


async def test_text_is_for_people() -> None:
    _, log = await run("pass", {"LOG_FORMAT": "text"})
    assert " INFO test: some words trace_id=" in log
    assert log.endswith(" answer=42\n")


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [("LOG_FORMAT", "xml", "'json' or 'text'"), ("LOG_LEVEL", "DEBUG", "'INFO', 'WARNING' or 'ERROR'")],
)
async def test_a_wrong_setting_is_an_error_that_says_so(variable: str, value: str, told: str) -> None:
    """DEBUG is refused because Temporal's SDK then logs activity results, which contain the output."""
    status, log = await run("pass", {variable: value})
    assert status == 1
    assert told in log
