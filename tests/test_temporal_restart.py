"""Nothing that was accepted is lost with the Temporal server: its file is enough."""

import asyncio
from pathlib import Path

import grpc

from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.conftest import FAST, new_job, stack_settings, until_output, watch


async def test_jobs_survive_the_sigkill_of_temporal(tmp_path: Path) -> None:
    """Jobs in the queue, at work and being watched all finish; their watchers never notice."""
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
