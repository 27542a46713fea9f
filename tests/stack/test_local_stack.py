"""The supervisor of deploy.local with the real Temporal server and the real broker."""

import asyncio
import json
import os
import re
import signal
import socket
import stat
import sys
from pathlib import Path

import pytest
from temporalio.client import Client
from temporalio.common import SearchAttributePair, TypedSearchAttributes

from deploy.local.errors import ProcessFailed, StateBusy, StateShared
from deploy.local.ports import HOST, free_port
from deploy.local.settings import StackSettings
from deploy.local.stack import Stack
from deploy.local.supervisor import supervise
from jobs.names import USER_ID
from runtime.auth_keys import write_keys
from tests.support.commands import run
from tests.support.local import child_pids, environment
from tests.support.paths import ROOT
from tests.support.stacks import stack_settings

# The test kills this process, which starts the two servers, prints their pids and waits.
SUPERVISOR = """
import asyncio, json, sys
from deploy.local.settings import StackSettings
from deploy.local.stack import Stack

async def main():
    async with Stack(StackSettings(), only=("temporal", "nats")) as stack:
        print(json.dumps({name: process.pid for name, process in stack.processes.items()}), flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def settings(tmp_path: Path) -> StackSettings:
    return stack_settings(tmp_path / "stack", start_timeout=120)


async def all_ended(pids: list[int]) -> None:
    """Return once none of the processes runs. Call it while they run, so that no pid belongs to a new process."""
    loop = asyncio.get_running_loop()

    async def ended(pid: int) -> None:
        end = asyncio.Event()
        descriptor = os.pidfd_open(pid)
        loop.add_reader(descriptor, end.set)
        try:
            await end.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)

    await asyncio.gather(*(ended(pid) for pid in pids))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can end a process with its parent")
async def test_no_process_survives_a_supervisor_that_is_killed(settings: StackSettings) -> None:
    supervisor = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SUPERVISOR, env=environment(settings), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert supervisor.stdout is not None
    pids = json.loads(await supervisor.stdout.readline())
    assert set(pids) == {"temporal", "nats"}
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(all_ended(list(pids.values())))
        supervisor.kill()
    await supervisor.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the children where Linux shows them")
async def test_up_stops_everything_when_told_to_and_ends_with_status_0(settings: StackSettings) -> None:
    up = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.local", "up"),
        env=environment(settings) | {"TEMPORAL_DEPLOYMENT_NAME": "durable-llm", "TEMPORAL_WORKER_BUILD_ID": "2"},
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    assert up.stdout is not None
    first = await up.stdout.readline()
    assert b"TEMPORAL_DEPLOYMENT_NAME, TEMPORAL_WORKER_BUILD_ID" in first
    async for line in up.stdout:
        if line.startswith(b"Ctrl-C"):
            break
    children = child_pids(up.pid)
    assert len(children) == 7
    async with asyncio.timeout(100), asyncio.TaskGroup() as group:
        group.create_task(all_ended(children))
        up.send_signal(signal.SIGINT)
    stopped = [line.split()[0] for line in (await up.stdout.read()).decode().splitlines()]
    assert stopped == ["http", "notifier", "gpu-worker", "gateway", "codec", "nats", "temporal"]
    assert await up.wait() == 0


async def test_up_with_callers_that_are_known_shows_where_the_credential_goes(
    settings: StackSettings, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    write_keys(keys, [])
    up = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.local", "up"),
        env={**environment(settings), "GATEWAY_API_KEYS_FILE": str(keys)},
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    assert up.stdout is not None
    shown = []
    async for line in up.stdout:
        shown.append(line.decode())
        if line.startswith(b"Ctrl-C"):
            break
    up.send_signal(signal.SIGINT)
    await up.communicate()
    assert "-H 'authorization: Bearer <credential>'" in "".join(shown)
    assert up.returncode == 0


@pytest.mark.timeout(600)
async def test_the_demo_shows_a_job_from_its_prompt_to_its_webhook(settings: StackSettings, stack: Stack) -> None:
    """It ends with calls of the HTTP front, which work while a stack runs."""
    demo = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.local", "demo"),
        env={
            **environment(settings),
            "GPU_WORKER_ENGINE_OPTIONS": json.dumps({"tokens_per_second": 500}),
        },
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    shown = (await demo.communicate())[0].decode()
    assert demo.returncode == 0, shown
    assert "[##############################] 100 %  SUCCEEDED" in shown
    assert "JOB_STATE_SUCCEEDED" in shown
    assert '"type": "llm.v1.job.succeeded"' in shown
    (curl,) = re.findall(r"^  (curl .+)$", shown, re.MULTILINE)
    (openai,) = re.findall(r"^  (python -c '[^']+')$", shown, re.MULTILINE)
    (address,) = re.findall(r"^  HTTP +http://(\S+)/jobs", shown, re.MULTILINE)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    events, text = [
        await run("bash", "-c", call.replace(address, stack.address("http")), PATH=path) for call in (curl, openai)
    ]
    assert "event: response.incomplete" in events.output, events.errors
    assert (text.status, bool(text.output)) == (0, True), text.errors


async def test_a_taken_port_ends_up_with_status_1_and_names_port_and_setting(settings: StackSettings) -> None:
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        taken = settings.model_copy(update={"gateway_port": port})
        up = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "deploy.local", "up"),
            env=environment(taken),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await up.communicate()
    assert up.returncode == 1
    assert f"Port {port} is taken" in err.decode()
    assert "STACK_GATEWAY_PORT" in err.decode()
    assert out == b"", "`make up` started something"


async def test_a_port_set_outside_its_range_is_named_by_its_setting(settings: StackSettings) -> None:
    up = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.local", "up"),
        env={**environment(settings), "STACK_NATS_PORT": "65536"},
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await up.communicate()
    assert up.returncode == 1
    assert err.decode().startswith("STACK_NATS_PORT: ")


async def test_a_job_survives_the_kill_of_its_server_and_another_stack_on_the_same_database(
    settings: StackSettings,
) -> None:
    attributes = TypedSearchAttributes([SearchAttributePair(USER_ID, "alice")])
    async with Stack(settings, only=("temporal",)) as stack:
        client = await Client.connect(stack.address("temporal"))
        # The search attributes work immediately, not only after a cache is refreshed.
        await client.start_workflow("Any", id="job", task_queue="nobody", search_attributes=attributes)
        temporal = stack.processes["temporal"]
        await temporal.kill()
        assert temporal.returncode == -signal.SIGKILL
        await temporal.start()
        await temporal.wait_ready()
        assert (await client.get_workflow_handle("job").describe()).typed_search_attributes == attributes
    async with Stack(settings, only=("temporal",)) as stack:
        client = await Client.connect(stack.address("temporal"))
        assert (await client.get_workflow_handle("job").describe()).typed_search_attributes == attributes


async def test_two_stacks_never_run_in_one_state_folder(settings: StackSettings) -> None:
    async with Stack(settings, only=("nats",)):
        with pytest.raises(StateBusy, match="STACK_STATE_DIR"):
            await Stack(settings, only=("nats",)).__aenter__()
    async with Stack(settings, only=("nats",)) as third:
        assert third.processes["nats"].running


async def test_only_its_owner_can_look_into_the_state_folder(settings: StackSettings) -> None:
    """It contains prompts and outputs. An earlier version created it readable for everybody."""
    for _ in ("new", "of an earlier version"):
        async with Stack(settings, only=("temporal", "nats")):
            assert stat.S_IMODE(settings.state_dir.stat().st_mode) == 0o700
        settings.state_dir.chmod(0o755)


@pytest.mark.parametrize("holds", [(), ("thesis.txt",), ("lock", "logs", "thesis.txt"), ("logs",)])
async def test_a_folder_of_others_is_refused_and_stays_as_it_is(
    settings: StackSettings, holds: tuple[str, ...]
) -> None:
    """A setting such as /tmp must not make that folder inaccessible to others."""
    folder = settings.state_dir
    folder.mkdir()
    folder.chmod(0o1777)
    for name in holds:
        (folder / name).touch()
    with pytest.raises(StateShared, match="STACK_STATE_DIR"):
        await Stack(settings, only=("nats",)).__aenter__()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o1777
    assert {path.name for path in folder.iterdir()} == set(holds)


async def test_a_folder_that_is_private_already_is_taken(settings: StackSettings) -> None:
    settings.state_dir.mkdir(mode=0o700)
    async with Stack(settings, only=("nats",)) as stack:
        assert stack.processes["nats"].running


async def test_a_process_that_ends_while_it_starts_shows_why_and_stops_the_rest(settings: StackSettings) -> None:
    stack = Stack(settings, only=("nats", "codec"), environment={"codec": {"CODEC_PORT": "nonsense"}})
    with pytest.raises(
        ProcessFailed,
        match=r"(?s)CODEC_PORT.*\ncodec ended with status 1 before it was ready\. Its log: \S+codec\.log$",
    ):
        await stack.__aenter__()
    assert not stack.processes["nats"].running


async def test_a_server_that_ends_while_the_services_start_is_named_at_once(settings: StackSettings) -> None:
    def kill(name: str, words: str) -> None:
        if name == "nats":
            stack.processes["nats"].signal(signal.SIGKILL)

    # A notifier without Temporal is never ready.
    stack = Stack(settings, only=("nats", "notifier"), report=kill)
    with pytest.raises(ProcessFailed, match="nats was ended by SIGKILL before notifier was ready") as failed:
        await stack.__aenter__()
    assert "Server is ready" in str(failed.value)
    assert not stack.processes["notifier"].running


async def test_a_process_that_ends_stays_down_in_a_stack_that_nobody_supervises(settings: StackSettings) -> None:
    async with Stack(settings, only=("nats",)) as stack:
        nats = stack.processes["nats"]
        await nats.kill()
        assert nats.pid is None
        await nats.start()
        await nats.wait_ready()


async def test_a_process_that_ends_under_a_supervisor_is_started_again(settings: StackSettings) -> None:
    reports: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    async with Stack(settings, only=("nats",)) as stack:

        async def kill_and_see() -> None:
            first = stack.processes["nats"].pid
            await stack.processes["nats"].kill()
            name, words = await reports.get()
            assert name == "nats"
            assert words.startswith("was ended by SIGKILL; starts again in 0.5 s")
            assert await reports.get() == ("nats", "ready again")
            assert stack.processes["nats"].pid not in {first, None}

        await supervise(stack, kill_and_see(), lambda *report: reports.put_nowait(report))


async def test_a_process_that_keeps_ending_ends_the_stack(settings: StackSettings) -> None:
    """The last line says which one, and where its log is."""
    async with Stack(settings, only=("nats",)) as stack:
        nats = stack.processes["nats"]

        async def kill() -> None:
            while True:
                await nats.kill()
                await asyncio.sleep(0.01)

        with pytest.raises(ProcessFailed) as ended:
            await supervise(stack, kill(), lambda *_: None, (0, 0))
    last = str(ended.value).splitlines()[-1]
    assert last == f"nats was ended by SIGKILL again, after 2 restarts. Its log: {nats.log_path}"


async def test_a_second_process_of_a_kind_listens_on_a_port_of_its_own(settings: StackSettings) -> None:
    async with Stack(settings, only=("nats",)) as stack:
        second = stack.add("nats")
        assert second.name == "nats-2"
        assert stack.address("nats-2") != stack.address("nats")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the range where Linux shows it")
def test_a_free_port_is_one_that_no_outgoing_connection_gets() -> None:
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(free_port() < first_ephemeral for _ in range(20))


def test_no_two_stacks_are_given_the_same_free_port() -> None:
    """This holds even before the first stack listens."""
    assert len({free_port() for _ in range(1000)}) == 1000
