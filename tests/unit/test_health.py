"""Readiness, asked of an event loop that does other things meanwhile."""

import asyncio
import http.client
import json
import sys
import threading
from importlib import metadata
from types import ModuleType
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.trace import NoOpTracer

from deploy.local.ports import free_port
from runtime.grpc_health import Health
from runtime.health import Readiness
from runtime.metrics import serving_metrics
from runtime.metrics_settings import MetricsSettings
from services.http.gateway import Gateway
from services.http.settings import HttpSettings


async def test_a_check_that_is_added_while_others_are_under_way_counts_the_next_time() -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    async def slow() -> bool:
        asked.set()
        await answer.wait()
        return True

    readiness = Readiness("test")
    readiness.need("slow", "is slow", slow)
    with readiness.serving():
        asking = asyncio.create_task(asyncio.to_thread(readiness.readyz))
        await asked.wait()
        readiness.need("late", "is late", lambda: False)
        answer.set()
        assert (await asking)["ready"]
        assert (await asyncio.to_thread(readiness.readyz))["missing"] == {"late": "is late"}


async def test_a_check_names_a_problem_other_than_its_usual_one() -> None:
    found: list[bool | str] = [True, False, "is full"]
    readiness = Readiness("test")
    readiness.want("disk", "is away", lambda: found[0])
    with readiness.serving():
        seen = []
        while found:
            seen.append((await asyncio.to_thread(readiness.readyz))["degraded"])
            found.pop(0)
    assert seen == [{}, {"disk": "is away"}, {"disk": "is full"}]


async def test_the_http_front_tells_a_gateway_that_does_not_serve_from_one_that_is_away() -> None:
    health, server = Health(), grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with Gateway(HttpSettings(gateway=address), NoOpTracer()) as gateway:
        seen = []
        for status in ("SERVING", "NOT_SERVING"):
            await health.set("llm.v1.LlmService", health_pb2.HealthCheckResponse.ServingStatus.Value(status))
            seen.append(await gateway.serves())
        await server.stop(None)
        assert [*seen, await gateway.serves()] == [True, "is NOT_SERVING", False]


def test_a_probe_that_is_under_way_at_shutdown_is_answered(capfd: pytest.CaptureFixture[str]) -> None:
    port, checking, stop = free_port(), threading.Event(), threading.Event()

    async def never() -> bool:
        checking.set()
        await asyncio.Event().wait()
        return True

    async def serve() -> None:
        readiness = Readiness("test")
        readiness.need("never", "has no result", never)
        async with serving_metrics(MetricsSettings(metrics_port=port), readiness):
            with readiness.serving():
                served.set()
                await asyncio.to_thread(stop.wait)

    def probe() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        answers.append((response.status, json.loads(response.read())))
        connection.close()

    answers: list[tuple[int, Any]] = []
    served = threading.Event()
    process = threading.Thread(target=asyncio.run, args=[serve()])
    process.start()
    assert served.wait(60)
    probing = threading.Thread(target=probe)
    probing.start()
    assert checking.wait(60)
    stop.set()
    for thread in (process, probing):
        thread.join(60)
    ((status, body),) = answers
    assert (status, body["ready"], body["missing"]) == (503, False, {"process": "is shutting down"})
    assert "Traceback" not in capfd.readouterr().err


def test_a_probe_after_the_event_loops_end_is_answered() -> None:
    async def serve() -> Readiness:
        return Readiness("test")

    readiness = asyncio.run(serve())
    assert readiness.readyz()["missing"] == {"process": "is shutting down"}


async def test_the_version_of_a_library_is_that_of_the_build_that_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM for a CPU is the module vllm of another distribution."""
    module = ModuleType("vllm")
    module.__version__ = "0.0.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    assert Readiness("test").healthz()["versions"]["vllm"] in ("0.0.1", _installed("vllm"))


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
