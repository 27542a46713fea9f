"""A step of a batch gets its process without a fork of the gateway."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import asyncio, os, time
import uvloop
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment
from llm_pb import internal_pb2
from services.gateway.batches.processes import Processes
from services.gateway.batches.work import PLAN

async def main():
    try:
        await Processes().run(PLAN, internal_pb2.PlanTask())
    except ApplicationError as error:
        print(error.type, error)
    else:
        print("done")

os.register_at_fork(after_in_child=lambda: time.sleep(3600))
with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(ActivityEnvironment().run(main))
"""


@pytest.mark.heavy
def test_a_handler_of_forks_that_waits_for_ever_stops_no_step() -> None:
    """As gRPC's and Python's own do, now and then, where another thread holds their lock while the process forks."""
    assert _run().startswith("STORE_UNAVAILABLE")


@pytest.mark.heavy
def test_a_step_needs_no_file_of_credentials(tmp_path: Path) -> None:
    """The gateway goes on without one that is gone, and its batches failed."""
    assert _run(STORE_URL=tmp_path.as_uri(), GATEWAY_API_KEYS_FILE=str(tmp_path / "gone")).startswith("done")


def _run(**settings: str) -> str:
    """Return what the program prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STORE_")}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[2],
        env=environment | settings,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.stdout, found.stderr
    return found.stdout
