"""Priority orders jobs at the GPU and nowhere else, and no user gets ahead of others without permission."""

import asyncio

import grpc
import pytest
from temporalio.client import Client

from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.jobs import details_of, new_job
from tests.support.turns import new_turns

MANY = 20

pytestmark = pytest.mark.timeout(400)


async def test_a_user_of_many_jobs_at_the_highest_priority_does_not_pass_others_by(stack: Stack) -> None:
    async with new_turns(stack, "turns-fair") as turns:
        highest = 1
        while True:
            try:
                flood = [await turns.submit("many", highest)]
            except grpc.aio.AioRpcError as error:
                assert error.code() == grpc.StatusCode.INVALID_ARGUMENT  # noqa: PT017  the next one is lower
                highest += 1
            else:
                break
        flood += await asyncio.gather(*(turns.submit("many", highest) for _ in range(MANY - 1)))
        other = await turns.submit("few")
        order = await turns.started([*flood, other])
        assert order.index(other) < MANY // 2


async def test_a_priority_above_the_operators_is_refused_by_name(stub: LlmServiceStub) -> None:
    for priority in (1, 2):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Submit(llm_pb2.SubmitRequest(job=new_job(priority=priority)))
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        (violation,) = details_of(refused.value)["BadRequest"].field_violations
        assert violation.field == "job.priority"
        assert "3 (first) to 5 (last)" in violation.description


async def test_priority_is_of_the_gpus_turn_alone(stack: Stack, temporal: Client) -> None:
    """A job of low priority is not delayed elsewhere: its workflow tasks and deliveries are scheduled fairly."""
    async with new_turns(stack, "turns-ordered", GATEWAY_HIGHEST_PRIORITY="1") as turns:
        ids = {priority: await turns.submit(f"user-of-{priority}", priority) for priority in (5, 0, 1)}
        for priority, id_ in ids.items():
            handle = temporal.get_workflow_handle(id_)
            while not (described := (await handle.describe()).raw_description).pending_activities:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            own = described.workflow_execution_info.priority
            assert own.priority_key == 0
            assert own.fairness_key == f"user-of-{priority}"
            (at_the_gpu,) = described.pending_activities
            assert at_the_gpu.priority.priority_key == (priority or 3)
            assert at_the_gpu.priority.fairness_key == f"user-of-{priority}"
        assert await turns.started(list(ids.values())) == [ids[1], ids[0], ids[5]]
