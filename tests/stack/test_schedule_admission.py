"""The job of a schedule is admitted when it runs: by the settings, the quota and the tenant of that moment."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from temporalio.client import Client

from deploy.local.process import Process
from deploy.local.stack import Stack
from jobs.ids import tenant_of
from llm_pb import llm_pb2, schedule_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.schedule_pb2_grpc import ScheduleServiceStub
from runtime.scopes import SCOPES
from tests.support.credentials import CallsAs, KeyFile
from tests.support.encryption import Keys
from tests.support.files import bad_fields
from tests.support.jobs import details_of, new_job, unpack, until_output, watch
from tests.support.schedules import create, delete, ended, every, get, new_schedule, trigger, until
from tests.support.scrapes import scrape_until
from tests.support.stacks import FAST, stack_settings

pytestmark = pytest.mark.timeout(600)
LONG = {"max_tokens": 8000}
REQUESTS = {
    "GetSchedule": schedule_pb2.GetScheduleRequest,
    "PauseSchedule": schedule_pb2.PauseScheduleRequest,
    "UnpauseSchedule": schedule_pb2.UnpauseScheduleRequest,
    "TriggerSchedule": schedule_pb2.TriggerScheduleRequest,
    "DeleteSchedule": schedule_pb2.DeleteScheduleRequest,
}


@asynccontextmanager
async def gateways(stack: Stack, *settings: dict[str, str]) -> AsyncIterator[list[tuple[grpc.aio.Channel, Process]]]:
    """Run gateways with a queue of their own, so that they alone run the workflows of their schedules."""
    async with asyncio.timeout(300):
        made = [stack.add("gateway", more) for more in settings]
        for process in made:
            await process.start()
            await process.wait_ready()
    channels = [grpc.aio.insecure_channel(stack.address(process.name)) for process in made]
    try:
        yield list(zip(channels, made, strict=True))
    finally:
        for channel, process in zip(channels, made, strict=True):
            await channel.close()
            await process.terminate()


async def test_the_times_of_a_schedule_leave_the_operators_interval(stack: Stack) -> None:
    """Two times of one expression or interval. Those of different ones may lie closer together, as the docs say."""
    settings = {"GATEWAY_SCHEDULE_MIN_INTERVAL": "PT10M", "GATEWAY_WORKFLOW_QUEUE": "schedules-of-intervals"}
    shifted = [{"every": {"seconds": 600}}, {"every": {"seconds": 600}, "offset": {"seconds": 1}}]
    async with gateways(stack, settings) as [(channel, _)]:
        calls = ScheduleServiceStub(channel)
        for times, field in (
            ({"cron": ["0 0 * * *", "*/9 * * * *"]}, "schedule.times.cron[1]"),
            ({"intervals": [*shifted, {"every": {"seconds": 599}}]}, "schedule.times.intervals[2].every"),
        ):
            assert await bad_fields(create(calls, new_schedule(times=times))) == {field}
        for times in ({"cron": ["*/10 * * * *", "1,11,21 * * * *"]}, {"intervals": shifted}):
            await delete(calls, await create(calls, new_schedule(times=times), paused=True))


async def test_schedules_of_another_tenant_do_not_exist(stack: Stack, tmp_path: Path, stub: LlmServiceStub) -> None:
    file = KeyFile(tmp_path / "keys.json")
    key = {tenant: file.add(SCOPES, tenant=tenant) for tenant in ("acme", "globex")}
    bound = file.add(SCOPES, tenant="acme", user_id="bob")
    settings = {"GATEWAY_API_KEYS_FILE": str(file.path), "GATEWAY_WORKFLOW_QUEUE": "schedules-of-tenants"}
    async with gateways(stack, settings) as [(channel, _)]:
        calls = ScheduleServiceStub(channel)
        acme, globex, bob = (CallsAs(calls, each) for each in (key["acme"], key["globex"], bound))
        schedule = new_schedule(user_id="nora", request_id="nightly")
        id_ = await create(acme, schedule, paused=True)
        assert id_ == "llmschedule--acme-nora-nightly"
        assert await create(globex, schedule, paused=True) == "llmschedule--globex-nora-nightly"
        for other in (globex, bob):
            for method, kind in REQUESTS.items():
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await getattr(other, method)(kind(schedule_id=id_))
                missing = id_.replace("nightly", "missing")
                with pytest.raises(grpc.aio.AioRpcError) as nothing:
                    await getattr(other, method)(kind(schedule_id=missing))
                assert error.value.code() == grpc.StatusCode.NOT_FOUND
                expected = str(nothing.value.details()).replace(missing, id_)
                assert error.value.details() == expected
                assert details_of(error.value) == details_of(nothing.value)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await create(bob, new_schedule(user_id="nora"))
        assert details_of(error.value)["ErrorInfo"].reason == "USER_NOT_ALLOWED"
        await trigger(acme, id_)
        (run,) = ended(await until(acme, id_, ended))
        assert run.workflow_id.startswith("llmjob--acme-nora-nightly-")
        assert tenant_of(run.workflow_id) == "acme"
        async with asyncio.timeout(60):
            mine = schedule_pb2.ListSchedulesRequest(user_id="nora")
            while not (listed := (await acme.ListSchedules(mine)).schedules):  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        assert [item.schedule_id for item in listed] == [id_]
        await delete(acme, id_)
        await delete(globex, "llmschedule--globex-nora-nightly")


async def test_a_job_beyond_the_quota_is_refused_and_the_schedule_goes_on(stack: Stack, tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    key = file.add(SCOPES, tenant="limited")
    settings = {
        "GATEWAY_API_KEYS_FILE": str(file.path),
        "GATEWAY_WORKFLOW_QUEUE": "schedules-of-quotas",
        "GATEWAY_TENANTS": json.dumps({"limited": {"max_open_jobs": 1}}),
    }
    async with gateways(stack, settings) as [(channel, gateway)]:
        schedules, jobs = CallsAs(ScheduleServiceStub(channel), key), CallsAs(LlmServiceStub(channel), key)
        id_ = await create(schedules, new_schedule(), paused=True)
        open_job = (await jobs.Submit(llm_pb2.SubmitRequest(job=new_job(params=LONG)))).workflow_id
        await until_output(jobs, open_job)
        await trigger(schedules, id_)
        (run,) = ended(await until(schedules, id_, ended))
        assert not run.workflow_id
        assert unpack(run.error)["ErrorInfo"].reason == "QUOTA_EXCEEDED"
        assert run.failures_in_a_row == 1
        await jobs.Cancel(llm_pb2.CancelRequest(workflow_id=open_job))
        await watch(jobs, open_job)
        await trigger(schedules, id_)
        run = ended(await until(schedules, id_, lambda status: len(ended(status)) == 2))[-1]
        assert run.state == llm_pb2.JOB_STATE_SUCCEEDED
        assert run.failures_in_a_row == 0
        quota = (await jobs.GetQuota(llm_pb2.GetQuotaRequest())).open_jobs
        assert quota.used == 0
        counted = {("refused",): 1.0, ("succeeded",): 1.0}
        runs = lambda shown: shown.by("llm_schedule_runs_total", "llm_job_state")  # noqa: E731
        await scrape_until(stack, lambda shown: runs(shown) == counted, gateway.name)
        await delete(schedules, id_)


async def test_the_jobs_of_a_schedule_use_the_quota_of_tokens(stack: Stack, tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    key = file.add(SCOPES, tenant="metered")
    settings = {
        "GATEWAY_API_KEYS_FILE": str(file.path),
        "GATEWAY_WORKFLOW_QUEUE": "schedules-of-token-quotas",
        "GATEWAY_TENANTS": json.dumps({"metered": {"max_output_tokens_per_day": 20}}),
    }
    async with gateways(stack, settings) as [(channel, _)]:
        schedules, jobs = CallsAs(ScheduleServiceStub(channel), key), CallsAs(LlmServiceStub(channel), key)
        # Temporal learns of the end of a run a moment later, and would leave out the next one until then.
        overlap = schedule_pb2.OVERLAP_POLICY_ALLOW_ALL
        id_ = await create(schedules, new_schedule(params={"max_tokens": 8}, overlap=overlap), paused=True)
        for number in (1, 2, 3):
            await trigger(schedules, id_)
            runs = ended(await until(schedules, id_, lambda status, number=number: len(ended(status)) == number))
            quota = (await jobs.GetQuota(llm_pb2.GetQuotaRequest())).output_tokens
            assert (quota.used, quota.reserved) == (8 * min(number, 2), 0)
        refused, *succeeded = sorted(runs, key=lambda run: bool(run.workflow_id))
        assert {run.state for run in succeeded} == {llm_pb2.JOB_STATE_SUCCEEDED}
        assert unpack(refused.error)["ErrorInfo"].metadata["quota"] == "max_output_tokens_per_day"


async def test_the_models_of_the_time_when_it_runs_count(stack: Stack) -> None:
    """The gateway that runs the workflows does not have the model any more that the one had which took the schedule."""
    model = {"name": "gone", "context_tokens": 100, "max_output_tokens": 100, "default_max_tokens": 10}
    before = {"GATEWAY_WORKFLOW_QUEUE": "schedules-of-models", "GATEWAY_ROLE": "api"}
    after = {"GATEWAY_WORKFLOW_QUEUE": "schedules-of-models", "GATEWAY_ROLE": "workflows"}
    async with gateways(stack, {**before, "GATEWAY_MODELS": json.dumps([model])}, after) as [(channel, _), _]:
        schedules = ScheduleServiceStub(channel)
        id_ = await create(schedules, new_schedule(model="gone"), paused=True)
        await trigger(schedules, id_)
        (run,) = ended(await until(schedules, id_, ended))
        assert not run.workflow_id
        (violation,) = unpack(run.error)["BadRequest"].field_violations
        assert violation.field == "job.model"
        await delete(schedules, id_)


async def test_a_tenant_has_a_maximum_number_of_schedules(stack: Stack, tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    key = file.add(SCOPES, tenant="few")
    settings = {"GATEWAY_API_KEYS_FILE": str(file.path), "GATEWAY_MAX_SCHEDULES": "1"}
    async with gateways(stack, settings) as [(channel, _)]:
        schedules = CallsAs(ScheduleServiceStub(channel), key)
        first = new_schedule()
        id_ = await create(schedules, first)
        async with asyncio.timeout(60):
            while not (await schedules.ListSchedules(schedule_pb2.ListSchedulesRequest())).schedules:  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await create(schedules, new_schedule())
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        # The bound is of new schedules.
        assert await create(schedules, first) == id_
        await delete(schedules, id_)


async def test_runs_go_on_when_the_gateway_is_killed(stack: Stack) -> None:
    settings = {"GATEWAY_WORKFLOW_QUEUE": "schedules-of-killed"}
    async with gateways(stack, settings) as [(channel, gateway)]:
        schedules, jobs = ScheduleServiceStub(channel), LlmServiceStub(channel)
        id_ = await create(schedules, new_schedule(params={"max_tokens": 800}), paused=True)
        await trigger(schedules, id_)
        running = await until(schedules, id_, lambda status: status.recent_runs and status.recent_runs[0].workflow_id)
        await until_output(jobs, running.recent_runs[0].workflow_id)
        await gateway.kill()
        await gateway.start()
        await gateway.wait_ready()
        async with grpc.aio.insecure_channel(stack.address(gateway.name)) as again:
            (run,) = ended(await until(ScheduleServiceStub(again), id_, ended))
            assert run.workflow_id == running.recent_runs[0].workflow_id
            assert run.state == llm_pb2.JOB_STATE_SUCCEEDED
            await delete(ScheduleServiceStub(again), id_)


async def test_nothing_of_a_schedule_is_in_clear_where_payloads_are_encrypted(tmp_path: Path) -> None:
    keys, file = Keys(tmp_path), KeyFile(tmp_path / "keys.json")
    services: dict[str, dict[str, str]] = {
        kind: {**FAST.get(kind, {}), **more, "ENCRYPTION_SEARCH_ATTRIBUTES": "hashed"}
        for kind, more in keys.for_services().items()
    }
    services["gateway"]["GATEWAY_API_KEYS_FILE"] = str(file.path)
    acme = file.add(SCOPES, tenant="acme")
    async with Stack(stack_settings(tmp_path / "stack"), environment=services) as stack:  # noqa: SIM117  the channel needs it
        async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
            schedules: Any = CallsAs(ScheduleServiceStub(channel), acme)
            schedule = new_schedule("xyzzyprompt", user_id="xyzzyuser", request_id="xyzzyrequest", times=every(1))
            id_ = await create(schedules, schedule)
            (run, *_) = ended(await until(schedules, id_, ended))
            assert run.state == llm_pb2.JOB_STATE_SUCCEEDED
            assert (await get(schedules, id_)).schedule == schedule
            async with asyncio.timeout(60):
                while not (listed := (await schedules.ListSchedules(schedule_pb2.ListSchedulesRequest())).schedules):  # noqa: ASYNC110
                    await asyncio.sleep(0.2)
            assert (listed[0].user_id, listed[0].request_id) == ("xyzzyuser", "xyzzyrequest")
            found = await schedules.ListSchedules(schedule_pb2.ListSchedulesRequest(user_id="xyzzyuser"))
            assert [item.schedule_id for item in found.schedules] == [id_]
            await schedules.PauseSchedule(schedule_pb2.PauseScheduleRequest(schedule_id=id_))
            temporal = await Client.connect(stack.address("temporal"))
            described = (await temporal.get_schedule_handle(id_).describe()).raw_description
            (payload,) = described.schedule.action.start_workflow.input.payloads
            assert payload.metadata["encryption-tenant"] == b"acme"
            assert all(item.metadata["encryption-tenant"] == b"acme" for item in described.memo.fields.values())
            # The ids are in clear, as those of jobs are.
            stored = described.SerializeToString().replace(id_.encode(), b"")
            assert b"xyzzy" not in stored.replace(run.workflow_id.encode(), b"")
            for started in described.info.recent_actions:
                execution = started.start_workflow_result
                history = await temporal.get_workflow_handle(
                    execution.workflow_id, run_id=execution.run_id
                ).fetch_history()
                assert "xyzzyprompt" not in history.to_json()
            keys.store.delete("acme")
            await stack.processes["gateway"].terminate()
            await stack.processes["gateway"].start()
            await stack.processes["gateway"].wait_ready()
            request = schedule_pb2.GetScheduleRequest(schedule_id=id_)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await schedules.GetSchedule(request, wait_for_ready=True)
            assert details_of(error.value)["ErrorInfo"].reason == "CONTENT_UNREADABLE"
            # What nobody can read any more can be deleted nevertheless.
            await delete(schedules, id_)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await schedules.GetSchedule(request)
            assert error.value.code() == grpc.StatusCode.NOT_FOUND
