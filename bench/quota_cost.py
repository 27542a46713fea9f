"""What a quota of open jobs costs: the latency of Submit, jobs a second and processor time, with a quota and without.

Two tenants take turns at one gateway, so that other load of the machine affects both:

- suite_quota: has a quota that it does not reach. Each job reserves a slot of the ledger and releases it at its end;
- suite_no_quota: has none, and the same jobs.

`submit_ms_p50` is that of Submits one after another, when each reserves alone. `jobs_per_second` is that of jobs at
once, which share updates and signals of the ledger. `refused_ms_p50` is that of a Submit beyond a quota that is full.

    python -m bench.quota_cost
"""

import json
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import grpc

from bench.support import script
from bench.support.report import Report
from bench.support.stacks import new_stack, simulated
from bench.support.usage import cpu_of
from bench.support.watched_job import finish, submit, together
from deploy.local.stack import Stack
from llm_pb.llm_pb2_grpc import LlmServiceStub
from runtime.auth_keys import ApiKey, make_key, write_keys


@dataclass(frozen=True)
class Sizes:
    """The options of the command line."""

    rounds: int = 7
    submits: int = 50
    jobs: int = 200
    at_once: int = 50
    refusals: int = 50


QUOTA: Final = "suite_quota"
NO_QUOTA: Final = "suite_no_quota"
FULL: Final = "suite_quota_full"
TENANTS: Final = {QUOTA: "quota", NO_QUOTA: "free", FULL: "full"}
QUOTAS: Final = {"quota": {"max_open_jobs": 5000}, "free": {}, "full": {"max_open_jobs": 0}}


async def measure(sizes: Sizes) -> Report:
    """Return the report."""
    report = Report(
        "What does a quota of open jobs cost?",
        "Submit: ms. Jobs a second, submitted, watched and finished. Engine: simulated, one token, no wait.",
    )
    async with running() as (stack, stubs):
        for who in (QUOTA, NO_QUOTA):
            # The first jobs of a process fill its caches.
            await jobs(stack, stubs[who], sizes)
        for number in range(sizes.rounds):
            # The first of a round may find less other load, so the order rotates.
            for who in (QUOTA, NO_QUOTA)[:: 1 if number % 2 else -1]:
                report.add("submits", who, {"submit_ms_p50": await one_by_one(stubs[who], sizes.submits)})
                report.add("jobs", who, await jobs(stack, stubs[who], sizes))
            refused = partial(refused_submit, stubs[FULL])
            report.add("refusals", FULL, {"refused_ms_p50": await median_ms(refused, sizes.refusals)})
    report.ratio("submits", "submit_ms_p50", NO_QUOTA, who=QUOTA)
    report.ratio("jobs", "jobs_per_second", NO_QUOTA, who=QUOTA)
    report.ratio("jobs", "cpu_ms_a_job", NO_QUOTA, who=QUOTA)
    return report


@asynccontextmanager
async def running() -> AsyncIterator[tuple[Stack, dict[str, Any]]]:
    """Run the stack; yield it and the stub of each tenant."""
    with TemporaryDirectory() as folder:
        path, made = Path(folder) / "keys.json", {who: make_key() for who in TENANTS}
        write_keys(
            path,
            [
                ApiKey(id=id_, sha256=digest, scopes=("jobs:*",), tenant=TENANTS[who])
                for who, (_, id_, digest) in made.items()
            ],
        )
        gateway = {"GATEWAY_API_KEYS_FILE": str(path), "GATEWAY_TENANTS": json.dumps(QUOTAS)}
        with new_stack({"gateway": gateway, "gpu-worker": simulated(tokens_per_second=1e9)}) as stack:
            async with stack, grpc.aio.insecure_channel(stack.address("gateway")) as channel:
                stub = LlmServiceStub(channel)
                yield stack, {who: CallsAs(stub, key) for who, (key, _, _) in made.items()}


class CallsAs:
    """A stub whose calls carry an API key."""

    def __init__(self, stub: LlmServiceStub, key: str) -> None:
        self._stub = stub
        self._metadata = (("authorization", f"Bearer {key}"),)

    def __getattr__(self, name: str) -> Any:
        return partial(getattr(self._stub, name), metadata=self._metadata)


async def one_by_one(stub: Any, count: int) -> float:
    """Submit jobs one after another; return the median latency in ms. They have ended when this returns."""
    ids: list[str] = []

    async def one() -> None:
        ids.append(await submit(stub, tokens=1))

    median = await median_ms(one, count)
    for id_ in ids:
        await finish(stub, id_)
    return median


async def median_ms(call: Callable[[], Awaitable[object]], count: int) -> float:
    """Return the median duration of calls one after another, in ms."""
    durations = []
    for _ in range(count):
        began = time.perf_counter()
        await call()
        durations.append(1000 * (time.perf_counter() - began))
    return statistics.median(durations)


async def refused_submit(stub: Any) -> None:
    """Submit a job beyond the quota."""
    try:
        await submit(stub, tokens=1)
    except grpc.aio.AioRpcError as error:
        if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise
    else:
        raise RuntimeError("a job beyond the quota was accepted")


async def jobs(stack: Stack, stub: Any, sizes: Sizes) -> dict[str, float]:
    """Run jobs to their ends; return the figures."""

    async def job() -> None:
        await finish(stub, await submit(stub, tokens=1))

    began, before = time.perf_counter(), sum(cpu_of(stack).values())
    await together(sizes.jobs, job, sizes.at_once)
    return {
        "jobs_per_second": sizes.jobs / (time.perf_counter() - began),
        "cpu_ms_a_job": 1000 * (sum(cpu_of(stack).values()) - before) / sizes.jobs,
    }


if __name__ == "__main__":
    script.run(measure, Sizes(), Sizes(rounds=1, submits=2, jobs=4, at_once=2, refusals=2), __doc__)
