"""Outputs and prompts that are files, on an encrypted stack whose workers die and whose store goes away."""

import asyncio
import contextlib
import itertools
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest

from deploy.local.process import Process
from deploy.local.process_specs import STORE
from deploy.local.stack import Stack
from llm_pb import common_pb2, llm_pb2
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.deletions import delete as delete_job
from tests.support.encryption import Keys
from tests.support.files import PATIENCE, delete, download, new_file, objects, sha256, until, until_gone, upload
from tests.support.jobs import Seen, new_job, run_job, watch
from tests.support.stacks import FAST, SOON_LOST, stack_settings
from tests.support.watchers import when_output_reaches

INLINE_BYTES = 1024 * 1024
TOKENS = 600
"""More than 2 MiB of text."""
_prompts = itertools.count()


class Files(NamedTuple):
    """A stack with two workers, and what the tests need of it."""

    stack: Stack
    stub: LlmServiceStub
    files: FileServiceStub
    store: Path

    @property
    def workers(self) -> list[Process]:
        return [process for name, process in self.stack.processes.items() if name.startswith("gpu-worker")]

    def worker_of(self, status: llm_pb2.JobStatus) -> Process:
        pid = int(status.progress.worker.rpartition("-")[2])
        (process,) = [process for process in self.workers if process.pid == pid]
        return process

    @contextlib.contextmanager
    def store_away(self) -> Iterator[None]:
        elsewhere = self.store.with_name("elsewhere")
        self.store.rename(elsewhere)
        try:
            yield
        finally:
            elsewhere.rename(self.store)

    async def submit(self, job: llm_pb2.JobRequest) -> str:
        response = await self.stub.Submit(llm_pb2.SubmitRequest(job=job), timeout=PATIENCE)
        return str(response.workflow_id)


@pytest.fixture(scope="module")
async def one(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Files]:
    folder = tmp_path_factory.mktemp("large-outputs")
    keys = Keys(folder).environment
    environment = {
        **FAST,
        "gateway": {
            **FAST["gateway"],
            **keys,
            **SOON_LOST,
            "GATEWAY_FILE_SWEEP_INTERVAL": "PT1S",
            "GATEWAY_FILE_SWEEP_AGE": "PT5S",
            "GATEWAY_MODELS": """[{"name": "docstrings", "context_tokens": 8000000, "max_output_tokens": 8000,
             "default_max_tokens": 64}]""",
        },
        "gpu-worker": {
            **FAST["gpu-worker"],
            **keys,
            "GPU_WORKER_SHUTDOWN_GRACE": "PT0.2S",
            "GPU_WORKER_ENGINE_OPTIONS": '{"tokens_per_second": 200, "context_tokens": 8000000}',
        },
        "notifier": {**FAST["notifier"], **keys},
    }
    settings = stack_settings(folder / "stack", gpu_workers=2)
    only = ("temporal", "nats", "gateway", "gpu-worker", "notifier")
    async with (
        Stack(settings, only=only, environment=environment) as stack,
        grpc.aio.insecure_channel(stack.address("gateway")) as channel,
    ):
        yield Files(stack, LlmServiceStub(channel), FileServiceStub(channel), settings.state_dir / STORE)


@pytest.fixture(autouse=True)
async def workers(one: Files) -> None:
    """Start the workers that earlier tests ended."""
    for process in one.workers:
        if not process.running:
            await process.start()
    for process in one.workers:
        await process.wait_ready()


def large_job(script: str = "", tokens: int = TOKENS, **changes: object) -> llm_pb2.JobRequest:
    params = llm_pb2.SamplingParams(max_tokens=tokens, seed=7)
    return new_job(f"[[wide]] {next(_prompts)} {script}", params=params, **changes)


def same_again(job: llm_pb2.JobRequest) -> llm_pb2.JobRequest:
    again = llm_pb2.JobRequest()
    again.CopyFrom(job)
    again.request_id += "-again"
    return again


async def assert_is_file(one: Files, seen: Seen) -> None:
    """Assert that the result names a file that holds what the watcher saw."""
    ref = seen.final.result.output_file
    assert not seen.final.result.output
    assert (ref.size_bytes, ref.sha256) == (len(seen.output), sha256(seen.output))
    assert await download(one.files, ref.file_id) == seen.output
    assert (await watch(one.stub, seen.final.status.workflow_id)).output == seen.output


async def test_no_byte_of_it_is_in_clear_and_it_goes_with_its_job(one: Files) -> None:
    seen = await run_job(one.stub, large_job(tokens=300))
    await assert_is_file(one, seen)
    found = object_of(one, seen)
    assert found.name.endswith(".enc")
    stored = found.read_bytes()
    assert not any(seen.output[at : at + 40] in stored for at in range(0, len(seen.output), 100_000))
    deletion = await delete_job(one.stub, seen.final.status.workflow_id)
    assert llm_pb2.JOB_PART_OUTPUT in deletion.removed
    assert not found.exists()
    await until_gone(one.files, seen.final.result.output_file.file_id)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
async def test_a_worker_that_ends_in_the_middle_costs_nothing(one: Files, how: signal.Signals) -> None:
    job = large_job()
    undisturbed = await run_job(one.stub, job)
    id_ = await one.submit(same_again(job))
    watching = asyncio.create_task(watch(one.stub, id_))
    one.worker_of(await when_output_reaches(one.stub, id_, INLINE_BYTES + 200_000)).signal(how)
    seen = await watching
    assert seen.output == undisturbed.output
    assert seen.rewinds == 0
    await assert_is_file(one, seen)


async def test_the_end_of_a_job_waits_for_the_store(one: Files) -> None:
    """Also while the worker dies that waits."""
    job = large_job()
    undisturbed = await run_job(one.stub, job)
    id_ = await one.submit(same_again(job))
    watching = asyncio.create_task(watch(one.stub, id_))
    status = await when_output_reaches(one.stub, id_, INLINE_BYTES)
    with one.store_away():
        await when_output_reaches(one.stub, id_, len(undisturbed.output))
        one.worker_of(status).signal(signal.SIGKILL)
        await until(lambda: waits_again(one, id_))
        assert not watching.done()
    seen = await watching
    assert seen.final.status.state == llm_pb2.JOB_STATE_SUCCEEDED, seen.final.status.error
    assert seen.output == undisturbed.output
    await assert_is_file(one, seen)


async def waits_again(one: Files, id_: str) -> bool:
    """Return whether a later attempt has generated all. A busy machine may lose several: heartbeats are late."""
    status = (await one.stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_), timeout=PATIENCE)).status
    return bool(status.attempt > 1 and status.progress.stage == "done")


async def test_a_cancelled_and_a_failed_job_keep_their_large_outputs(one: Files) -> None:
    id_ = await one.submit(large_job(tokens=8000))
    watching = asyncio.create_task(watch(one.stub, id_))
    await when_output_reaches(one.stub, id_, INLINE_BYTES + 100_000)
    await one.stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_), timeout=PATIENCE)
    seen = await watching
    assert seen.final.status.state == llm_pb2.JOB_STATE_CANCELLED
    await assert_is_file(one, seen)
    seen = await run_job(one.stub, large_job("[[fault:failed@300]]"))
    assert seen.final.status.state == llm_pb2.JOB_STATE_FAILED
    await assert_is_file(one, seen)


async def test_a_lost_attempts_large_output_is_read_back_from_the_feed(one: Files) -> None:
    """The job runs out of time while no worker is there."""
    job = large_job(tokens=8000)
    job.timeouts.total.FromSeconds(25)
    id_ = await one.submit(job)
    watching = asyncio.create_task(watch(one.stub, id_))
    await when_output_reaches(one.stub, id_, INLINE_BYTES + 100_000)
    for process in one.workers:
        await process.kill()
    seen = await watching
    assert seen.final.status.state == llm_pb2.JOB_STATE_TIMED_OUT, seen.final.status
    assert len(seen.output) > INLINE_BYTES
    await assert_is_file(one, seen)


async def test_a_watcher_whose_feed_is_lost_gets_the_rest_from_the_store(one: Files) -> None:
    job = large_job()
    undisturbed = await run_job(one.stub, job)
    id_ = await one.submit(same_again(job))
    watching = asyncio.create_task(watch(one.stub, id_))
    await when_output_reaches(one.stub, id_, 300_000)
    nats = one.stack.processes["nats"]
    await nats.kill()
    seen = await watching
    await nats.start()
    await nats.wait_ready()
    assert seen.final.status.state == llm_pb2.JOB_STATE_SUCCEEDED, seen.final.status.error
    assert seen.output == undisturbed.output
    assert seen.rewinds == 0
    await assert_is_file(one, seen)


async def test_objects_that_no_result_names_are_swept(one: Files) -> None:
    seen = await run_job(one.stub, large_job(tokens=300))
    await assert_is_file(one, seen)
    named = object_of(one, seen)
    left = Path(str(named).replace(f"/{named.parts[-3]}/", f"/{'0' * 32}/"))
    left.parent.mkdir(parents=True)
    shutil.copyfile(named, left)
    await until(lambda: not left.exists())
    await assert_is_file(one, seen)


def object_of(one: Files, seen: Seen) -> Path:
    """Return the object that holds an output."""
    digits = seen.final.result.output_file.file_id.removeprefix("output-")
    (found,) = [path for path in objects(one.store) if f"/{digits[:32]}/{digits[32:]}/" in str(path)]
    return found


async def test_a_prompt_of_some_megabytes_is_a_file(one: Files) -> None:
    text = "Grüße 🙂 " * 200_000
    file = await upload(one.files, new_file(), text.encode())
    job = new_job(params={"max_tokens": 20, "seed": 7})
    job.ClearField("prompt")
    job.prompt_file.file_id = file.ref.file_id
    seen = await run_job(one.stub, job)
    assert seen.final.status.state == llm_pb2.JOB_STATE_SUCCEEDED, seen.final.status.error
    assert seen.final.result.metadata.prompt_tokens == len(text.encode())
    got = await one.stub.GetJob(llm_pb2.GetJobRequest(workflow_id=seen.final.status.workflow_id), timeout=PATIENCE)
    assert got.job == job


def job_of(ref: common_pb2.FileRef, tokens: int) -> llm_pb2.JobRequest:
    job = new_job(params={"max_tokens": tokens, "seed": 7})
    job.ClearField("prompt")
    job.prompt_file.CopyFrom(ref)
    return job


async def test_an_attempt_waits_for_the_store_of_its_prompt(one: Files) -> None:
    ref = (await upload(one.files, new_file(), b"Say something.")).ref
    undisturbed = await run_job(one.stub, new_job("Say something.", params={"max_tokens": 1000, "seed": 7}))
    id_ = await one.submit(job_of(ref, 1000))
    watching = asyncio.create_task(watch(one.stub, id_))
    status = await when_output_reaches(one.stub, id_, 100)
    with one.store_away():
        one.worker_of(status).signal(signal.SIGKILL)
        await until(lambda: waits_for_file(one, id_))
    seen = await watching
    assert seen.output == undisturbed.output
    assert seen.rewinds == 0


async def test_a_job_whose_file_is_gone_fails(one: Files) -> None:
    ref = (await upload(one.files, new_file(), b"Say something.")).ref
    for process in one.workers:
        await process.kill()
    id_ = await one.submit(job_of(ref, 20))
    await delete(one.files, ref.file_id)
    await one.workers[0].start()
    seen = await watch(one.stub, id_)
    assert seen.final.status.state == llm_pb2.JOB_STATE_FAILED
    assert b"PROMPT_FILE_MISSING" in seen.final.status.error.SerializeToString()


async def waits_for_file(one: Files, id_: str) -> bool:
    status = (await one.stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_), timeout=PATIENCE)).status
    return bool(status.state == llm_pb2.JOB_STATE_RUNNING and status.progress.stage == "loading")
