"""The GPU worker as a process: it loads its model, and it ends when its engine dies or hangs."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.jobs import new_job, unpack, until_message, until_output, watch
from tests.support.stacks import FAST, stack_settings

HEARTBEAT_SECONDS = 5
"""Heartbeat timeout of hanging jobs. A live worker on a busy machine is rarely silent for so long."""


@pytest.fixture(scope="module")
async def stack_without_workers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    gateway = {**FAST["gateway"], "GATEWAY_HEARTBEAT_TIMEOUT": f"PT{HEARTBEAT_SECONDS}S"}
    settings = stack_settings(tmp_path_factory.mktemp("worker"))
    only = ("temporal", "nats", "gateway", "notifier")
    async with Stack(settings, only=only, environment={**FAST, "gateway": gateway}) as stack:
        yield stack


@pytest.fixture(scope="module")
async def client(stack_without_workers: Stack) -> AsyncIterator[LlmServiceStub]:
    async with grpc.aio.insecure_channel(stack_without_workers.address("gateway")) as channel:
        yield LlmServiceStub(channel)


def options(**values: Any) -> dict[str, str]:
    """Return the worker's environment for these options of the simulated engine."""
    return {"GPU_WORKER_ENGINE_OPTIONS": json.dumps({"tokens_per_second": 200, **values})}


async def test_a_loading_worker_heartbeats(stack_without_workers: Stack, client: LlmServiceStub) -> None:
    """A job that waits for the model longer than the heartbeat timeout succeeds in its first attempt."""
    load_seconds = 2 * HEARTBEAT_SECONDS
    worker = stack_without_workers.add("gpu-worker", options(load_seconds=load_seconds))
    response = await client.Submit(llm_pb2.SubmitRequest(job=new_job(params={"max_tokens": 5})))
    await worker.start()
    seen = await watch(client, response.workflow_id)
    assert seen.states[-1] == "SUCCEEDED"
    assert seen.final.status.attempt == 1
    assert "loading" in {m.status.progress.stage for m in seen.messages if m.HasField("status")}
    waited = seen.final.result.metadata.time_to_first_token.ToTimedelta()
    assert waited.total_seconds() > load_seconds - 0.5
    await worker.terminate()
    assert worker.returncode == 0


async def until_stage(client: LlmServiceStub, workflow_id: str, stage: str) -> None:
    """Return once an attempt has reached the stage."""
    await until_message(client, workflow_id, lambda message: message.status.progress.stage == stage)


@pytest.mark.parametrize(
    ("stage", "hangs", "attempts"),
    [
        # A worker that never loaded has used up no attempt.
        ("loading", {"load_seconds": 3600}, 1),
        ("prefill", {"prefill_seconds": 3600}, 2),
        ("decode", {"fault": "hang@5"}, 2),
    ],
)
async def test_an_engine_that_hangs_ends_its_worker(
    stack_without_workers: Stack, client: LlmServiceStub, stage: str, hangs: dict[str, Any], attempts: int
) -> None:
    """The worker ends once a stage exceeds its timeout. The job continues at another worker."""
    limits = {f"GPU_WORKER_{name}_TIMEOUT": "PT1S" for name in ("LOAD", "PREFILL", "DECODE")}
    # The worker must end before Temporal's heartbeat timeout, so that the outcome does not depend on the order.
    limits["GPU_WORKER_SHUTDOWN_GRACE"] = "PT0.2S"
    hung = stack_without_workers.add("gpu-worker", {**options(**hangs), **limits})
    await hung.start()
    id_ = (await client.Submit(llm_pb2.SubmitRequest(job=new_job(params={"max_tokens": 20})))).workflow_id
    await until_stage(client, id_, stage)
    assert await hung.wait() == 1
    healthy = stack_without_workers.add("gpu-worker", options())
    await healthy.start()
    seen = await watch(client, id_)
    assert seen.states[-1] == "SUCCEEDED"
    assert seen.rewinds == 0
    assert seen.final.status.attempt >= attempts
    await healthy.terminate()


async def test_a_job_that_hangs_in_an_engine_that_moves_looks_dead(
    stack_without_workers: Stack, client: LlmServiceStub
) -> None:
    """Its heartbeats stop and another attempt starts. Its worker continues with the other jobs."""
    worker = stack_without_workers.add("gpu-worker", {**options(), "GPU_WORKER_DECODE_TIMEOUT": "PT1S"})
    await worker.start()
    bystander = (await client.Submit(llm_pb2.SubmitRequest(job=new_job(params={"max_tokens": 8000})))).workflow_id
    await until_output(client, bystander)
    hanging = new_job("[[fault:hang@5:once]]", params={"max_tokens": 20})
    id_ = (await client.Submit(llm_pb2.SubmitRequest(job=hanging))).workflow_id
    seen = await watch(client, id_)
    assert seen.states[-1] == "SUCCEEDED"
    assert seen.final.status.attempt >= 2
    assert "WORKER_LOST" in {
        unpack(m.status.error)["ErrorInfo"].reason for m in seen.messages if m.status.HasField("error")
    }
    other = await client.GetStatus(llm_pb2.GetStatusRequest(workflow_id=bystander))
    assert other.status.state in (llm_pb2.JOB_STATE_RUNNING, llm_pb2.JOB_STATE_SUCCEEDED)
    assert worker.running
    await client.Cancel(llm_pb2.CancelRequest(workflow_id=bystander))
    assert (await watch(client, bystander)).states[-1] in ("CANCELLED", "SUCCEEDED")
    await worker.terminate()


async def test_a_cancel_in_prefill_tells_what_the_prompt_used(
    stack_without_workers: Stack, client: LlmServiceStub
) -> None:
    """The prompt's tokens are counted although no token was generated."""
    worker = stack_without_workers.add("gpu-worker", options(prefill_seconds=3600))
    await worker.start()
    id_ = (await client.Submit(llm_pb2.SubmitRequest(job=new_job("Twelve bytes")))).workflow_id
    await until_stage(client, id_, "prefill")
    await client.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    seen = await watch(client, id_)
    assert seen.states[-1] == "CANCELLED"
    assert seen.final.result.metadata.prompt_tokens == 12
    assert seen.final.result.metadata.output_tokens == 0
    await worker.terminate()


async def test_a_worker_that_cannot_load_costs_its_jobs_no_attempt(
    stack_without_workers: Stack, client: LlmServiceStub
) -> None:
    """They continue at another worker, even after more failed loads than they have attempts."""
    id_ = (await client.Submit(llm_pb2.SubmitRequest(job=new_job(params={"max_tokens": 5})))).workflow_id
    tried, load_seconds = 0, 1
    while tried < 4:
        failing = options(load_seconds=load_seconds, load_error="no such weights")
        worker = stack_without_workers.add("gpu-worker", failing)
        await worker.start()
        assert await worker.wait() == 1
        if "attempt started" in worker.log:
            tried += 1
        else:
            # On a busy machine the worker may end before it has taken the job.
            load_seconds *= 2
    healthy = stack_without_workers.add("gpu-worker", options())
    await healthy.start()
    seen = await watch(client, id_)
    assert seen.states[-1] == "SUCCEEDED"
    assert seen.final.status.attempt == seen.final.result.metadata.attempts <= 3
    await healthy.terminate()


async def test_a_worker_that_cannot_load_ends(stack_without_workers: Stack) -> None:
    """It exits with status 1 and the reason in its log."""
    worker = stack_without_workers.add("gpu-worker", options(load_error="no such weights"))
    await worker.start()
    assert await worker.wait() == 1
    assert "no such weights" in worker.log


async def test_a_dead_engine_ends_its_worker(stack_without_workers: Stack, client: LlmServiceStub) -> None:
    """The worker exits with status 1. Its jobs continue at another worker."""
    first = stack_without_workers.add("gpu-worker", options())
    await first.start()
    await first.wait_ready()
    bystander = new_job(params={"max_tokens": 600})
    id_ = (await client.Submit(llm_pb2.SubmitRequest(job=bystander))).workflow_id
    watching = asyncio.create_task(watch(client, id_))
    await until_output(client, id_)
    deadly = new_job("[[fault:die@5:once]]", params={"max_tokens": 10})
    deadly_id = (await client.Submit(llm_pb2.SubmitRequest(job=deadly))).workflow_id
    watching_deadly = asyncio.create_task(watch(client, deadly_id))
    assert await first.wait() == 1
    second = stack_without_workers.add("gpu-worker", options())
    await second.start()
    for seen in (await watching, await watching_deadly):
        assert seen.states[-1] == "SUCCEEDED"
        assert seen.rewinds == 0
        assert seen.final.status.attempt >= 2
        assert "ENGINE_DEAD" in {
            unpack(m.status.error)["ErrorInfo"].reason for m in seen.messages if m.status.HasField("error")
        }
    await second.terminate()


async def test_an_engine_that_does_not_exist_is_refused(stack_without_workers: Stack) -> None:
    """The error comes at the start and names the setting."""
    worker = stack_without_workers.add("gpu-worker", {"GPU_WORKER_ENGINE": "tensorflow"})
    await worker.start()
    assert await worker.wait() == 1
    assert "GPU_WORKER_ENGINE" in worker.log


async def test_a_job_that_waits_after_a_handover_says_what_went_before(
    stack_without_workers: Stack, client: LlmServiceStub
) -> None:
    """It reports the last attempt and why it ended, although Temporal's own count restarts with each handover."""
    worker = stack_without_workers.add("gpu-worker", {**options(), "GPU_WORKER_SHUTDOWN_GRACE": "PT0.2S"})
    await worker.start()
    job = new_job("[[fault:failed@5:once]]", params={"max_tokens": 4000})
    id_ = (await client.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    before = await until(client, id_, lambda status: status.attempt >= 2 and status.progress.stage == "decode")
    await worker.terminate()
    waiting = await until(client, id_, lambda status: status.state == llm_pb2.JOB_STATE_QUEUED)
    assert waiting.attempt >= before.attempt
    assert unpack(waiting.error)["ErrorInfo"].reason == "WORKER_SHUTDOWN"
    assert waiting.start_time.ToNanoseconds() >= before.start_time.ToNanoseconds()
    assert waiting.HasField("first_token_time")
    found = (await client.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))).attempts
    assert [llm_pb2.AttemptEnd.Name(one.end) for one in found] == ["ATTEMPT_END_FAILED", "ATTEMPT_END_HANDED_OVER"]
    second = stack_without_workers.add("gpu-worker", options(prefill_seconds=3600))
    await second.start()
    running = await until(client, id_, lambda status: status.state == llm_pb2.JOB_STATE_RUNNING)
    assert running.attempt >= before.attempt
    assert unpack(running.error)["ErrorInfo"].reason == "WORKER_SHUTDOWN"
    await client.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    seen = await watch(client, id_)
    assert seen.states[-1] == "CANCELLED"
    assert unpack(seen.final.status.error)["ErrorInfo"].reason == "CANCELLED"
    await second.terminate()


async def until(client: LlmServiceStub, id_: str, true: Callable[[llm_pb2.JobStatus], bool]) -> llm_pb2.JobStatus:
    """Poll GetStatus, and return the first status for which `true` returns True."""
    request = llm_pb2.GetStatusRequest(workflow_id=id_)
    while not true(status := (await client.GetStatus(request)).status):  # noqa: ASYNC110  # GetStatus is under test
        await asyncio.sleep(0.05)
    return status
