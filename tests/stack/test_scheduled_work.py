"""Schedules that start batches and pipelines: each run is one, with an id of its time, and ends with it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.struct_pb2 import Struct
from google.protobuf.wrappers_pb2 import Int32Value, StringValue
from temporalio.client import Client

from deploy.local.stack import Stack
from durable_llm.cli._exits import Exit
from jobs import names
from jobs.errors import reason_of
from llm_pb import batch_pb2, common_pb2, llm_pb2, schedule_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from llm_pb.schedule_pb2_grpc import ScheduleServiceStub
from runtime.scopes import SCOPES
from tests.stack.test_command_line import Cli
from tests.stack.test_schedule_admission import gateways
from tests.support.batches import lines_of, to_jsonl
from tests.support.credentials import CallsAs, KeyFile
from tests.support.files import bad_fields, delete, new_file, refusal, upload
from tests.support.pipelines import get, new_pipeline
from tests.support.schedules import PATIENCE, create, ended, new_schedule, trigger, until

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
async def channel(stack: Stack) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield channel


@pytest.fixture(scope="module")
def schedules(channel: grpc.aio.Channel) -> Any:
    return ScheduleServiceStub(channel)


def of_pipeline(name: str, input_: Any, **changes: Any) -> schedule_pb2.Schedule:
    pipeline = new_pipeline(name, input_)
    pipeline.user_id = pipeline.request_id = ""
    return of_work(pipeline=pipeline, **changes)


def of_work(**changes: Any) -> schedule_pb2.Schedule:
    schedule = new_schedule()
    schedule.ClearField("job")
    schedule.MergeFrom(schedule_pb2.Schedule(**changes))
    return schedule


async def test_a_schedule_starts_a_pipeline_for_each_time(
    schedules: Any, channel: grpc.aio.Channel, temporal: Client
) -> None:
    schedule = of_pipeline("essay", StringValue(value="rain"))
    id_ = await create(schedules, schedule, paused=True)
    assert await create(schedules, schedule, paused=True) == id_
    await trigger(schedules, id_)
    (run,) = ended(await until(schedules, id_, ended))
    time = run.nominal_time.ToDatetime().strftime("%Y-%m-%dT%H:%M:%SZ")
    assert run.workflow_id.startswith("llmpipe-")
    assert run.workflow_id.endswith(f"{schedule.request_id}-{time}")
    assert run.state == llm_pb2.JOB_STATE_SUCCEEDED
    pipelines: Any = PipelineServiceStub(channel)
    found = await get(pipelines, run.workflow_id)
    assert (found.status.user_id, found.status.name) == (schedule.user_id, "essay")
    assert len(found.steps) == 8
    # The run does not wait for its next look at the pipeline.
    history = await temporal.get_workflow_handle(f"{id_}-{time}").fetch_history()
    signals = [one.workflow_execution_signaled_event_attributes.signal_name for one in history.events]
    assert names.SIGNAL_JOB_SETTLED in signals


async def test_a_pipeline_that_fails_or_is_overtaken_is_shown(schedules: Any) -> None:
    id_ = await create(schedules, of_pipeline("broken", Struct(), pause_on_failure=True))
    await trigger(schedules, id_)
    status = await until(schedules, id_, lambda status: status.paused)
    (run,) = ended(status)
    assert (run.state, run.failures_in_a_row) == (llm_pb2.JOB_STATE_FAILED, 1)
    assert reason_of_run(run) == "PROGRAM_ERROR"
    other = schedule_pb2.OVERLAP_POLICY_CANCEL_OTHER
    id_ = await create(schedules, of_pipeline("fan", Int32Value(value=1), overlap=other))
    await trigger(schedules, id_)
    await until(schedules, id_, lambda status: status.recent_runs and status.recent_runs[0].workflow_id)
    await trigger(schedules, id_)
    (first,) = ended(await until(schedules, id_, ended))
    assert first.state == llm_pb2.JOB_STATE_CANCELLED
    await trigger(schedules, id_)


async def test_a_run_that_was_triggered_and_failed_has_paused_its_schedule_when_it_is_read(
    schedules: Any, temporal: Client
) -> None:
    """Temporal looks at a run that has ended when it is asked, and its first answer was of before."""
    id_ = await create(schedules, of_pipeline("broken", Struct(), pause_on_failure=True))
    await trigger(schedules, id_)
    query = f"TemporalScheduledById = '{id_}' AND ExecutionStatus = 'Failed'"
    async with asyncio.timeout(PATIENCE):
        while not [run async for run in temporal.list_workflows(query)]:  # noqa: ASYNC110  nothing notifies
            await asyncio.sleep(0.1)
    response = await schedules.GetSchedule(schedule_pb2.GetScheduleRequest(schedule_id=id_))
    assert (response.status.paused, len(ended(response.status))) == (True, 1)


def reason_of_run(run: schedule_pb2.ScheduleRun) -> str:
    return reason_of(run.error)


async def test_a_schedule_starts_a_batch_for_each_time_while_its_file_is_there(
    schedules: Any, channel: grpc.aio.Channel
) -> None:
    files: Any = FileServiceStub(channel)
    batches: Any = BatchServiceStub(channel)
    key = new_file()
    file = await upload(files, key, to_jsonl(lines_of(2, "docstrings")))
    input_ = {"file_id": file.ref.file_id}
    schedule = of_work(batch={"input": input_, "labels": {"team": "red"}})
    missing = of_work(batch={"input": {"file_id": f"file-{'0' * 64}"}})
    assert await refusal(create(schedules, missing)) == ("NOT_FOUND", "FILE_NOT_FOUND")
    id_ = await create(schedules, schedule)
    for count in (1, 2):
        await trigger(schedules, id_)
        await until(schedules, id_, lambda status, most=count: len(ended(status)) == most)
    runs = ended(await until(schedules, id_, ended))
    assert [run.state for run in runs] == [llm_pb2.JOB_STATE_SUCCEEDED] * 2
    assert len({run.workflow_id for run in runs}) == 2
    batch = (await batches.GetBatch(batch_pb2.GetBatchRequest(batch_id=runs[0].workflow_id))).status
    assert (batch.user_id, batch.counts.succeeded, dict(batch.labels)) == (schedule.user_id, 2, {"team": "red"})
    await delete(files, file.ref.file_id)
    await trigger(schedules, id_)
    status = await until(schedules, id_, lambda status: len(ended(status)) == 3)
    assert not status.recent_runs[-1].workflow_id
    assert reason_of_run(status.recent_runs[-1]) == "FILE_NOT_FOUND"


async def test_what_is_wrong_with_a_batch_or_pipeline_is_named(schedules: Any) -> None:
    bad = of_work(batch={"user_id": "u", "window": {"seconds": 10**10}, "job_class": 99})
    assert await bad_fields(create(schedules, bad)) == {
        *("schedule.batch.user_id", "schedule.batch.input.file_id"),
        *("schedule.batch.window", "schedule.batch.job_class"),
    }
    worse = of_work(pipeline={"request_id": "r", "custom": {"name": "nobody"}})
    assert await bad_fields(create(schedules, worse)) == {
        "schedule.pipeline.request_id",
        "schedule.pipeline.custom.name",
    }
    assert await bad_fields(create(schedules, of_work())) == {"schedule.job"}


async def test_a_batch_may_do_what_the_creator_of_its_schedule_may(stack: Stack, tmp_path: Path) -> None:
    """Its runs have no credential. And a user's credential reaches only the files of the user."""
    file = KeyFile(tmp_path / "keys.json")
    keys = {
        "all": file.add(SCOPES, tenant="acme"),
        "plain": file.add(SCOPES - {"jobs:structured", "jobs:priority", "jobs:*"}, tenant="acme"),
        "bob": file.add(SCOPES, tenant="acme", user_id="bob"),
        "no files": file.add(SCOPES - {"files:read", "files:*"}, tenant="acme"),
    }
    settings = {"GATEWAY_API_KEYS_FILE": str(file.path), "GATEWAY_WORKFLOW_QUEUE": "schedules-of-batches"}
    async with gateways(stack, settings) as [(channel, _)]:
        calls: Any = ScheduleServiceStub(channel)
        files: Any = FileServiceStub(channel)
        as_: dict[str, Any] = {name: CallsAs(calls, key) for name, key in keys.items()}
        said = {"params": {"choice": {"options": ["yes"]}}}
        data = to_jsonl(lines_of(1, "docstrings", **said))
        uploaded = await upload(CallsAs(files, keys["all"]), new_file(file={"user_id": "alice"}), data)
        work: dict[str, Any] = {"batch": {"input": {"file_id": uploaded.ref.file_id}}, "user_id": "alice"}
        id_ = await create(as_["plain"], of_work(**work))
        await trigger(as_["plain"], id_)
        (run,) = ended(await until(as_["plain"], id_, ended))
        assert (run.state, reason_of_run(run)) == (llm_pb2.JOB_STATE_FAILED, "INVALID_INPUT")
        bobs = of_work(**{**work, "user_id": "bob"})
        assert await refusal(create(as_["bob"], bobs)) == ("NOT_FOUND", "FILE_NOT_FOUND")
        assert await refusal(create(as_["no files"], of_work(**work))) == ("PERMISSION_DENIED", "MISSING_SCOPE")
        high = of_work(pipeline={"job_class": common_pb2.JOB_CLASS_HIGH, "custom": {"name": "essay"}}, user_id="alice")
        assert await refusal(create(as_["plain"], high)) == ("PERMISSION_DENIED", "MISSING_SCOPE")


async def test_the_command_and_the_console_know_them(
    stack: Stack, schedules: Any, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    cli = Cli(tmp_path, stack.address("gateway"))
    spec = '{"@type": "type.googleapis.com/google.protobuf.StringValue", "value": "rain"}'
    made = await cli("schedules", "create", "essays", spec, "--pipeline", "essay", "--every", "1h", "--paused")
    assert (made.status, made.errors) == (0, "")
    id_ = made.output.strip()
    await trigger(schedules, id_)
    (run,) = ended(await until(schedules, id_, ended))
    shown = (await cli("schedules", "get", id_)).output
    for text in ("pipeline essay", "SUCCEEDED", run.workflow_id):
        assert text in shown
    page = (await http.get(f"/console/schedules/{id_}")).text
    assert f'href="/console/pipelines/{run.workflow_id.replace(":", "%3A")}"' in page
    assert "essay" in page
    assert "rain" in page
    both = await cli("schedules", "create", "x", "Hello", "--pipeline", "essay", "--batch", "file-x", "--every", "1h")
    assert both.status == Exit.USAGE
    lost = await cli("schedules", "create", "x", "--batch", f"file-{'0' * 64}", "--every", "1h")
    assert "there is no file" in lost.errors
    assert (await cli("schedules", "rm", id_)).status == 0
