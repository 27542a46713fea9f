"""Further HTTP fronts of a stack, for tests that give them settings of their own or end them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from deploy.local.process import Process
from deploy.local.stack import Stack


@dataclass(frozen=True)
class RunningFront:
    """A front that runs, and a client of it."""

    process: Process
    client: httpx.AsyncClient
    address: str
    metrics_url: str


@asynccontextmanager
async def running_front(
    stack: Stack, *, scheme: str = "http", verify: Any = True, **settings: str
) -> AsyncIterator[RunningFront]:
    """Run one more front while the context is open. A test may end it before."""
    process = stack.add("http", settings)
    address = stack.address(process.name)
    await process.start()
    try:
        await process.wait_ready()
        base = f"{scheme}://{address}"
        async with httpx.AsyncClient(base_url=base, verify=verify, timeout=60, trust_env=False) as client:
            yield RunningFront(process, client, address, stack.metrics_url(process.name))
    finally:
        if process.running:
            await process.terminate()
