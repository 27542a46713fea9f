"""Cancels jobs in each phase, for bench.cancel_latency."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from aiohttp import web

from bench.support.watched_job import WatchedJob
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub

PATIENCE_SECONDS: Final = 0.4
"""Maximum wait of a job without a slot for the cancel of the job before it. Without a limit slow cancels would make the
script take minutes."""

Sample = dict[str, float]
"""Milliseconds from one cancel to each of its effects, by name."""


class Receiver:
    """A receiver of webhooks that answers when answer() is called."""

    def __init__(self) -> None:
        self.url = ""
        self._answers: dict[str, asyncio.Event] = {}

    def answer(self, path: str) -> None:
        """Answer the request for the path."""
        self._event(path).set()

    async def start(self) -> web.AppRunner:
        """Listen; return the runner, which the caller has to clean up."""
        app = web.Application()
        app.router.add_post("/{path}", self._handle)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    async def _handle(self, request: web.Request) -> web.Response:
        await self._event(request.match_info["path"]).wait()
        return web.Response()

    def _event(self, path: str) -> asyncio.Event:
        return self._answers.setdefault(path, asyncio.Event())


@dataclass
class Phases:
    """Each method cancels `jobs` jobs in the phase of its name, which bench.cancel_latency explains.

    The stack must serve the models "queued", without a worker, and "prefill" and "decode", each with a worker of one
    slot.
    """

    stub: LlmServiceStub
    receiver: Receiver
    jobs: int
    count: int = 0

    async def queued(self) -> list[Sample]:
        """See the class."""
        jobs = [await WatchedJob.submit(self.stub, model="queued") for _ in range(self.jobs)]
        for job in jobs:
            await job.until(partial(job.in_state, llm_pb2.JOB_STATE_QUEUED))
        return await self._cancel_in_turn(jobs)

    async def prefill(self) -> list[Sample]:
        """See the class."""
        return await self._in_the_only_slot("prefill", lambda job: job.status.progress.stage == "prefill")

    async def decode(self) -> list[Sample]:
        """See the class."""
        return await self._in_the_only_slot("decode", lambda job: job.output_bytes > 0)

    async def _in_the_only_slot(self, model: str, reached: Callable[[WatchedJob], bool]) -> list[Sample]:
        # The jobs are cancelled long before.
        params = llm_pb2.SamplingParams(max_tokens=8191)
        # Two jobs wait, so that at least one has reached the queue. Temporal does not promise their order.
        waiting = [await WatchedJob.submit(self.stub, model=model, params=params) for _ in range(3)]
        running = await first_started(waiting)
        samples = []
        for _ in range(self.jobs):
            waiting.remove(running)
            await running.until(partial(reached, running))
            cancelled_at = time.time()
            sample = await self._cancel(running)
            running = await first_started(waiting)
            sample["slot_free"] = (running.status.start_time.ToNanoseconds() / 1e9 - cancelled_at) * 1000
            samples.append(sample)
            waiting.append(await WatchedJob.submit(self.stub, model=model, params=params))
        for job in sorted(waiting, key=lambda job: job is running):
            await self._cancel(job)
        return samples

    async def between_attempts(self) -> list[Sample]:
        """See the class."""
        jobs = [
            await WatchedJob.submit(self.stub, model="decode", prompt=f"[[fault:failed@0]]{number}")
            for number in range(self.jobs)
        ]
        for job in jobs:
            await job.until(partial(job.status_has, "error"))
            await job.until(partial(job.in_state, llm_pb2.JOB_STATE_QUEUED))
        return await self._cancel_in_turn(jobs)

    async def notifying(self) -> list[Sample]:
        """See the class."""
        samples = []
        for _ in range(self.jobs):
            self.count += 1
            path = f"{self.count}"
            target = llm_pb2.NotifyTarget(webhook=llm_pb2.Webhook(url=f"{self.receiver.url}/{path}"))
            job = await WatchedJob.submit(
                self.stub, model="decode", params=llm_pb2.SamplingParams(max_tokens=1), notify=[target]
            )
            await job.until(partial(job.in_state, llm_pb2.JOB_STATE_NOTIFYING))
            answered = await self._call_cancel(job)
            answered_at = time.time()
            self.receiver.answer(path)
            await job.end()
            require(job, llm_pb2.JOB_STATE_SUCCEEDED)
            samples.append({"answered": answered, "stream_ended": (job.ended - answered_at) * 1000})
        return samples

    async def finished(self) -> list[Sample]:
        """See the class."""
        job = await WatchedJob.submit(self.stub, model="decode", params=llm_pb2.SamplingParams(max_tokens=1))
        await job.end()
        return [{"answered": await self._call_cancel(job)} for _ in range(self.jobs)]

    async def _cancel_in_turn(self, jobs: list[WatchedJob]) -> list[Sample]:
        cancels = []
        for job in jobs:
            cancels.append(asyncio.create_task(self._cancel(job)))
            await asyncio.wait(cancels[-1:], timeout=PATIENCE_SECONDS)
        return await asyncio.gather(*cancels)

    async def _cancel(self, job: WatchedJob) -> Sample:
        begin = time.time()
        answered = await self._call_cancel(job)
        await job.end()
        require(job, llm_pb2.JOB_STATE_CANCELLED)
        return {"answered": answered, "stream_ended": (job.ended - begin) * 1000}

    async def _call_cancel(self, job: WatchedJob) -> float:
        begin = time.perf_counter()
        await self.stub.Cancel(llm_pb2.CancelRequest(workflow_id=job.workflow_id))
        return (time.perf_counter() - begin) * 1000


async def first_started(jobs: list[WatchedJob]) -> WatchedJob:
    """Wait until a worker has started one of the jobs, and return it."""
    waits = {asyncio.create_task(job.until(partial(job.status_has, "start_time"))): job for job in jobs}
    try:
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        started = done.pop()
        await started
        return waits[started]
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


def require(job: WatchedJob, state: "llm_pb2.JobState.ValueType") -> None:
    """Raise RuntimeError unless the job ended in the state: otherwise its figures would be meaningless."""
    if job.status.state != state:
        raise RuntimeError(f"{job.workflow_id} ended otherwise: {job.status}")
