"""Worker Versioning on a real server: what runs on the code that started it, and what moves to new code."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from temporalio.client import Client

from deploy.local.probes import CHANNEL_OPTIONS
from deploy.local.process import Process
from deploy.local.stack import Stack
from durable_llm import AsyncClient, Output
from llm_pb import llm_pb2, pipeline_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from payload_converter import data_converter
from tests.support.jobs import new_job, watch
from tests.support.pipelines import answer, follow, new_pipeline, submit
from tests.support.stacks import FAST, stack_settings, temporal_cli

DEPLOYMENT = "durable-llm"
PATIENCE = 120
OLD = """
    await llm.generate("old", model="docstrings", prompt="Old.", max_tokens=4)
    approved = await llm.approve("approve", "Go on?")
    await llm.generate("old-too", model="docstrings", prompt="Old, too.", max_tokens=4)
    return StringValue(value=f"old {approved}")
"""
NEW = """
    first = await llm.generate("new", model="docstrings", prompt="New.", max_tokens=4)
    return StringValue(value="new")
"""


def installed(folder: Path, code: str) -> str:
    """Install a pipeline with this code into a folder; return the PYTHONPATH with it."""
    package = folder / "changing-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: changing\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[durable_llm.pipelines]\nchanging = changing\n")
    (folder / "changing.py").write_text(
        "from google.protobuf.wrappers_pb2 import StringValue\n"
        "from pipelines import pipeline\n\n\n"
        '@pipeline("changing", StringValue, StringValue)\n'
        f"async def changing(llm, _):{code}"
    )
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))


class Versions:
    """Two gateways: each serves the API, and runs workflows by its own code."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self.stack = stack
        self._folder = folder
        self.stubs: dict[str, tuple[Any, Any]] = {}
        self.gateways: dict[str, Process] = {}
        self._channels: list[grpc.aio.Channel] = []

    async def start(self, build: str, code: str) -> Process:
        path = installed(self._folder / build, code)
        version = {"TEMPORAL_DEPLOYMENT_NAME": DEPLOYMENT, "TEMPORAL_WORKER_BUILD_ID": build, "PYTHONPATH": path}
        gateway = self.gateways[build] = self.stack.add("gateway", version)
        await gateway.start()
        await gateway.wait_ready()
        channel = grpc.aio.insecure_channel(self.stack.address(gateway.name))
        self._channels.append(channel)
        self.stubs[build] = LlmServiceStub(channel), PipelineServiceStub(channel)
        return gateway

    async def serving(self, build: str, code: str) -> tuple[Any, Any]:
        """Start a gateway of the build unless an earlier test has, and return the stubs of its jobs and pipelines."""
        if build not in self.gateways:
            await self.start(build, code)
        return self.stubs[build]

    async def set_current(self, build: str, deployment: str = DEPLOYMENT, queues: int = 4) -> None:
        """Set the current version, as an operator would, once its workers have polled so many queues.

        The queues learn of it some moments later.

        Activities and workflows of one queue count as two.
        """
        version = ("--deployment-name", deployment, "--build-id", build)
        known = ("worker", "deployment", "describe-version", *version)
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    polled = json.loads(await temporal_cli(self.stack, *known, "-o", "json"))
                except AssertionError:
                    polled = {}
                if len(polled.get("taskQueuesInfos") or ()) >= queues:
                    break
                await asyncio.sleep(0.2)
        await temporal_cli(self.stack, "worker", "deployment", "set-current-version", *version, "--yes")

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


@pytest.fixture(scope="module")
async def versions(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Versions]:
    folder = tmp_path_factory.mktemp("versions")
    only = ("temporal", "nats", "gpu-worker")
    async with Stack(stack_settings(folder / "stack"), only=only, environment=FAST) as stack:
        found = Versions(stack, folder)
        yield found
        await found.close()


@pytest.fixture(scope="module")
async def client(versions: Versions) -> Client:
    return await Client.connect(versions.stack.address("temporal"), data_converter=data_converter)


async def builds_of(client: Client, workflow_id: str) -> list[str]:
    """Return the build that completed each workflow task, in their order."""
    history = await client.get_workflow_handle(workflow_id).fetch_history()
    done = [
        event.workflow_task_completed_event_attributes
        for event in history.events
        if event.HasField("workflow_task_completed_event_attributes")
    ]
    return [one.deployment_version.build_id for one in done]


async def started_eagerly(client: Client, workflow_id: str) -> bool:
    history = await client.get_workflow_handle(workflow_id).fetch_history()
    return history.events[0].workflow_execution_started_event_attributes.eager_execution_accepted


def value_of(result: pipeline_pb2.PipelineResult | None) -> str:
    assert result is not None
    value = StringValue()
    assert result.value.Unpack(value)
    return value.value


async def waits(stub: Any, pipeline_id: str) -> None:
    """Return once the pipeline waits for its approval."""
    await follow(stub, pipeline_id, until=lambda seen: "approve" in seen.steps)


async def accepted(stub: Any, **changes: Any) -> str:
    request = llm_pb2.SubmitRequest(job=new_job(params={"max_tokens": 5}, **changes))
    return str((await stub.Submit(request, timeout=PATIENCE)).workflow_id)


async def test_a_pipeline_ends_on_its_code_and_jobs_move_to_the_current_one(versions: Versions, client: Client) -> None:
    """New code is deployed under both, under a load of jobs, and rolled back. Nothing is lost or runs twice."""
    jobs, pipelines = await versions.serving("1.0", OLD)
    early = await accepted(jobs)
    # There is no current version, so no worker has got the job.
    assert not await builds_of(client, early)
    await versions.set_current("1.0")
    assert (await watch(jobs, early)).states[-1] == "SUCCEEDED"

    waiting = (await submit(pipelines, new_pipeline("changing", StringValue()))).pipeline_id
    await waits(pipelines, waiting)
    # It waits for a worker all the time.
    idle = await accepted(jobs, model="idle")
    new_jobs, new_pipelines = await versions.serving("1.1", NEW)
    # At the build that is not current. An eager start would run there.
    at_next = await accepted(new_jobs)
    assert (await watch(new_jobs, at_next)).states[-1] == "SUCCEEDED"
    assert set(await builds_of(client, at_next)) == {"1.0"}
    assert not await started_eagerly(client, at_next)

    async def until_current(build: str) -> None:
        """Return once a new job begins on a build."""
        async with asyncio.timeout(PATIENCE):
            while True:
                id_ = await accepted(jobs)
                await watch(jobs, id_)
                if (await builds_of(client, id_))[0] == build:
                    return

    stopped = asyncio.Event()

    async def load(stub: Any) -> list[str]:
        ids = []
        while not stopped.is_set():
            ids.append(await accepted(stub))
            assert (await watch(stub, ids[-1])).states[-1] == "SUCCEEDED"
        return ids

    async with asyncio.TaskGroup() as tasks:
        loads = [tasks.create_task(load(stub)) for stub in (jobs, jobs, new_jobs, new_jobs)]
        await versions.set_current("1.1")
        await until_current("1.1")
        moved = (await submit(pipelines, new_pipeline("changing", StringValue()))).pipeline_id
        assert value_of((await follow(pipelines, moved)).result) == "new"
        await versions.set_current("1.0")
        await until_current("1.0")
        back = (await submit(new_pipelines, new_pipeline("changing", StringValue()))).pipeline_id
        await waits(new_pipelines, back)
        await versions.set_current("1.1")
        await until_current("1.1")
        stopped.set()
    ids = [id_ for task in loads for id_ in task.result()]
    statuses = [await jobs.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_), timeout=PATIENCE) for id_ in ids]
    assert {one.result.metadata.attempts for one in statuses} == {1}

    await jobs.Cancel(llm_pb2.CancelRequest(workflow_id=idle), timeout=PATIENCE)
    assert (await watch(jobs, idle)).states[-1] == "CANCELLED"
    of_idle = await builds_of(client, idle)
    assert (of_idle[0], of_idle[-1]) == ("1.0", "1.1")
    for id_ in (waiting, back):
        await answer(new_pipelines, id_, "approve", "yes", approved=True)
        assert value_of((await follow(new_pipelines, id_)).result) == "old True"
        assert set(await builds_of(client, id_)) == {"1.0"}


async def stream_jobs(client: AsyncClient, stopped: asyncio.Event) -> list[llm_pb2.JobResult]:
    """Run one job after the other and return their results. Raises whatever a call or a job fails with."""
    results = []
    while not stopped.is_set():
        # It takes several times the grace of a worker, so that one that is stopped hands it over.
        job = await client.submit(new_job(params={"max_tokens": 1200, "min_tokens": 1200}))
        output = Output()
        async for piece in job.stream():
            assert not piece.rewind
            output.add(piece)
        result = await job.result()
        assert output.text == result.output
        results.append(result)
    return results


@pytest.mark.long
async def test_a_roll_out_under_load_fails_no_call_and_loses_no_attempt(versions: Versions) -> None:
    """Every worker and gateway is replaced while jobs stream. A pipeline first ends on its old code."""
    _, pipelines = await versions.serving("1.0", OLD)
    await versions.serving("1.1", NEW)
    old, new = (versions.gateways[build] for build in ("1.0", "1.1"))
    worker, surge = versions.stack.processes["gpu-worker"], versions.stack.add("gpu-worker")
    await versions.set_current("1.0")
    async with asyncio.timeout(PATIENCE):
        while True:
            waiting = (await submit(pipelines, new_pipeline("changing", StringValue()))).pipeline_id
            # The queues learn of the current version some moments later.
            if "approve" in (await follow(pipelines, waiting, until=lambda seen: "approve" in seen.steps)).steps:
                break
    await versions.set_current("1.1")
    stopped = asyncio.Event()
    addresses = [versions.stack.address(gateway.name) for gateway in (old, new)]
    async with (
        AsyncClient(f"ipv4:{','.join(addresses)}", options=CHANNEL_OPTIONS) as one,
        AsyncClient(f"ipv4:{','.join(reversed(addresses))}", options=CHANNEL_OPTIONS) as other,
        asyncio.timeout(PATIENCE),
        asyncio.TaskGroup() as tasks,
    ):
        loads = [tasks.create_task(stream_jobs(client, stopped)) for client in (one, one, one, other, other, other)]
        for joining, leaving in ((surge, worker), (worker, surge)):
            await joining.start()
            await joining.wait_ready()
            leaving.signal(signal.SIGTERM)
            assert await leaving.wait() == 0
        await answer(versions.stubs["1.1"][1], waiting, "approve", "yes", approved=True)
        assert value_of((await follow(versions.stubs["1.1"][1], waiting)).result) == "old True"
        for gateway in (old, new):
            gateway.signal(signal.SIGTERM)
            assert await gateway.wait() == 0
            await gateway.start()
            await gateway.wait_ready()
        stopped.set()
    # Each attempt that a worker has begun. On a busy machine Temporal itself may lose one that none has.
    handed_over = [result for load in loads for result in load.result() if len(result.attempts) > 1]
    assert handed_over, "no worker was stopped in the middle of a job"
    for result in handed_over:
        assert result.metadata.attempts == 1
        assert {attempt.end for attempt in result.attempts[:-1]} == {llm_pb2.ATTEMPT_END_HANDED_OVER}


async def test_gpu_workers_may_have_versions_of_their_own(versions: Versions) -> None:
    """A worker gets jobs while its version is the current one, whatever the version of the workflow."""
    stack, (jobs, pipelines) = versions.stack, await versions.serving("1.1", NEW)
    await versions.set_current("1.1")
    workers = {"": stack.processes["gpu-worker"]}
    for build in ("a", "b"):
        version = {"TEMPORAL_DEPLOYMENT_NAME": "gpu", "TEMPORAL_WORKER_BUILD_ID": build}
        workers[build] = stack.add("gpu-worker", version)
        await workers[build].start()
        await workers[build].wait_ready()

    async def builds() -> set[str]:
        """Return the builds of the workers that run a few jobs."""
        watched = [await watch(jobs, await accepted(jobs)) for _ in range(4)]
        pids = {seen.final.result.metadata.worker.rpartition("-")[2] for seen in watched}
        return {build for build, worker in workers.items() if str(worker.pid) in pids}

    assert await builds() == {""}
    for build in ("a", "b", "a"):
        await versions.set_current(build, "gpu", queues=2)
        async with asyncio.timeout(PATIENCE):
            while await builds() != {build}:
                pass
    pipeline = (await submit(pipelines, new_pipeline("changing", StringValue()))).pipeline_id
    seen = await follow(pipelines, pipeline)
    assert value_of(seen.result) == "new"
