"""No accepted job is lost when the Temporal server dies, because its database file has everything."""

import asyncio
import signal
from pathlib import Path

import grpc
import pytest

from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.jobs import details_of, new_job, until_output, watch
from tests.support.stacks import FAST, stack_settings


async def test_jobs_survive_the_sigkill_of_temporal(tmp_path: Path) -> None:
    """Queued and running jobs all succeed. The watchers' streams are not interrupted."""
    async with (
        Stack(stack_settings(tmp_path), environment=FAST) as stack,
        grpc.aio.insecure_channel(stack.address("gateway")) as channel,
    ):
        stub, temporal = LlmServiceStub(channel), stack.processes["temporal"]
        jobs = [new_job(f"{n}", params={"max_tokens": 300 + 10 * n}) for n in range(20)]
        ids = [(await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id for job in jobs]
        watching = [asyncio.create_task(watch(stub, id_)) for id_ in ids[:10]]
        await until_output(stub, ids[-1])
        await temporal.kill()
        await temporal.start()
        await temporal.wait_ready()
        for seen in [*await asyncio.gather(*watching), *[await watch(stub, id_) for id_ in ids[10:]]]:
            assert seen.states[-1] == "SUCCEEDED"
            assert seen.output == seen.final.result.output.encode()
            assert seen.final.result.metadata.output_tokens >= 300


async def test_a_temporal_that_hangs_is_a_reason_to_call_again(tmp_path: Path) -> None:
    """The SDK reports CANCELLED at its own timeout. The gateway returns UNAVAILABLE with RetryInfo instead."""
    async with (
        Stack(stack_settings(tmp_path), only=("temporal", "gateway"), environment=FAST) as stack,
        grpc.aio.insecure_channel(stack.address("gateway")) as channel,
    ):
        stack.processes["temporal"].signal(signal.SIGSTOP)
        stub = LlmServiceStub(channel)
        submit = stub.Submit(llm_pb2.SubmitRequest(job=new_job()), timeout=60)
        look = stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id="llmjob-a-b"), timeout=60)
        for call in (submit, look):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE
            assert error.value.details() == "Temporal has not answered in time; call again"
            details = details_of(error.value)
            assert details["ErrorInfo"].reason == "TEMPORAL_UNAVAILABLE"
            assert details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() > 0
        stack.processes["temporal"].signal(signal.SIGCONT)
