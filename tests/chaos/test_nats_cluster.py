"""The live feed on three NATS servers, which hold the stream together and lose one after the other."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import NamedTuple

import grpc
import pytest

from deploy.local.process import Process
from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.jobs import Seen, new_job, run_job, watch
from tests.support.nats_cluster import Cluster, running_cluster
from tests.support.stacks import FAST, stack_settings
from tests.support.watchers import watch_in_pieces, when_output_reaches

pytestmark = pytest.mark.long
TOKENS = 1500
PARAMS = {"temperature": 0.0, "max_tokens": TOKENS, "min_tokens": TOKENS}
FAST_WORKER = {
    "GPU_WORKER_MODEL": "idle",
    "GPU_WORKER_TASK_QUEUE": "llm-gpu-activities.idle",
    "GPU_WORKER_ENGINE_OPTIONS": '{"tokens_per_second": 100000}',
}
"""The simulated engine generates the same text for the same prompt, however fast."""


class Broken(NamedTuple):
    stack: Stack
    cluster: Cluster
    stub: LlmServiceStub
    expected: bytes

    def worker_of(self, status: llm_pb2.JobStatus) -> Process:
        pid = int(status.progress.worker.rpartition("-")[2])
        (process,) = [process for process in self.stack.processes.values() if process.pid == pid]
        return process

    def check(self, watchers: list[Seen]) -> None:
        for seen in watchers:
            assert (seen.states[-1], seen.rewinds) == ("SUCCEEDED", 0)
            assert seen.output == seen.final.result.output.encode() == self.expected
            assert seen.final.result.metadata.attempts == 2


@pytest.fixture(scope="module")
async def broken(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Broken]:
    folder = tmp_path_factory.mktemp("cluster")
    async with running_cluster(folder) as cluster:
        feed = {"FEED_URL": cluster.url, "FEED_REPLICAS": "3"}
        options = json.dumps({"tokens_per_second": 60})
        environment = {
            "gateway": {**FAST["gateway"], "GATEWAY_HEARTBEAT_TIMEOUT": "PT3S", **feed},
            "gpu-worker": {**FAST["gpu-worker"], "GPU_WORKER_ENGINE_OPTIONS": options, **feed},
        }
        only = ("temporal", "gateway", "gpu-worker")
        async with (
            Stack(stack_settings(folder / "stack", gpu_workers=2), only=only, environment=environment) as stack,
            grpc.aio.insecure_channel(stack.address("gateway")) as channel,
        ):
            await cluster.leader(replicas=2)
            stub = LlmServiceStub(channel)
            fast = stack.add("gpu-worker", {**FAST_WORKER, **feed})
            await fast.start()
            expected = (await run_job(stub, new_job(model="idle", params=PARAMS))).output
            await fast.terminate()
            yield Broken(stack, cluster, stub, expected)


async def test_the_output_goes_on_live_when_a_server_dies_and_a_worker_after_it(broken: Broken) -> None:
    """The server leads the stream. The others have the whole log, so the next attempt continues after it."""
    leader = await broken.cluster.leader(replicas=2)
    request = llm_pb2.SubmitRequest(job=new_job(params=PARAMS))
    id_ = (await broken.stub.Submit(request)).workflow_id
    early = asyncio.create_task(watch(broken.stub, id_))
    pieces = asyncio.create_task(watch_in_pieces(broken.stub, id_, random.Random(0)))
    await when_output_reaches(broken.stub, id_, len(broken.expected) // 10)
    await leader.kill()
    assert await broken.cluster.leader() is not leader
    late = asyncio.create_task(watch(broken.stub, id_))
    await when_output_reaches(broken.stub, id_, 3 * len(broken.expected) // 5)
    running = await broken.stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))
    await broken.worker_of(running.status).kill()
    watchers = [await early, await pieces, await late]
    broken.check(watchers)
    offsets = [message.delta.offset for message in watchers[0].messages if message.HasField("delta")]
    assert sum(offset > len(broken.expected) // 2 for offset in offsets) > 10, "the output was not live again"
    await leader.start()
    await broken.cluster.leader(replicas=2)
