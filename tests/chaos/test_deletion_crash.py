"""The gateway, which runs the steps of a deletion, is killed between every two of them, and the deletion ends."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import NamedTuple

import grpc
import pytest
from temporalio.api.enums.v1 import EventType
from temporalio.client import Client

from deploy.local.stack import Stack
from jobs import names
from jobs.ids import delivery_workflow_id
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from payload_converter import data_converter
from tests.support.deletions import feed_holds, feed_messages, run_exists, until_no_rows
from tests.support.jobs import details_of, new_job, until_output, watch, webhook
from tests.support.stacks import FAST, stack_settings

PATIENCE = 480
STEPS = (EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED, EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED)


class Killing(NamedTuple):
    stack: Stack
    stub: LlmServiceStub
    temporal: Client


@pytest.fixture(scope="module")
async def killing(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Killing]:
    """A stack with two gateways: clients call the first; the second one runs the workflows and is killed."""
    gateway = {**FAST["gateway"], "GATEWAY_ROLE": "api"}
    settings = stack_settings(tmp_path_factory.mktemp("deletions"))
    only = ("temporal", "nats", "gateway", "gpu-worker", "notifier")
    async with (
        Stack(settings, only=only, environment={**FAST, "gateway": gateway}) as stack,
        grpc.aio.insecure_channel(stack.address("gateway")) as channel,
    ):
        temporal = await Client.connect(stack.address("temporal"), data_converter=data_converter)
        yield Killing(stack, LlmServiceStub(channel), temporal)


class Deleting(NamedTuple):
    """A job that is being deleted."""

    job: llm_pb2.JobRequest
    run_id: str
    id: str
    deletion_id: str


async def delete(stub: LlmServiceStub, *, runs: bool) -> Deleting:
    """Delete a job that runs, or one that has succeeded."""
    marker = f"marker{uuid.uuid4().hex}"
    job = new_job(marker, params={"max_tokens": 8000 if runs else 3}, notify=webhook("http://127.0.0.1:9/hook"))
    accepted = await stub.Submit(llm_pb2.SubmitRequest(job=job))
    if runs:
        await until_output(stub, accepted.workflow_id)
    else:
        await watch(stub, accepted.workflow_id)
    request = llm_pb2.DeleteJobRequest(workflow_id=accepted.workflow_id)
    deletion = (await stub.DeleteJob(request)).deletion
    return Deleting(job, accepted.run_id, accepted.workflow_id, deletion.deletion_id)


@pytest.mark.timeout(600)
async def test_a_gateway_killed_between_any_two_steps(killing: Killing) -> None:
    """Of two deletions at once, because a step whose gateway was killed is tried again 15 s later."""
    stack, stub, temporal = killing
    worker = stack.add("gateway", {"GATEWAY_ROLE": "workflows"})
    await worker.start()
    await worker.wait_ready()
    both = [await delete(stub, runs=True), await delete(stub, runs=False)]
    one_at_a_time = asyncio.Lock()

    async def kill_at_steps(one: Deleting) -> int:
        """Kill the gateway at each beginning and end of a step that Temporal notes; return how often."""
        kills = 0
        handle = temporal.get_workflow_handle(one.deletion_id)
        async for event in handle.fetch_history_events(wait_new_event=True):
            if event.event_type not in STEPS:
                continue
            async with one_at_a_time:
                await worker.kill()
                kills += 1
                # At no moment is the id free, or the job's.
                description = await temporal.get_workflow_handle(one.id).describe()
                assert description.workflow_type in (names.JOB_WORKFLOW_TYPE, names.TOMBSTONE_WORKFLOW_TYPE)
                await worker.start()
        return kills

    async with asyncio.timeout(PATIENCE):
        kills = await asyncio.gather(*map(kill_at_steps, both))
    # Four steps at least, each of which begins and ends.
    assert min(kills) >= 8
    await worker.wait_ready()
    for one in both:
        request = llm_pb2.GetDeletionRequest(deletion_id=one.deletion_id)
        ended = (await stub.GetDeletion(request)).deletion
        assert ended.state == llm_pb2.DELETION_STATE_DONE
        # Who was notified is not forgotten, whenever the process died.
        assert [copy for copy in ended.unreached if copy.place.startswith("http://127.0.0.1:9")]
        assert not await run_exists(temporal, one.id, one.run_id)
        assert not await run_exists(temporal, delivery_workflow_id(one.id))
        assert await feed_messages(stack, one.run_id) == 0
        assert not await feed_holds(stack, one.job.prompt)
        await until_no_rows(stack, one.job.prompt)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Submit(llm_pb2.SubmitRequest(job=one.job))
        assert details_of(error.value)["ErrorInfo"].reason == "JOB_DELETED"
    await worker.terminate()
