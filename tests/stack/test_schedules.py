"""Schedules start jobs at their times, by real schedules of a real Temporal."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from temporalio.client import Client, ScheduleOverlapPolicy

from deploy.local.stack import Stack
from jobs.ids import workflow_id
from llm_pb import common_pb2, llm_pb2, schedule_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.schedule_pb2_grpc import ScheduleServiceStub
from tests.support.jobs import details_of, unpack, until_output
from tests.support.schedules import create, delete, ended, every, get, new_schedule, trigger, until

pytestmark = pytest.mark.timeout(400)
LONG = {"max_tokens": 8000}
"""About 40 s at the simulated engine."""


@pytest.fixture(scope="module")
async def schedules(stack: Stack) -> AsyncIterator[ScheduleServiceStub]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield ScheduleServiceStub(channel)


def at(time: datetime) -> Timestamp:
    made = Timestamp()
    made.FromDatetime(time)
    return made


async def test_jobs_start_on_time_and_have_ids_of_their_times(
    schedules: ScheduleServiceStub, stub: LlmServiceStub
) -> None:
    # The delay of a run changes no nominal time.
    schedule = new_schedule(times=every(2, jitter={"seconds": 1}))
    id_ = await create(schedules, schedule)
    assert id_ == f"llmschedule-{schedule.user_id.replace('-', '--')}-{schedule.request_id}"
    status = await until(schedules, id_, lambda status: len(ended(status)) >= 2)
    await delete(schedules, id_)
    for run in ended(status)[:2]:
        assert run.state == llm_pb2.JOB_STATE_SUCCEEDED
        assert run.failures_in_a_row == 0
        assert run.nominal_time.seconds % 2 == 0
        request_id = f"{schedule.request_id}-{run.nominal_time.ToJsonString()}"
        assert run.workflow_id == workflow_id(schedule.user_id, request_id)
        found = await stub.GetJob(llm_pb2.GetJobRequest(workflow_id=run.workflow_id))
        assert found.status.state == llm_pb2.JOB_STATE_SUCCEEDED
        assert found.job.job_class == common_pb2.JOB_CLASS_SCHEDULED
        assert found.job.prompt == schedule.job.prompt
        assert found.result.output


async def test_a_repeat_finds_the_schedule_and_another_one_is_refused(schedules: ScheduleServiceStub) -> None:
    schedule = new_schedule()
    id_ = await create(schedules, schedule)
    assert await create(schedules, schedule) == id_
    other = schedule_pb2.Schedule()
    other.CopyFrom(schedule)
    other.job.prompt = "Another one."
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await create(schedules, other)
    assert error.value.code() == grpc.StatusCode.ALREADY_EXISTS
    assert details_of(error.value)["ErrorInfo"].reason == "REQUEST_ID_REUSED"
    await schedules.UpdateSchedule(schedule_pb2.UpdateScheduleRequest(schedule_id=id_, schedule=other))
    assert (await get(schedules, id_)).schedule == other
    # The one that was created counts, not what it has become.
    assert await create(schedules, schedule) == id_
    await delete(schedules, id_)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await get(schedules, id_)
    assert error.value.code() == grpc.StatusCode.NOT_FOUND
    assert details_of(error.value)["ErrorInfo"].reason == "SCHEDULE_NOT_FOUND"
    assert await create(schedules, other) == id_


async def test_a_time_is_left_out_while_a_job_runs(schedules: ScheduleServiceStub, stub: LlmServiceStub) -> None:
    schedule = new_schedule(times=every(1), params=LONG)
    id_ = await create(schedules, schedule)
    status = await until(schedules, id_, lambda status: status.skipped >= 3)
    (run,) = status.recent_runs
    assert not run.state
    await until_output(stub, run.workflow_id)
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=run.workflow_id))
    # The run ends with its job, so the next one starts.
    status = await until(schedules, id_, lambda status: len(status.recent_runs) > 1)
    assert status.recent_runs[0].state == llm_pb2.JOB_STATE_CANCELLED
    await schedules.PauseSchedule(schedule_pb2.PauseScheduleRequest(schedule_id=id_))
    status = await until(schedules, id_, lambda status: status.recent_runs[-1].workflow_id)
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=status.recent_runs[-1].workflow_id))
    await delete(schedules, id_)


async def test_a_run_may_cancel_the_one_before(schedules: ScheduleServiceStub, stub: LlmServiceStub) -> None:
    schedule = new_schedule(params=LONG, overlap=schedule_pb2.OVERLAP_POLICY_CANCEL_OTHER)
    id_ = await create(schedules, schedule)
    await trigger(schedules, id_)
    first = (
        await until(schedules, id_, lambda status: status.recent_runs and status.recent_runs[0].workflow_id)
    ).recent_runs[0]
    await until_output(stub, first.workflow_id)
    await trigger(schedules, id_)
    status = await until(
        schedules, id_, lambda status: len(status.recent_runs) > 1 and status.recent_runs[1].workflow_id
    )
    assert status.recent_runs[0].state == llm_pb2.JOB_STATE_CANCELLED
    result = (await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=first.workflow_id))).result
    assert result.output
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=status.recent_runs[1].workflow_id))
    await delete(schedules, id_)


async def test_a_run_ends_with_its_job_however_that_ends(
    schedules: ScheduleServiceStub, stub: LlmServiceStub, temporal: Client
) -> None:
    """Also one that Temporal has terminated, which tells nobody, and one that was deleted."""
    for end in ("terminated", "deleted"):
        id_ = await create(schedules, new_schedule(params=LONG), paused=True)
        await trigger(schedules, id_)
        status = await until(schedules, id_, lambda status: status.recent_runs and status.recent_runs[0].workflow_id)
        (run,) = status.recent_runs
        await until_output(stub, run.workflow_id)
        handle = temporal.get_workflow_handle(f"{id_}-{run.nominal_time.ToJsonString()}")
        if end == "terminated":
            await temporal.get_workflow_handle(run.workflow_id).terminate()
        else:
            await stub.DeleteJob(llm_pb2.DeleteJobRequest(workflow_id=run.workflow_id))
        async with asyncio.timeout(150):
            await handle.result()
        (run,) = (await get(schedules, id_)).status.recent_runs
        # The deletion cancels the job first, and the run may see either.
        assert run.state in ({llm_pb2.JOB_STATE_CANCELLED} if end == "terminated" else {llm_pb2.JOB_STATE_CANCELLED, 0})
        assert run.failures_in_a_row == 0
        await delete(schedules, id_)


async def test_a_paused_schedule_runs_when_it_is_triggered_alone(schedules: ScheduleServiceStub) -> None:
    id_ = await create(schedules, new_schedule(times=every(1)), paused=True)
    assert (await get(schedules, id_)).status.paused
    await trigger(schedules, id_)
    status = await until(schedules, id_, ended)
    assert status.runs == 1
    await schedules.UnpauseSchedule(schedule_pb2.UnpauseScheduleRequest(schedule_id=id_, note="it is fine"))
    status = await until(schedules, id_, lambda status: status.runs >= 2)
    assert not status.paused
    assert status.note == "it is fine"
    await schedules.PauseSchedule(schedule_pb2.PauseScheduleRequest(schedule_id=id_, note="too much"))
    status = (await get(schedules, id_)).status
    assert status.paused
    assert status.note == "too much"
    await delete(schedules, id_)


async def test_a_backfill_has_the_ids_of_its_times_and_runs_none_twice(
    schedules: ScheduleServiceStub, stub: LlmServiceStub
) -> None:
    schedule = new_schedule(times={"cron": ["*/5 * * * *"]})
    id_ = await create(schedules, schedule, paused=True)
    end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=2)
    request = schedule_pb2.BackfillScheduleRequest(
        schedule_id=id_, start_time=at(end - timedelta(minutes=10)), end_time=at(end)
    )
    assert (await schedules.BackfillSchedule(request)).times == 3
    status = await until(schedules, id_, lambda status: len(ended(status)) == 3)
    times = [run.nominal_time.ToDatetime(UTC) for run in status.recent_runs]
    assert times == [end - timedelta(minutes=10), end - timedelta(minutes=5), end]
    jobs = [run.workflow_id for run in status.recent_runs]
    assert jobs[0].endswith(times[0].strftime("-%Y-%m-%dT%H:%M:%SZ"))
    before = [(await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=job))).status.run_id for job in jobs]
    await schedules.BackfillSchedule(request)
    status = await until(schedules, id_, lambda status: len(ended(status)) == 6)
    assert [run.workflow_id for run in status.recent_runs[3:]] == jobs
    after = [(await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=job))).status.run_id for job in jobs]
    assert after == before
    request.start_time.FromDatetime(end - timedelta(days=3))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await schedules.BackfillSchedule(request)
    (violation,) = details_of(error.value)["BadRequest"].field_violations
    assert violation.field == "end_time"
    await delete(schedules, id_)


@pytest.mark.parametrize(
    ("days", "expected"),
    [
        # On the 29th of March 2026 the clock goes from 02:00 to 03:00.
        ("2026-03-28/2026-03-30", ["2026-03-28T01:30:00Z", "2026-03-30T00:30:00Z"]),
        # On the 25th of October it goes from 03:00 back to 02:00.
        ("2026-10-24/2026-10-26", ["2026-10-24T00:30:00Z", "2026-10-25T01:30:00Z", "2026-10-26T01:30:00Z"]),
    ],
)
async def test_times_are_those_of_the_zone_when_its_clocks_change(
    schedules: ScheduleServiceStub, days: str, expected: list[str]
) -> None:
    """A time that does not exist has no run. One that comes twice has one, at the second time."""
    schedule = new_schedule(times={"cron": ["30 2 * * *"], "time_zone": "Europe/Berlin"})
    id_ = await create(schedules, schedule, paused=True)
    first, last = (datetime.fromisoformat(day).replace(tzinfo=UTC) for day in days.split("/"))
    request = schedule_pb2.BackfillScheduleRequest(
        schedule_id=id_,
        start_time=at(first),
        end_time=at(last + timedelta(hours=12)),
        overlap=schedule_pb2.OVERLAP_POLICY_ALLOW_ALL,
    )
    assert (await schedules.BackfillSchedule(request)).times == len(expected)
    status = await until(schedules, id_, lambda status: len(ended(status)) == len(expected))
    assert sorted(run.nominal_time.ToJsonString() for run in status.recent_runs) == expected
    await delete(schedules, id_)


@pytest.mark.parametrize(
    ("policy", "of_temporal"),
    [
        (schedule_pb2.OVERLAP_POLICY_UNSPECIFIED, ScheduleOverlapPolicy.SKIP),
        (schedule_pb2.OVERLAP_POLICY_SKIP, ScheduleOverlapPolicy.SKIP),
        (schedule_pb2.OVERLAP_POLICY_BUFFER_ONE, ScheduleOverlapPolicy.BUFFER_ONE),
        (schedule_pb2.OVERLAP_POLICY_BUFFER_ALL, ScheduleOverlapPolicy.BUFFER_ALL),
        (schedule_pb2.OVERLAP_POLICY_CANCEL_OTHER, ScheduleOverlapPolicy.CANCEL_OTHER),
        (schedule_pb2.OVERLAP_POLICY_ALLOW_ALL, ScheduleOverlapPolicy.ALLOW_ALL),
    ],
)
async def test_temporal_keeps_what_a_schedule_says(
    schedules: ScheduleServiceStub,
    temporal: Client,
    policy: "schedule_pb2.OverlapPolicy.ValueType",
    of_temporal: ScheduleOverlapPolicy,
) -> None:
    """Its own default of the catch-up window is a year."""
    window = {"catch_up_window": {"seconds": 90}} if policy else {}
    start = datetime(2030, 1, 1, tzinfo=UTC)
    end = start + timedelta(days=400)
    times = {"cron": ["0 0 1 1 *"], "jitter": {"seconds": 30}, "start_time": at(start), "end_time": at(end)}
    id_ = await create(schedules, new_schedule(times=times, overlap=policy, **window), paused=True)
    kept = (await temporal.get_schedule_handle(id_).describe()).schedule
    assert kept.policy.overlap == of_temporal
    assert kept.policy.catchup_window == timedelta(seconds=90 if policy else 3600)
    assert (kept.spec.jitter, kept.spec.start_at, kept.spec.end_at) == (timedelta(seconds=30), start, end)
    await delete(schedules, id_)


async def test_an_update_counts_from_the_next_run_on(schedules: ScheduleServiceStub, stub: LlmServiceStub) -> None:
    schedule = new_schedule(prompt="Before.")
    id_ = await create(schedules, schedule, paused=True)
    await trigger(schedules, id_)
    await until(schedules, id_, ended)
    schedule.job.prompt = "After."
    schedule.times.CopyFrom(schedule_pb2.ScheduleTimes(**every(3600, jitter={"seconds": 60})))
    request = schedule_pb2.UpdateScheduleRequest(schedule_id=id_, schedule=schedule)
    status = (await schedules.UpdateSchedule(request)).status
    assert status.paused
    assert status.HasField("update_time")
    first, second = status.next_times[:2]
    assert 3600 - 60 <= second.seconds - first.seconds <= 3600 + 60
    await trigger(schedules, id_)
    runs = ended(await until(schedules, id_, lambda status: len(ended(status)) == 2))
    prompts = [(await stub.GetJob(llm_pb2.GetJobRequest(workflow_id=run.workflow_id))).job.prompt for run in runs]
    assert prompts == ["Before.", "After."]
    schedule.request_id = "another"
    request = schedule_pb2.UpdateScheduleRequest(schedule_id=id_, schedule=schedule)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await schedules.UpdateSchedule(request)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    await delete(schedules, id_)


async def test_a_job_that_fails_is_shown_and_counted_and_stops_nothing(schedules: ScheduleServiceStub) -> None:
    id_ = await create(schedules, new_schedule(prompt="[[fault:oom@1]]"), paused=True)
    for number in (1, 2):
        await trigger(schedules, id_)
        status = await until(schedules, id_, lambda status, number=number: len(ended(status)) == number)
        run = status.recent_runs[-1]
        assert run.state == llm_pb2.JOB_STATE_FAILED
        assert unpack(run.error)["ErrorInfo"].reason == "OUT_OF_MEMORY"
        assert run.failures_in_a_row == number
    await delete(schedules, id_)


async def test_a_schedule_pauses_after_a_failure_if_it_says_so(schedules: ScheduleServiceStub) -> None:
    schedule = new_schedule(prompt="[[fault:oom@1]]", times=every(1), pause_on_failure=True)
    id_ = await create(schedules, schedule)
    status = await until(schedules, id_, lambda status: status.paused)
    assert ended(status)[0].state == llm_pb2.JOB_STATE_FAILED
    await delete(schedules, id_)


async def test_schedules_are_listed_by_page(schedules: ScheduleServiceStub) -> None:
    ids = [await create(schedules, new_schedule(user_id="lister"), paused=number == 0) for number in range(3)]
    request = schedule_pb2.ListSchedulesRequest(user_id="lister", page_size=2)
    async with asyncio.timeout(60):
        while True:
            first = await schedules.ListSchedules(request)
            request.page_token = first.next_page_token
            if len(first.schedules) == 2 and first.next_page_token:
                second = await schedules.ListSchedules(request)
                if second.schedules:
                    break
            request.page_token = ""
    found = [*first.schedules, *second.schedules]
    assert {summary.schedule_id: summary.paused for summary in found} == {
        id_: number == 0 for number, id_ in enumerate(ids)
    }
    assert {(summary.user_id, summary.model) for summary in found} == {("lister", "docstrings")}
    assert all(summary.HasField("next_time") for summary in found)
    request.user_id = "another"
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await schedules.ListSchedules(request)
    (violation,) = details_of(error.value)["BadRequest"].field_violations
    assert violation.field == "page_token"
    for id_ in ids:
        await delete(schedules, id_)
