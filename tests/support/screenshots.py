"""Takes pictures of the console: `make screenshots`. They show real jobs.

Without an argument it takes those in docs/images, of jobs of the small model. With a folder it takes every page, empty,
full and failing, on a desktop and on a phone, into the folder.
"""

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.struct_pb2 import Struct
from google.protobuf.wrappers_pb2 import Int32Value, StringValue
from temporalio.client import Client

from deploy.local.stack import Stack
from llm_pb import llm_pb2, llm_pb2_grpc
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from llm_pb.schedule_pb2_grpc import ScheduleServiceStub
from payload_converter import data_converter
from runtime.scopes import SCOPES
from tests.support.batches import Stubs, lines_of, running
from tests.support.batches import create as create_batch
from tests.support.browser import SIZES, new_page, running_browser
from tests.support.credentials import KeyFile
from tests.support.http_fronts import running_front
from tests.support.jobs import new_job, run_job
from tests.support.paths import ROOT
from tests.support.pipelines import WITH_PIPELINES, follow, new_pipeline
from tests.support.pipelines import submit as submit_pipeline
from tests.support.schedules import create as create_schedule
from tests.support.schedules import ended, new_schedule, trigger, until
from tests.support.stacks import stack_settings

FOLDER = ROOT / "docs" / "images"
JOBS = (
    ("alice", "summary", "Return the", {"max_tokens": 60}),
    ("bob", "nightly-4", "Set the", {"max_tokens": 40}),
    ("alice", "docs", "Return the item that", {"max_tokens": 120, "temperature": 0.2}),
    ("carol", "review-30", "Raise an error if", {"max_tokens": 80, "temperature": 0.4}),
)


@asynccontextmanager
async def running_stack(
    engine: str, environment: Mapping[str, Mapping[str, str]] | None = None
) -> AsyncIterator[tuple[Stack, llm_pb2_grpc.LlmServiceStub]]:
    """Run a stack while the context is open."""
    with tempfile.TemporaryDirectory() as folder:
        async with (
            Stack(stack_settings(folder, engine=engine), environment=environment) as stack,
            grpc.aio.insecure_channel(stack.address("gateway")) as channel,
        ):
            yield stack, llm_pb2_grpc.LlmServiceStub(channel)


async def take() -> None:
    """Take the pictures in docs/images."""
    FOLDER.mkdir(exist_ok=True)
    with_pipelines = {"gateway": {"PYTHONPATH": WITH_PIPELINES["gateway"]["PYTHONPATH"]}}
    async with running_stack("torch", with_pipelines) as (stack, stub):
        for user, request, prompt, params in JOBS:
            await run_job(stub, _named(user, request, prompt, params=params))
        late = _named("bob", "nightly-5", "Set the", params={"max_tokens": 2000}, timeouts={"total": {"seconds": 3}})
        await run_job(stub, late)
        longest = {"max_tokens": 2000, "temperature": 0.4}
        cancelled = await stub.Submit(llm_pb2.SubmitRequest(job=_named("carol", "draft", "Open the", params=longest)))
        await stub.Cancel(llm_pb2.CancelRequest(workflow_id=cancelled.workflow_id))
        job = _named("alice", "review-31", "def close(self):", params=longest)
        id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
        base = f"http://{stack.address('http')}"
        async with running_browser() as browser, new_page(browser, base, []) as page:
            await page.goto(f"/console/jobs/{id_}")
            await page.wait_for_selector(r"#output:text-matches('(\\S+\\s+){40}')")
            await page.screenshot(path=FOLDER / "console-job.png")
            await page.emulate_media(color_scheme="dark")
            await page.goto("/console/")
            await page.wait_for_selector(f"[data-key='{cancelled.workflow_id}'] .state-cancelled")
            await page.screenshot(path=FOLDER / "console-list.png")
            await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
            await page.emulate_media(color_scheme="light")
            await _take_article(stack, page)


def _named(user: str, request: str, prompt: str, **changes: Any) -> llm_pb2.JobRequest:
    """Return a job of the small model, of a team."""
    return new_job(prompt, user_id=user, request_id=request, labels={"team": "search"}, **changes)


async def _take_article(stack: Stack, page: Any) -> None:
    """Take pictures of a pipeline: as its tree grows, and when it asks.

    The page may not show that a certain step runs, because a step can end between two of its updates. Some step of the
    parts runs at almost any time.
    """
    growing = "#tree [data-key^='parts/']:not(:has(li)) .state-running"
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        stub = PipelineServiceStub(channel)
        request = new_pipeline("article", StringValue(value="rain"), user_id="alice", request_id="rain")
        id_ = (await submit_pipeline(stub, request)).pipeline_id
        await page.goto(f"/console/pipelines/{id_}")
        await page.wait_for_selector(growing)
        await page.screenshot(path=FOLDER / "console-pipeline.png", full_page=True)
        await page.emulate_media(color_scheme="dark")
        await page.wait_for_selector("#tree .state-needs-answer")
        await page.screenshot(path=FOLDER / "console-approval.png", full_page=True)


async def take_all(folder: Path) -> None:
    """Take a picture of every page, of each size."""
    async with (
        running_stack("simulated", WITH_PIPELINES) as (stack, stub),
        running_browser() as browser,
        new_page(browser, f"http://{stack.address('http')}", []) as page,
    ):
        for name in ("list", "batches", "pipelines", "schedules", "files"):
            await _picture(page, folder, f"{name}-empty", f"/console/{'' if name == 'list' else name}")
        await _take_work(stack, page, folder)
        await _take_pipelines(stack, page, folder)
        jobs = await _submit_all(stub)
        for name, id_ in jobs.items():
            await _picture(page, folder, f"job-{name}", f"/console/jobs/{id_}")
        for name, path in {
            "list": "/console/",
            "list-filtered-empty": "/console/?user_id=nobody",
            "list-bad-filter": "/console/?state=RUNNING",
            "models": "/console/models",
            "playground": "/console/playground",
            "playground-again": f"/console/playground?job={jobs['rich']}",
            "delete": f"/console/jobs/{jobs['failed']}/delete",
            "error": "/console/jobs/llmjob-nobody",
        }.items():
            await _picture(page, folder, name, path)
        await page.goto(f"/console/jobs/{jobs['queued']}")
        await page.click("summary:has-text('Cancel')")
        await page.fill("[name=reason]", "\x07")
        await page.click("button:has-text('Cancel this job')")
        await _picture(page, folder, "job-refused")
        await page.goto("/console/playground")
        await page.fill("#temperature", "9")
        await page.fill("#text", "Return the")
        await page.click("button:has-text('Submit')")
        await _picture(page, folder, "playground-refused")
        await page.goto(f"/console/jobs/{jobs['failed']}/delete")
        await page.click("button:has-text('Delete for good')")
        await page.wait_for_selector("#deletion .state-done")
        await _picture(page, folder, "deletion")
        await page.goto("/console/")
        await stack.processes["http"].kill()
        await page.wait_for_selector("#stale", state="visible")
        await _picture(page, folder, "list-not-up-to-date")
        await _take_signed_out(stack, browser, folder)


async def _take_work(stack: Stack, page: Any, folder: Path) -> None:
    """Take pictures of batches, schedules and files: running, ended, bad and paused."""
    temporal = await Client.connect(stack.address("temporal"), data_converter=data_converter)
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        stubs = Stubs(FileServiceStub(channel), BatchServiceStub(channel))
        stub: ScheduleServiceStub = ScheduleServiceStub(channel)
        bad = [*lines_of(2), {"request_id": "bad", "model": "unknown", "prompt": "", "x": 1}]
        ids = {"bad": (await create_batch(stubs, bad, "bob")).batch_id}
        async with running(temporal, stack.state_dir, failing=frozenset({3})):
            ids["ended"] = (await create_batch(stubs, lines_of(300), "alice", labels={"run": "nightly-4"})).batch_id
            await stubs.end(ids["ended"])
        await stubs.end(ids["bad"])
        ids["queued"] = (await create_batch(stubs, lines_of(50), "alice")).batch_id
        async with running(temporal, stack.state_dir, hold_after=4):
            ids["running"] = (await create_batch(stubs, lines_of(120), "alice", project_id="docs")).batch_id
            await page.goto(f"/console/batches/{ids['running']}")
            await page.wait_for_selector("#batch progress[max='120']:not([value='0'])")
            for name, id_ in ids.items():
                await _picture(page, folder, f"batch-{name}", f"/console/batches/{id_}")
            await _picture(page, folder, "batches", "/console/batches")
        times = {"cron": ["0 6 * * MON-FRI"], "time_zone": "Europe/Berlin", "intervals": [{"every": {"seconds": 7200}}]}
        good = new_schedule("Return the", user_id="alice", times=times)
        failing = new_schedule("[[fault:failed@1]]", user_id="bob", pause_on_failure=True)
        for name, schedule in (("schedule", good), ("schedule-paused", failing)):
            id_ = await create_schedule(stub, schedule)
            await trigger(stub, id_)
            await until(stub, id_, ended)
            await page.goto(f"/console/schedules/{id_}")
            await page.click("summary:has-text('Delete')")
            await _picture(page, folder, name)
        await _picture(page, folder, "schedules", "/console/schedules")
        await page.goto("/console/files")
        await page.click("summary >> nth=0")
        await _picture(page, folder, "files")


async def _take_pipelines(stack: Stack, page: Any, folder: Path) -> None:
    """Take pictures of pipelines: ended, failed, and one that needs an answer; and of the list."""
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        stub = PipelineServiceStub(channel)
        ids = {
            name: (await submit_pipeline(stub, new_pipeline(code, input_, user_id="alice"))).pipeline_id
            for name, code, input_ in (
                ("ended", "spending", Int32Value(value=8)),
                ("failed", "broken", Struct()),
                ("asks", "stubborn", StringValue(value="once")),
            )
        }
        for name in ("ended", "failed"):
            await follow(stub, ids[name])
        await follow(stub, ids["asks"], until=lambda seen: bool(seen.steps))
        for name, id_ in ids.items():
            await _picture(page, folder, f"pipeline-{name}", f"/console/pipelines/{id_}")
        await _picture(page, folder, "pipelines", "/console/pipelines")


async def _take_signed_out(stack: Stack, browser: Any, folder: Path) -> None:
    """Take pictures of the pages that only a gateway which asks for credentials leads to."""
    keys = KeyFile(folder / "keys.json")
    key = keys.add(SCOPES, tenant="beginners")
    gateway = stack.add("gateway", {"GATEWAY_ROLE": "api", "GATEWAY_API_KEYS_FILE": str(keys.path)})
    await gateway.start()
    await gateway.wait_ready()
    async with (
        running_front(stack, HTTP_GATEWAY=stack.address(gateway.name)) as front,
        new_page(browser, f"http://{front.address}", []) as page,
    ):
        await _picture(page, folder, "sign-in", "/console/")
        await page.fill("input[name=key]", "llmk_wrong_key")
        await page.keyboard.press("Enter")
        await page.wait_for_selector("[role=alert]")
        await _picture(page, folder, "sign-in-refused")
        await page.fill("input[name=key]", key)
        await page.keyboard.press("Enter")
        await page.wait_for_selector("text=No jobs yet")
        await _picture(page, folder, "list-empty-signed-in")
        await page.goto("/console/playground")
        await page.fill("#text", "Return the")
        await page.context.clear_cookies()
        await page.click("button:has-text('Submit')")
        await page.wait_for_selector("text=in another tab")
        await _picture(page, folder, "playground-signed-out")
    keys.path.unlink()


async def _submit_all(stub: llm_pb2_grpc.LlmServiceStub) -> dict[str, str]:
    """Submit jobs of each kind; return their ids by the name of the picture."""
    rich = new_job(
        labels={"team": "search", "run": "nightly-4"},
        messages=[
            {"role": "ROLE_SYSTEM", "content": "Be brief."},
            {"role": "ROLE_USER", "content": "What is a queue?"},
            {"role": "ROLE_ASSISTANT", "content": "A line."},
            {"role": "ROLE_USER", "content": "And a stack?"},
        ],
        params={"max_tokens": 120, "temperature": 0.2, "min_p": 0.1, "stop": ["</end>"]},
        project_id="docs",
    )
    ended = {
        "rich": rich,
        "long": new_job("word " * 1000, user_id="u" * 100, params={"max_tokens": 3}),
        "failed": new_job("[[fault:failed@2]]", params={"max_tokens": 3}),
    }
    ids = {name: (await run_job(stub, job)).final.status.workflow_id for name, job in ended.items()}
    open_jobs = {"queued": new_job(model="idle"), "running": new_job(params={"max_tokens": 8000})}
    for name, job in open_jobs.items():
        ids[name] = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    return ids


async def _picture(page: Any, folder: Path, name: str, path: str = "") -> None:
    """Take the picture of a page, or of the present one, of each size."""
    if path:
        await page.goto(path)
    for kind, size in SIZES.items():
        await page.set_viewport_size(size)
        await page.screenshot(path=folder / f"{name}-{kind}.png", full_page=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        asyncio.run(take_all(Path(sys.argv[1])))
    else:
        asyncio.run(take())
