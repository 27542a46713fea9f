"""The console's pages of batches, schedules and files, as they come from a front of the stack."""

import re
from collections.abc import AsyncIterator

import grpc
import httpx
import pytest
from temporalio.client import Client

from deploy.local.stack import Stack
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.schedule_pb2_grpc import ScheduleServiceStub
from openai_api.asked import NOTE_LABEL
from tests.stack.test_console import post, until
from tests.support import schedules
from tests.support.batches import Stubs, create, lines_of, running, to_jsonl
from tests.support.files import new_file, upload
from tests.support.http_events import events_of
from tests.support.trained import register

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
async def stubs(stack: Stack) -> AsyncIterator[Stubs]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield Stubs(FileServiceStub(channel), BatchServiceStub(channel))


@pytest.fixture(scope="module")
async def schedule_stub(stack: Stack) -> AsyncIterator[ScheduleServiceStub]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield ScheduleServiceStub(channel)


async def test_a_batch_shows_its_numbers_and_leads_to_its_files(
    http: httpx.AsyncClient, stubs: Stubs, temporal: Client, stack: Stack
) -> None:
    async with running(temporal, stack.state_dir, failing=frozenset({3}), hold_after=2) as engine:
        labels = {"<b>": "<script>", NOTE_LABEL: '{"endpoint":"/v1/responses"}'}
        id_ = (await create(stubs, lines_of(30), "console-batch", labels=labels)).batch_id
        path = f"/console/batches/{id_}"
        page = await until(http, path, lambda page: '<progress max="30"' in page and 'value="0"' not in page)
        done = re.search(r"(\d+) of 30 lines have ended", page)
        assert done is not None
        assert 1 <= int(done[1]) < 30
        assert f'<progress max="30" value="{done[1]}"' in page
        assert "&lt;script&gt;" in page
        assert "<script>" not in page
        engine.go_on.set()
        async with http.stream("GET", f"{path}/events") as answer:
            events = [event async for event in events_of(answer)]
    assert events[-1].json["status"]["state"] == "BATCH_STATE_SUCCEEDED"
    page = (await http.get(path)).text
    assert "<dt>Succeeded</dt><dd>29</dd>" in page
    assert "<dt>Failed</dt><dd>1</dd>" in page
    status = await stubs.get(id_)
    for ref, lines in ((status.output, 29), (status.errors, 1), (status.input, 30)):
        file = f"/console/files/{ref.file_id}/content"
        assert f'href="{file}"' in page
        answer = await http.get(file)
        assert answer.headers["content-disposition"].startswith("attachment")
        assert len(answer.content.splitlines()) == lines
    listed = await until(http, "/console/batches?user_id=console-batch", lambda page: "state-succeeded" in page)
    assert "30 of 30" in listed
    for shown in (page, listed):
        assert NOTE_LABEL not in shown, "what the front notes is no label of the caller's"
    assert id_ not in (await http.get("/console/batches?user_id=console-batch&state=BATCH_STATE_FAILED")).text
    assert (await http.get("/console/batches?state=DONE")).status_code == 400
    assert "No batch matches" in (await http.get("/console/batches?user_id=nobody-here")).text


async def test_a_bad_batch_names_its_bad_lines(http: httpx.AsyncClient, stubs: Stubs) -> None:
    id_ = (await create(stubs, [*lines_of(1), {"request_id": "<b>", "model": "idle", "prompt": "", "x": 1}])).batch_id
    page = await until(http, f"/console/batches/{id_}", lambda page: "state-failed" in page)
    assert "<code>INVALID_INPUT</code>" in page
    assert "<code>lines[1].x</code>" in page
    assert "1 line is bad" in page


async def test_cancel_leads_back_to_the_batch(http: httpx.AsyncClient, stubs: Stubs) -> None:
    path = f"/console/batches/{(await create(stubs, lines_of(1))).batch_id}"
    refused = await post(http, f"{path}/cancel", reason="\x07")
    assert refused.status_code == 400
    assert 'role="alert">reason' in refused.text
    answer = await post(http, f"{path}/cancel", reason="<b>enough")
    assert (answer.status_code, answer.headers["location"]) == (303, path)
    page = await until(http, path, lambda page: "state-cancelled" in page)
    assert "&lt;b&gt;enough" in page
    assert f'action="{path}/cancel"' not in page
    assert (await http.get("/console/batches/llmbatch-no-one")).status_code == 404


async def test_forms_create_a_batch_and_a_schedule(http: httpx.AsyncClient, stubs: Stubs) -> None:
    file = (await upload(stubs.files, new_file(), to_jsonl(lines_of(1)))).ref.file_id
    form = {"input": file, "user_id": "console-form", "request_id": "b", "project_id": "p"}
    answer = await post(http, "/console/batches", **form)
    assert (answer.status_code, answer.headers["location"]) == (303, "/console/batches/llmbatch-console--form-b")
    assert (await post(http, "/console/batches", **form)).headers["location"] == answer.headers["location"]
    await stubs.cancel("llmbatch-console--form-b")
    lost = await post(http, "/console/batches", **{**form, "input": f"file-{'0' * 64}", "request_id": "c"})
    assert lost.status_code == 404
    assert 'role="alert">' in lost.text
    refused = await post(http, "/console/batches", **{**form, "project_id": "<b>"})
    assert refused.status_code == 400
    assert 'value="&lt;b&gt;"' in refused.text
    assert (await http.post("/console/batches", data=form)).status_code == 403
    times = {"cron": "0 6 * * MON", "time_zone": "Europe/Berlin"}
    job = {"model": "docstrings", "prompt": "<i>", "user_id": "console-form", "request_id": "s"}
    answer = await post(http, "/console/schedules", **times, **job)
    path = "/console/schedules/llmschedule-console--form-s"
    assert (answer.status_code, answer.headers["location"]) == (303, path)
    page = (await http.get(path)).text
    assert "0 6 * * MON (Europe/Berlin)" in page
    assert "&lt;i&gt;" in page
    assert (await post(http, f"{path}/delete")).status_code == 303
    bad = await post(http, "/console/schedules", **{**times, "cron": "never"}, **job)
    assert bad.status_code == 400
    assert "cron[0]" in bad.text
    assert "&lt;i&gt;" in bad.text


async def test_a_schedule_is_paused_resumed_run_and_deleted(
    http: httpx.AsyncClient, schedule_stub: ScheduleServiceStub
) -> None:
    times = schedules.every(3600 * 24, time_zone="UTC")
    schedule = schedules.new_schedule("[[fault:failed@1]] <i>", user_id="console-schedule", times=times)
    id_ = await schedules.create(schedule_stub, schedule)
    path = f"/console/schedules/{id_}"
    page = (await http.get(path)).text
    assert "every 24 h" in page
    assert "&lt;i&gt;" in page
    assert "No run has begun yet" in page
    assert (await post(http, f"{path}/pause", note="\x07")).status_code == 400
    assert (await post(http, f"{path}/pause", note="<b>night")).headers["location"] == path
    page = await until(http, path, lambda page: "state-paused" in page)
    assert "&lt;b&gt;night" in page
    assert (await post(http, f"{path}/resume")).status_code == 303
    await until(http, path, lambda page: "state-active" in page)
    assert (await post(http, f"{path}/trigger")).status_code == 303
    page = await until(http, path, lambda page: "state-failed" in page)
    assert "<code>ENGINE_FAILED</code>" in page
    (run,) = (await schedules.get(schedule_stub, id_)).status.recent_runs
    assert f'href="/console/jobs/{run.workflow_id.replace(":", "%3A")}"' in page
    assert "<dt>Failures in a row</dt><dd>1</dd>" in page
    await until(http, "/console/schedules?user_id=console-schedule", lambda page: id_ in page)
    answer = await post(http, f"{path}/delete")
    assert (answer.status_code, answer.headers["location"]) == (303, "/console/schedules")
    assert (await http.get(path)).status_code == 404
    assert "No schedule matches" in (await http.get("/console/schedules?user_id=nobody-here")).text


async def test_a_trained_model_has_its_aliases_moved_and_its_versions_deleted(
    http: httpx.AsyncClient, temporal: Client
) -> None:
    first, second = [await register(temporal, "console", "best") for _ in range(2)]
    page = (await http.get("/console/models")).text
    for version in (first, second):
        assert f'data-key="console@{version}"' in page
    path = "/console/models/console"
    for fields, shown in (
        ({"alias": "stable", "version": str(first)}, True),
        ({"alias": "stable"}, False),
        ({"alias": " best ", "version": str(first)}, False),
    ):
        answer = await post(http, f"{path}/alias", **fields)
        assert (answer.status_code, answer.headers.get("location")) == (303, "/console/models"), answer.text
        assert ("the alias stable of console@" in (await http.get("/console/models")).text) is shown
    # What is refused stands in the page, which is whole.
    for what, fields, status in (
        ("delete", {"version": str(first)}, 409),
        ("alias", {"alias": "1", "version": str(first)}, 400),
        ("alias", {"alias": "stable", "version": "9999"}, 404),
    ):
        answer = await post(http, f"{path}/{what}", **fields)
        assert (answer.status_code, 'role="alert"' in answer.text) == (status, True), (what, fields, answer.text)
    assert (await post(http, f"{path}/delete", version="many")).status_code == 400
    assert (await post(http, f"{path}/delete", "https://elsewhere.example", version=str(second))).status_code == 403
    assert (await post(http, f"{path}/delete", version=str(second))).status_code == 303
    page = (await http.get("/console/models")).text
    assert f'data-key="console@{second}"' not in page
    assert f'data-key="console@{first}"' in page


async def test_a_file_is_listed_downloaded_and_deleted(http: httpx.AsyncClient, stubs: Stubs) -> None:
    name = "<b>über 1.txt"
    key = new_file(file={"user_id": "console-file", "filename": name, "purpose": "notes"})
    id_ = (await upload(stubs.files, key, b"<script>alert(1)</script>")).ref.file_id
    place = "/console/files?user_id=console-file"
    page = await until(http, place, lambda page: id_ in page)
    assert "&lt;b&gt;über 1.txt" in page
    assert "25 B" in page
    assert id_ not in (await http.get(f"{place}&purpose=batch")).text
    answer = await http.get(f"/console/files/{id_}/content")
    assert answer.content == b"<script>alert(1)</script>"
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''%3Cb%3E%C3%BCber%201.txt"
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-content-type-options"] == "nosniff"
    answer = await post(http, f"/console/files/{id_}/delete")
    assert (answer.status_code, answer.headers["location"]) == (303, "/console/files")
    assert (await http.get(f"/console/files/{id_}/content")).status_code == 404
    again = await post(http, f"/console/files/{id_}/delete")
    assert again.status_code == 404
    assert 'role="alert"' in again.text
