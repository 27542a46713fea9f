"""Readiness, asked of an event loop that does other things meanwhile."""

import asyncio
import sys
from importlib import metadata
from types import ModuleType

import pytest

from runtime.health import Readiness


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
