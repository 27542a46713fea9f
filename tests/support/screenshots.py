"""Takes the pictures of the console in docs/images: `make screenshots`. They show real jobs of the small model."""

import asyncio
import tempfile

import grpc

from deploy.local.stack import Stack
from llm_pb import llm_pb2, llm_pb2_grpc
from tests.support.browser import new_page, running_browser
from tests.support.jobs import run_job
from tests.support.paths import ROOT
from tests.support.stacks import stack_settings

FOLDER = ROOT / "docs" / "images"
SIZE = {"width": 900, "height": 600}
JOBS = (
    ("alice", "summary", "Return the", {"max_tokens": 60}),
    ("bob", "nightly-4", "Set the", {"max_tokens": 40}),
    ("alice", "docs", "Return the item that", {"max_tokens": 120, "temperature": 0.2}),
    ("carol", "review-31", "def close(self):", {"max_tokens": 260, "temperature": 0.4}),
)


async def take() -> None:
    """Run a stack, submit jobs, take the pictures."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        async with Stack(stack_settings(folder, engine="torch")) as stack:
            async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
                stub = llm_pb2_grpc.LlmServiceStub(channel)
                for user, request, prompt, params in JOBS:
                    job = llm_pb2.JobRequest(
                        user_id=user, request_id=request, model="docstrings", prompt=prompt, labels={"team": "search"}
                    )
                    for name, value in params.items():
                        setattr(job.params, name, value)
                    seen = await run_job(stub, job)
            base = f"http://{stack.address('http')}"
            async with running_browser() as browser, new_page(browser, base, [], viewport=SIZE) as page:
                await page.goto(f"/console/jobs/{seen.final.status.workflow_id}")
                await page.screenshot(path=FOLDER / "console-job.png")
                await page.emulate_media(color_scheme="dark")
                await page.goto("/console/")
                await page.wait_for_selector(f"[data-key='{seen.final.status.workflow_id}']")
                await page.screenshot(path=FOLDER / "console-list.png")


if __name__ == "__main__":
    asyncio.run(take())
