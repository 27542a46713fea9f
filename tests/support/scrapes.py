"""What a process serves to Prometheus, read and asked about."""

import asyncio
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from temporalio.client import Client

from deploy.local.stack import Stack
from llm_pb.llm_pb2_grpc import LlmServiceStub
from payload_converter import data_converter
from tests.support.outcomes import OUTCOMES
from tests.support.stacks import FAST, stack_settings

TEMPORALS = ("gateway", "gpu-worker", "notifier")
"""The services that call Temporal."""
SERVICES = (*TEMPORALS, "codec")
OURS = ("llm_", "gen_ai_", "rpc_", "http_")
"""How the names of the suite's own metrics begin."""


class Scrape:
    """One scrape of some processes."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.families: list[Metric] = []
        for text in texts:
            self.families += text_string_to_metric_families(text)

    @property
    def samples(self) -> list[Sample]:
        return [sample for family in self.families for sample in family.samples]

    @property
    def ours(self) -> list[Metric]:
        return [family for family in self.families if family.name.startswith(OURS)]

    def by(self, name: str, *labels: str, **chosen: str) -> dict[tuple[str, ...], float]:
        """Return sums of a series by labels; only of samples that have the chosen ones."""
        sums: dict[tuple[str, ...], float] = {}
        for sample in self.samples:
            if sample.name == name and chosen.items() <= sample.labels.items():
                key = tuple(sample.labels.get(label, "") for label in labels)
                sums[key] = sums.get(key, 0) + sample.value
        return sums

    def total(self, name: str, **chosen: str) -> float:
        """Return the sum of a series."""
        return sum(self.by(name, **chosen).values())


@asynccontextmanager
async def measured_stack(folder: Path) -> AsyncIterator[Stack]:
    """Run a stack in which one job of every outcome ran, and nothing else.

    All but the job that spends its total time: its last workflow task comes so close to Temporal's own end of the
    workflow that it may be lost, and then count twice: see workflows.outcome_metrics.
    """
    async with Stack(stack_settings(folder), environment=FAST) as stack:
        temporal = await Client.connect(stack.address("temporal"), data_converter=data_converter)
        chosen = [run for name, run in OUTCOMES.items() if name != "timed-out-in-all"]
        async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
            await asyncio.gather(*(run(LlmServiceStub(channel), temporal) for run in chosen))
        await get(f"http://{stack.address('codec')}/decode", b"{}")
        yield stack


async def get(url: str, body: bytes | None = None) -> str:
    """Return what a URL serves, or answers to a body."""
    return await asyncio.to_thread(lambda: urllib.request.urlopen(url, body, timeout=5).read().decode())


async def scrape(stack: Stack, *names: str) -> Scrape:
    """Scrape these processes, by default all services."""
    return Scrape([await get(stack.metrics_url(name)) for name in names or SERVICES])


async def scrape_until(stack: Stack, condition: Callable[[Scrape], bool], *names: str) -> Scrape:
    """Scrape until the condition holds: what Temporal's SDK measures is served half a second later."""
    async with asyncio.timeout(30):
        while not condition(found := await scrape(stack, *names)):  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.1)
        return found
