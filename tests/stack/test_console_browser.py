"""The console in a real browser: it goes on when its front dies, and can be used by everybody."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from deploy.local.stack import Stack
from llm_pb import llm_pb2, llm_pb2_grpc
from tests.support.browser import PATIENCE, SIZES, findings, new_page, running_browser, until
from tests.support.http_fronts import running_front
from tests.support.jobs import new_job, run_job
from tests.support.receivers import Receiver, status
from tests.support.rewinding_gateway import ENDLESS, rewinding_gateway

pytestmark = pytest.mark.timeout(600)

HOSTILE = "<script>alert(1)</script> <b>bold</b> **bold** \u202eevil\u202c שלום \x07"

LENGTH = """(() => {
    const { length } = document.getElementById("output").textContent;
    return length > 100 && length;
})()"""
"""The length of the text in a page, once it is more than a beginning."""


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Any]:
    async with running_browser() as browser:
        yield browser


async def submit(stub: llm_pb2_grpc.LlmServiceStub, job: llm_pb2.JobRequest) -> str:
    workflow_id: str = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    return workflow_id


async def output_of(stub: llm_pb2_grpc.LlmServiceStub, workflow_id: str) -> str:
    output: str = (await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=workflow_id))).result.output
    return output


async def test_a_page_goes_on_when_its_front_is_killed_in_mid_answer(
    stack: Stack, stub: llm_pb2_grpc.LlmServiceStub, browser: Any
) -> None:
    async with running_front(stack) as front, new_page(browser, f"http://{front.address}", []) as page:
        # The first page of a new browser takes its time.
        await page.goto("/console/models")
        workflow_id = await submit(stub, new_job(params={"max_tokens": 8000}))
        await page.goto(f"/console/jobs/{workflow_id}")
        await page.evaluate("window.sameDocument = true")
        held = await until(page, LENGTH)
        await front.process.kill()
        await front.process.start()
        await front.process.wait_ready()
        await page.wait_for_selector("#job[data-state=JOB_STATE_SUCCEEDED]")
        output = await output_of(stub, workflow_id)
        assert held < len(output), "the front was killed in mid-answer"
        assert await page.text_content("#output") == output
        assert await page.evaluate("window.sameDocument"), "the page was not loaded again"


async def test_a_rewind_replaces_the_text_in_the_page(stack: Stack, browser: Any) -> None:
    complaints: list[str] = []
    async with (
        rewinding_gateway() as gateway,
        running_front(stack, HTTP_GATEWAY=gateway) as front,
        new_page(browser, f"http://{front.address}", complaints) as page,
    ):
        await page.goto(f"/console/jobs/{ENDLESS}")
        await until(page, "document.getElementById('output').textContent === 'Once there was'")
        assert await page.is_visible("#rewound")
    assert complaints == []


async def test_a_person_lists_submits_cancels_and_redelivers(
    stack: Stack, stub: llm_pb2_grpc.LlmServiceStub, browser: Any, receiver: Receiver
) -> None:
    complaints: list[str] = []
    base = f"http://{stack.address('http')}"
    async with new_page(browser, base, complaints) as page:
        # The playground, by keyboard alone.
        await page.goto("/console/playground")
        await page.fill("#user_id", "browser-person")
        await page.fill("#max_tokens", "8000")
        await page.fill("#text", HOSTILE)
        await page.keyboard.press("Control+Enter")
        await page.wait_for_url("**/console/jobs/*")
        assert (await page.text_content("#prompt")) == HOSTILE
        workflow_id = await page.text_content("#job h1")
        await until(page, LENGTH)

        await page.click("summary:has-text('Cancel')")
        await page.fill("[name=reason]", "no longer <i>needed</i>")
        await page.click("button:has-text('Cancel this job')")
        await page.wait_for_selector("#job[data-state=JOB_STATE_CANCELLED]")
        assert "no longer <i>needed</i>" in await page.text_content("#job .banner")
        assert await page.text_content("#output") == await output_of(stub, workflow_id)

        # The list shows a new job by itself, and the focus stays where it was.
        await page.goto("/console/?user_id=browser-person")
        row = f"[data-key='{workflow_id}']"
        await page.wait_for_selector(row)
        await page.focus(f"{row} a")
        other = await submit(stub, new_job(user_id="browser-person", params={"max_tokens": 1}))
        await page.wait_for_selector(f"[data-key='{other}'] .state-succeeded")
        assert await page.evaluate("document.activeElement.textContent") == workflow_id

        target = llm_pb2.NotifyTarget(webhook=llm_pb2.Webhook(url=receiver.on("/console", status(200))))
        notified = (await run_job(stub, new_job(notify=[target], params={"max_tokens": 1}))).final.status.workflow_id
        await page.goto(f"/console/jobs/{notified}")
        await page.wait_for_selector("#deliveries .state-delivered")
        await page.click("text=Redeliver")
        await page.wait_for_selector("#deliveries summary:has-text('2 attempts')")
    assert complaints == []


@pytest.mark.parametrize(
    "name", ["list", "empty", "models", "playground", "running", "ended", "failed", "delete", "error"]
)
async def test_everybody_can_use_a_page(
    stack: Stack, stub: llm_pb2_grpc.LlmServiceStub, browser: Any, name: str
) -> None:
    """In both colour schemes, on a desktop and on a phone, where nothing is wider than the screen."""
    jobs = {
        "running": new_job(HOSTILE, params={"max_tokens": 8000}),
        "ended": new_job("long " * 1000, user_id="u" * 100, labels={"<team>": "x" * 300}, params={"max_tokens": 3}),
        "failed": new_job("[[fault:failed@2]]", params={"max_tokens": 3}),
    }
    path = {
        "list": "/console/",
        "empty": "/console/?user_id=nobody-here",
        "models": "/console/models",
        "playground": "/console/playground",
        "error": "/console/jobs/llmjob-nobody-here",
    }.get(name, "")
    if name in jobs:
        path = f"/console/jobs/{await submit(stub, jobs[name])}"
    if name == "delete":
        path = f"/console/jobs/{await submit(stub, new_job())}/delete"
    complaints: list[str] = []
    async with new_page(browser, f"http://{stack.address('http')}", complaints) as page:
        await page.goto(path)
        if name in ("ended", "failed"):
            await page.wait_for_selector(
                f"#job .state-{'succeeded' if name == 'ended' else 'failed'}", timeout=PATIENCE
            )
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            for size in SIZES.values():
                await page.set_viewport_size(size)
                assert await findings(page) == [], (name, scheme, size)
                wider = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
                assert await page.evaluate(wider) == 0, (name, size)
    if name == "error":
        # The browser reports the status of the page itself.
        complaints = [words for words in complaints if "404" not in words]
    assert complaints == []
