"""The canary of a model: a schedule of the gateway's own, whose outcomes are metrics."""

import asyncio
import json

import grpc
import pytest

from deploy.local.stack import Stack
from llm_pb import llm_pb2, schedule_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.schedule_pb2_grpc import ScheduleServiceStub
from tests.support.schedules import ended, get, until
from tests.support.scrapes import Scrape, scrape_until

pytestmark = pytest.mark.timeout(400)
ID = "llmschedule-llm.canary-docstrings"


async def test_canaries_follow_the_settings(stack: Stack) -> None:
    """They are created, updated and deleted at a start, and count outcomes and times to the first token."""
    schedules: ScheduleServiceStub
    canary = {"interval": "PT5S", "models": ["docstrings", "idle"]}
    settings = {"GATEWAY_WORKFLOW_QUEUE": "canaries", "GATEWAY_CANARY": json.dumps(canary)}
    first = stack.add("gateway", settings)
    second = stack.add("gateway", settings)
    other = stack.add("gateway", {**settings, "GATEWAY_CANARY": '{"interval": "PT3M", "models": ["docstrings"]}'})
    off = stack.add("gateway", {"GATEWAY_WORKFLOW_QUEUE": "canaries"})
    await asyncio.gather(first.start(), second.start())
    await first.wait_ready()
    await second.wait_ready()
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        schedules = ScheduleServiceStub(channel)
        await until_there(schedules, ID)
        (run, *_) = ended(await until(schedules, ID, ended))
        assert run.state == llm_pb2.JOB_STATE_SUCCEEDED
        job = (await LlmServiceStub(channel).GetJob(llm_pb2.GetJobRequest(workflow_id=run.workflow_id))).job
        assert job.params.max_tokens == 8
        assert job.user_id == "llm.canary"
        # No worker serves this model. The job ends before the next one starts.
        idle = "llmschedule-llm.canary-idle"
        status = await until(schedules, idle, lambda status: len(ended(status)) >= 3)
        assert {run.state for run in ended(status)} == {llm_pb2.JOB_STATE_TIMED_OUT}
        assert ended(status)[-1].failures_in_a_row == len(ended(status))

        def counted(shown: Scrape) -> bool:
            runs = shown.by("llm_canary_runs_total", "gen_ai_request_model", "llm_job_state")
            assert runs.get(("docstrings", "failed"), 0) == 0
            times = shown.by("llm_canary_time_to_first_token_seconds_count", "gen_ai_request_model")
            return (
                {key for key, count in runs.items() if count} == {("docstrings", "succeeded"), ("idle", "timed_out")}
                # Each can end in five ways.
                and len(runs) == 10
                and runs["idle", "timed_out"] >= 3
                and times.keys() == {("docstrings",)}
            )

        await scrape_until(stack, counted, first.name, second.name)
        await first.terminate()
        await second.terminate()
        await other.start()
        await other.wait_ready()
        await until_gone(schedules, idle)
        async with asyncio.timeout(60):
            while (await get(schedules, ID)).schedule.times.intervals[0].every.seconds != 180:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        await other.terminate()
        await off.start()
        await off.wait_ready()
        await until_gone(schedules, ID)
        await off.terminate()


async def is_there(schedules: ScheduleServiceStub, id_: str) -> bool:
    try:
        await schedules.GetSchedule(schedule_pb2.GetScheduleRequest(schedule_id=id_))
    except grpc.aio.AioRpcError as error:
        assert error.code() == grpc.StatusCode.NOT_FOUND  # noqa: PT017  anything else is a fault
        return False
    return True


async def until_there(schedules: ScheduleServiceStub, id_: str) -> None:
    async with asyncio.timeout(60):
        while not await is_there(schedules, id_):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def until_gone(schedules: ScheduleServiceStub, id_: str) -> None:
    async with asyncio.timeout(60):
        while await is_there(schedules, id_):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
