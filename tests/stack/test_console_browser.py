"""The console in a real browser: it goes on when its front dies, and can be used by everybody."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from deploy.local.stack import Stack
from llm_pb import llm_pb2, llm_pb2_grpc
from runtime.scopes import SCOPES
from tests.support.browser import PATIENCE, SIZES, findings, new_page, running_browser, until
from tests.support.credentials import KeyFile
from tests.support.http_fronts import running_front
from tests.support.jobs import new_job, run_job
from tests.support.receivers import Receiver, status
from tests.support.rewinding_gateway import ENDLESS, rewinding_gateway

pytestmark = pytest.mark.timeout(600)

HOSTILE = "<script>alert(1)</script> <b>bold</b> **bold** \u202eevil\u202c שלום \x07"
HANGING = " [[fault:hang@60]]"
"""In a prompt, it makes a job that a test can watch and does not end by itself, however slow the browser is."""

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
    """The job begins once its page is open, so that it runs for long enough on a busy machine, too."""
    worker = stack.add("gpu-worker", {"GPU_WORKER_MODEL": "idle", "GPU_WORKER_TASK_QUEUE": "llm-gpu-activities.idle"})
    async with running_front(stack) as front, new_page(browser, f"http://{front.address}", []) as page:
        workflow_id = await submit(stub, new_job(model="idle", params={"max_tokens": 8000}))
        await page.goto(f"/console/jobs/{workflow_id}")
        await page.evaluate("window.sameDocument = true")
        await worker.start()
        try:
            held = await until(page, LENGTH)
            await front.process.kill()
            await front.process.start()
            await front.process.wait_ready()
            await page.wait_for_selector("#job[data-state=JOB_STATE_SUCCEEDED]")
        finally:
            await worker.terminate()
        output = await output_of(stub, workflow_id)
        assert held < len(output), "the front was killed in mid-answer"
        assert await page.text_content("#output") == output
        assert await page.evaluate("window.sameDocument"), "the page was not loaded again"
        await until(page, f"document.title.startsWith('Succeeded: {workflow_id}')")


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
        await page.goto("/console/playground")
        await page.fill("#user_id", "browser-person")
        await page.fill("#text", HOSTILE + HANGING)
        await page.keyboard.press("Control+Enter")
        await page.wait_for_url("**/console/jobs/*")
        assert (await page.text_content("#prompt")) == HOSTILE + HANGING
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


async def test_a_form_that_is_sent_again_after_going_back_finds_its_job(stack: Stack, browser: Any) -> None:
    complaints: list[str] = []
    async with new_page(browser, f"http://{stack.address('http')}", complaints) as page:
        await page.goto("/console/playground")
        found = []
        for _ in range(2):
            await page.fill("#user_id", "back-person")
            await page.fill("#max_tokens", "1")
            await page.fill("#text", "once")
            await page.click("button:has-text('Submit')")
            await page.wait_for_url("**/console/jobs/*")
            found.append(await page.text_content("#job h1"))
            await page.go_back()
            await page.wait_for_selector("#text")
        assert found[0] == found[1]
    assert complaints == []


async def tab_to(page: Any, selector: str) -> None:
    """Press Tab until the focus is on an element. Its outline has to be seen."""
    for _ in range(80):
        await page.keyboard.press("Tab")
        if await page.evaluate(f"document.activeElement.matches({selector!r})"):
            assert await page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
            return
    raise AssertionError(f"Tab does not lead to {selector}")


async def test_a_person_submits_finds_and_cancels_a_job_by_keyboard_alone(stack: Stack, browser: Any) -> None:
    complaints: list[str] = []
    async with new_page(browser, f"http://{stack.address('http')}", complaints) as page:
        keys = page.keyboard
        await page.goto("/console/")
        await tab_to(page, ".skip")
        await tab_to(page, "a[href='/console/playground']")
        await keys.press("Enter")
        await page.wait_for_url("**/console/playground*")
        await tab_to(page, "input[name=kind]")
        await keys.press("ArrowRight")
        await tab_to(page, "#text")
        await keys.type("by keyboard")
        await tab_to(page, "#model")
        # Further letters would begin another search where they come more than a second later.
        await keys.type("i")
        await tab_to(page, "#user_id")
        await keys.press("Control+A")
        await keys.type("keyboard-person")
        await tab_to(page, "#stop")
        await keys.press("Control+Enter")
        await page.wait_for_url("**/console/jobs/*")
        workflow_id = await page.text_content("#job h1")
        assert await page.text_content("#message-1") == "by keyboard"

        await page.goto("/console/?user_id=keyboard-person")
        await page.wait_for_selector(f"[data-key='{workflow_id}']")
        await tab_to(page, f"[data-key='{workflow_id}'] a")
        await keys.press("Enter")
        await page.wait_for_url("**/console/jobs/*")
        await tab_to(page, "summary")
        await keys.press("Enter")
        await tab_to(page, "[name=reason]")
        await keys.type("no longer needed")
        await tab_to(page, ".pop button")
        await keys.press("Enter")
        await page.wait_for_selector("#job[data-state=JOB_STATE_CANCELLED]")
    assert complaints == []


async def test_a_page_whose_form_was_refused_follows_its_job(
    stack: Stack, stub: llm_pb2_grpc.LlmServiceStub, browser: Any
) -> None:
    """And loading it again sends no form."""
    workflow_id = await submit(stub, new_job(model="idle"))
    async with new_page(browser, f"http://{stack.address('http')}", []) as page:
        await page.goto(f"/console/jobs/{workflow_id}")
        await page.click("summary:has-text('Cancel')")
        await page.fill("[name=reason]", "\x07")
        await page.click("button:has-text('Cancel this job')")
        await page.wait_for_selector("[role=alert]:has-text('reason')")
        assert await findings(page) == []
        await stub.Cancel(llm_pb2.CancelRequest(workflow_id=workflow_id))
        await page.wait_for_selector("#job[data-state=JOB_STATE_CANCELLED]", timeout=30_000)
        assert (await page.reload()).request.method == "GET"


async def test_a_page_that_does_not_change_asks_ever_less_often(stack: Stack, browser: Any) -> None:
    """And at once when its tab is shown again."""
    async with new_page(browser, f"http://{stack.address('http')}", []) as page:
        asked, answered = list[str](), list[str]()
        page.on("request", lambda request: asked.append(request.url) if request.resource_type == "fetch" else None)
        page.on("requestfinished", lambda request: answered.append(request.url) if request.url in asked else None)
        await page.clock.install()
        await page.goto("/console/?user_id=nobody-here")
        for _ in range(120):
            await page.clock.run_for(1000)
            async with asyncio.timeout(PATIENCE / 1000):
                while len(answered) < len(asked):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        assert 3 <= len(asked) <= 15, "in two minutes"
        before = len(asked)
        await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        async with asyncio.timeout(PATIENCE / 1000):
            while len(asked) == before:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_a_page_says_when_it_is_not_up_to_date(stack: Stack, browser: Any) -> None:
    async with running_front(stack) as front, new_page(browser, f"http://{front.address}", []) as page:
        await page.goto("/console/?user_id=nobody-here")
        await front.process.kill()
        await page.wait_for_selector("text=This page is not up to date")
        assert await findings(page) == []
        await front.process.start()
        await front.process.wait_ready()
        await page.wait_for_selector("text=This page is not up to date", state="hidden")


async def check(page: Any) -> None:
    """Check a page on a desktop in light colours and on a phone in dark ones. Nothing is wider than the screen."""
    for scheme, size in zip(("light", "dark"), SIZES.values(), strict=True):
        await page.emulate_media(color_scheme=scheme)
        await page.set_viewport_size(size)
        assert await findings(page) == [], (scheme, size)
        wider = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert await page.evaluate(wider) == 0, size


async def test_everybody_can_use_the_page_without_jobs(stack: Stack, browser: Any, tmp_path: Path) -> None:
    """It is that of a new tenant. It shows who has signed in."""
    keys, complaints = KeyFile(tmp_path / "keys.json"), list[str]()
    key = keys.add(SCOPES, tenant="beginners")
    gateway = stack.add("gateway", {"GATEWAY_ROLE": "api", "GATEWAY_API_KEYS_FILE": str(keys.path)})
    await gateway.start()
    await gateway.wait_ready()
    async with (
        running_front(stack, HTTP_GATEWAY=stack.address(gateway.name)) as front,
        new_page(browser, f"http://{front.address}", complaints) as page,
    ):
        await page.goto("/console/")
        await page.fill("input[name=key]", key)
        await page.keyboard.press("Enter")
        await page.wait_for_selector("text=No jobs yet")
        assert "$LLM_CREDENTIAL" in await page.text_content("#first-job")
        await check(page)
    await gateway.terminate()
    assert complaints == []


@pytest.mark.parametrize(
    "name",
    [
        *("list", "empty", "models", "playground", "again", "refused", "running", "ended", "failed"),
        *("delete", "deletion", "error"),
    ],
)
async def test_everybody_can_use_a_page(
    stack: Stack, stub: llm_pb2_grpc.LlmServiceStub, browser: Any, name: str
) -> None:
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
        "refused": "/console/playground",
    }.get(name, "")
    if name in jobs:
        path = f"/console/jobs/{await submit(stub, jobs[name])}"
    if name == "again":
        path = f"/console/playground?job={await submit(stub, new_job(labels={'team': 'red'}))}"
    if name in ("delete", "deletion"):
        path = f"/console/jobs/{await submit(stub, new_job())}/delete"
    complaints: list[str] = []
    async with new_page(browser, f"http://{stack.address('http')}", complaints) as page:
        await page.goto(path)
        if name == "refused":
            await page.fill("#temperature", "9")
            await page.fill("#text", "x")
            await page.click("button:has-text('Submit')")
            await page.wait_for_selector("#temperature-wrong")
        if name == "deletion":
            await page.click("button:has-text('Delete for good')")
            await page.wait_for_selector("#deletion .state-done")
        if name in ("ended", "failed"):
            await page.wait_for_selector(
                f"#job .state-{'succeeded' if name == 'ended' else 'failed'}", timeout=PATIENCE
            )
        await check(page)
    # The browser reports the status of the page itself.
    of_page = {"error": "404", "refused": "400"}
    if name in of_page:
        complaints = [words for words in complaints if of_page[name] not in words]
    assert complaints == []
