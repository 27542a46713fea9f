"""A step of a batch gets its process without a fork of the gateway, and without another start of Python."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from llm_pb import internal_pb2
from services.gateway.batches.processes import Processes
from services.gateway.batches.work import PLAN
from tests.support.files import until
from tests.support.local import child_pids

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


class Gateway:
    """What this process runs as a gateway."""

    def __init__(self) -> None:
        self._processes = Processes()
        self._others = set(child_pids(os.getpid()))

    async def plan(self, *names: str) -> None:
        """Plan a batch whose content is these objects."""
        task = internal_pb2.PlanTask()
        for name in names:
            task.content.add(name=name, size=1)
        await ActivityEnvironment().run(self._processes.run, PLAN, task)

    @property
    def programs(self) -> set[int]:
        """The ids of the processes that it has started."""
        return set(child_pids(os.getpid())) - self._others

    @property
    def steps(self) -> list[int]:
        """The ids of the processes that do steps."""
        return [step for program in self.programs for step in child_pids(program)]


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gateway:
    monkeypatch.setenv("STORE_URL", tmp_path.as_uri())
    return Gateway()


@pytest.mark.heavy
async def test_the_steps_of_a_gateway_share_the_start_of_their_program(gateway: Gateway) -> None:
    """The imports took longer than the plan of two thousand lines."""
    await gateway.plan()
    started = gateway.programs
    await gateway.plan()
    assert len(started) == 1
    assert gateway.programs == started


@pytest.mark.heavy
async def test_a_program_that_has_ended_is_started_again(gateway: Gateway) -> None:
    await gateway.plan()
    (program,) = gateway.programs
    os.kill(program, signal.SIGKILL)
    await asyncio.to_thread(os.waitid, os.P_PID, program, os.WEXITED | os.WNOWAIT)
    await gateway.plan()
    assert program not in gateway.programs


@pytest.mark.heavy
@pytest.mark.parametrize("is_killed", [False, True])
async def test_a_step_ends_with_its_cancel_and_with_its_process(
    gateway: Gateway, tmp_path: Path, *, is_killed: bool
) -> None:
    # Whoever reads it waits for ever.
    os.mkfifo(tmp_path / "lines")
    planning = asyncio.create_task(gateway.plan("lines"))
    await until(lambda: bool(gateway.steps))
    (step,) = gateway.steps
    if is_killed:
        os.kill(step, signal.SIGKILL)
        with pytest.raises(ApplicationError, match="has failed"):
            await planning
    else:
        planning.cancel()
        with pytest.raises(asyncio.CancelledError):
            await planning
    await until(lambda: not gateway.steps)
    await gateway.plan()
