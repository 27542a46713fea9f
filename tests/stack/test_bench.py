"""The scripts of bench/ run at their smallest sizes and print the reports that they promise. No time is tested."""

import asyncio
import json
import sys
from typing import Any

import pytest

from bench.support.results import dated, written
from tests.support.paths import ROOT

SCRIPTS = {
    "first_token": ("suite", "peer_bare_workflow", "floor_health_check"),
    "token_latency": ("suite", "peer_workflow_streams_fastest", "floor_grpc_stream", "floor_nats"),
    "http_front": ("suite", "suite_responses", "peer_grpc", "floor_bare_sse"),
    "jobs_per_second": ("suite", "peer_bare_workflow", "peer_celery_redis"),
    "watchers": ("suite", "floor_grpc_broadcast"),
    "payload_cost": ("suite", "peer_default_protobuf", "peer_default_dataclass", "peer_pydantic", "floor_utf8"),
    "encryption_cost": ("suite", "peer_plain", "limit_aes_gcm"),
    "temporal_cost": ("suite", "suite_notified", "peer_workflow_streams", "peer_bare_workflow"),
    "growth": ("suite",),
    "feed_fanout": ("suite", "peer_leaves", "peer_mirrors"),
    "queue_partitions": ("suite", "simulated"),
    "fairness": ("suite", "peer_fairness_off", "limit_alone"),
    "seats": ("suite", "limit_alone", "peer_one_class"),
    "batch": ("suite", "peer_jobs", "limit_engine"),
    "pipeline_steps": ("suite", "peer_bare_children"),
    "three_steps": ("suite",),
    "pipeline_cancel": ("suite", "peer_bare_children"),
    "cancel_latency": ("decode", "peer_bare_temporal", "floor_health_check"),
    "tracing_cost": ("suite_exported", "suite_not_exported", "peer_off"),
    "quota_cost": ("suite_quota", "suite_no_quota", "suite_quota_full"),
    "idle_memory": ("gateway", "notifier", "peer_bare_temporal_worker", "floor_bare_python"),
}
"""Scripts that do not need vLLM, with the peers that each measures."""

IN_EVERY_RUN = {"first_token", "payload_cost"}
"""One with a stack and one without. make test-long runs the others, which take minutes in all."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_EVERY_RUN else pytest.mark.long) for name in SCRIPTS]
)
async def test_a_script_prints_one_report_with_its_peers(name: str) -> None:
    report = await report_of(name)
    assert report["question"].endswith("?")
    assert report["measure"]
    assert report["sizes"]["rounds"] >= 1
    measured = {who for case in report["results"].values() for who in case}
    assert measured >= set(SCRIPTS[name])
    figures = [
        figure for case in report["results"].values() for each in case.values() for figure in each.values()
    ] + report["verdicts"]
    assert all(figure["min"] <= figure["median"] <= figure["max"] for figure in figures)
    assert any(figure["median"] > 0 for figure in figures)
    page = written({f"bench.{name}": dated(report, 1.0, sys.executable)})
    assert all(verdict["what"] in page for verdict in report["verdicts"])


def test_every_script_is_here_or_needs_vllm() -> None:
    scripts = {path.stem for path in (ROOT / "bench").glob("*.py") if "script.run(" in path.read_text()}
    assert scripts == SCRIPTS.keys() | {"throughput", "batch_throughput"}


async def report_of(name: str) -> dict[str, Any]:
    """Run a script at its smallest sizes, and return the one JSON object that it prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"bench.{name}", "--quick"), stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    report: dict[str, Any] = json.loads(output)
    return report
