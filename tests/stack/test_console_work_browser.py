"""The console's pages of batches, pipelines, schedules and files in a real browser: live, and usable by everybody."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from temporalio.client import Client

from deploy.local.stack import Stack
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from llm_pb.schedule_pb2_grpc import ScheduleServiceStub
from tests.stack.test_console_browser import check, tab_to
from tests.support import schedules
from tests.support.batches import Stubs, create, lines_of, running
from tests.support.browser import new_page, running_browser
from tests.support.files import new_file, upload
from tests.support.http_fronts import running_front
from tests.support.pipelines import new_pipeline, submit
from tests.support.trained import register

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Any]:
    async with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
async def channel(stack: Stack) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield channel


@pytest.fixture(scope="module")
def stubs(channel: grpc.aio.Channel) -> Stubs:
    return Stubs(FileServiceStub(channel), BatchServiceStub(channel))


async def test_a_batch_is_followed_across_the_death_of_its_front_and_cancelled(
    stack: Stack, stubs: Stubs, temporal: Client, browser: Any
) -> None:
    complaints: list[str] = []
    async with running(temporal, stack.state_dir, hold_after=2) as engine, running_front(stack) as front:
        id_ = (await create(stubs, lines_of(30), "browser-batch")).batch_id
        async with new_page(browser, f"http://{front.address}", []) as page:
            await page.goto(f"/console/batches/{id_}")
            await page.evaluate("window.sameDocument = true")
            await page.wait_for_selector("#batch progress[max='30']:not([value='0'])")
            await front.process.kill()
            engine.go_on.set()
            await stubs.end(id_)
            await front.process.start()
            await front.process.wait_ready()
            await page.wait_for_selector("#batch[data-state=BATCH_STATE_SUCCEEDED]")
            assert await page.evaluate("window.sameDocument"), "the page was not loaded again"
            await page.wait_for_selector("#results a:has-text('Download output')")
    other = (await create(stubs, lines_of(3), "browser-batch")).batch_id
    for place in ("batches", "schedules"):
        async with new_page(browser, f"http://{stack.address('http')}", complaints) as page:
            await page.goto(f"/console/{place}")
            await page.click("summary:has-text('New ')")
            await check(page)
    async with new_page(browser, f"http://{stack.address('http')}", complaints) as page:
        await page.goto(f"/console/batches/{id_}")
        await check(page)
        await page.goto("/console/batches?user_id=browser-batch")
        await page.wait_for_selector(f"[data-key='{other}']")
        await check(page)
        # By keyboard alone.
        await tab_to(page, f"[data-key='{other}'] a")
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#batch[data-state=BATCH_STATE_RUNNING]")
        await check(page)
        await tab_to(page, "summary")
        await page.keyboard.press("Enter")
        await tab_to(page, "[name=reason]")
        await page.keyboard.type("no longer needed")
        await tab_to(page, ".pop button")
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#batch[data-state=BATCH_STATE_CANCELLED]")
        assert "no longer needed" in await page.text_content("#batch .banner")
    assert complaints == []


async def test_a_person_runs_pauses_and_deletes_a_schedule(
    stack: Stack, channel: grpc.aio.Channel, browser: Any
) -> None:
    stub: ScheduleServiceStub = ScheduleServiceStub(channel)
    id_ = await schedules.create(stub, schedules.new_schedule(user_id="browser-schedule"))
    complaints: list[str] = []
    async with new_page(browser, f"http://{stack.address('http')}", complaints) as page:
        await page.goto(f"/console/schedules/{id_}")
        await page.click("text=Run now")
        await page.wait_for_selector("#runs .state-succeeded")
        await check(page)
        await page.click("summary:has-text('Pause')")
        await page.fill("[name=note]", "for the night")
        await page.click("button:has-text('Pause this schedule')")
        await page.wait_for_selector("#schedule .state-paused")
        await page.goto("/console/schedules?user_id=browser-schedule")
        await page.wait_for_selector(f"[data-key='{id_}'] .state-paused")
        await check(page)
        await page.goto(f"/console/schedules/{id_}")
        await page.click("summary:has-text('Delete')")
        await check(page)
        await page.click("button:has-text('Delete this schedule')")
        await page.wait_for_url("**/console/schedules")
    assert complaints == []


async def test_a_person_watches_a_pipeline_grow_and_answers_it(
    stack: Stack, channel: grpc.aio.Channel, browser: Any
) -> None:
    stub: Any = PipelineServiceStub(channel)
    pipeline = new_pipeline("careful", StringValue(value="rain"), user_id="browser-pipeline")
    id_ = (await submit(stub, pipeline)).pipeline_id
    complaints: list[str] = []
    async with new_page(browser, f"http://{stack.address('http')}", complaints) as page:
        await page.goto("/console/pipelines?user_id=browser-pipeline")
        await page.wait_for_selector(f"[data-key='{id_}'] .state-needs-answer")
        await check(page)
        await page.click(f"[data-key='{id_}'] a")
        await page.wait_for_selector("#tree .state-needs-answer")
        await check(page)
        # By keyboard alone. The page follows what comes then.
        await tab_to(page, "#tree button[value=yes]")
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#tree [data-key='first'] .state-succeeded")
        await page.wait_for_selector("#pipeline[data-state=JOB_STATE_FAILED]")
        await check(page)
        await page.click("#tree [data-key='first'] a")
        await page.wait_for_selector("#job .state-succeeded")
    assert complaints == []


async def test_a_person_names_and_deletes_a_version_by_keyboard_alone(
    stack: Stack, temporal: Client, browser: Any
) -> None:
    first = await register(temporal, "keyboard")
    complaints: list[str] = []
    async with new_page(browser, f"http://{stack.address('http')}", complaints) as page:
        await page.goto("/console/models")
        row = f"[data-key='keyboard@{first}']"
        await page.focus(f"{row} [data-key=alias] summary")
        await page.keyboard.press("Enter")
        await page.keyboard.press("Tab")
        await page.keyboard.type("stable")
        await check(page)
        await page.keyboard.press("Enter")
        await page.wait_for_selector(f"{row} li:has-text('stable')")
        await page.focus(f"{row} li button")
        await page.keyboard.press("Enter")
        await page.wait_for_selector(f"{row} li:has-text('stable')", state="detached")
        await page.focus(f"{row} [data-key=delete] summary")
        for key in ("Enter", "Tab", "Enter"):
            await page.keyboard.press(key)
        await page.wait_for_selector(row, state="detached")
        await check(page)
    assert complaints == []


async def test_a_person_downloads_and_deletes_a_file(stack: Stack, stubs: Stubs, browser: Any) -> None:
    key = new_file(file={"user_id": "browser-file", "filename": "a long name " * 10 + ".txt"})
    id_ = (await upload(stubs.files, key, b"content")).ref.file_id
    complaints: list[str] = []
    async with new_page(browser, f"http://{stack.address('http')}", complaints) as page:
        await page.goto("/console/files?user_id=browser-file")
        row = f"[data-key='{id_}']"
        await page.wait_for_selector(row)
        async with page.expect_download() as downloading:
            await page.click(f"{row} a:has-text('Download')")
        assert (await (await downloading.value).path()).read_bytes() == b"content"
        await page.click(f"{row} summary")
        await check(page)
        await page.click("button:has-text('Delete this file')")
        await page.wait_for_url("**/console/files")
        await page.goto("/console/files?user_id=browser-file")
        await page.wait_for_selector("text=No file here")
        await check(page)
    assert complaints == []
