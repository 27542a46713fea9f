"""Metrics that a process serves to Prometheus, parsed for tests."""

import asyncio
import json
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
"""Services that call Temporal."""
SERVICES = (*TEMPORALS, "codec", "http")
OURS = ("llm_", "gen_ai_", "rpc_", "http_")
"""Prefixes of the suite's own metrics."""


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
        """Return the sums of a series by labels, over the samples that have the chosen labels."""
        sums: dict[tuple[str, ...], float] = {}
        for sample in self.samples:
            if sample.name == name and chosen.items() <= sample.labels.items():
                key = tuple(sample.labels.get(label, "") for label in labels)
                sums[key] = sums.get(key, 0) + sample.value
        return sums

    def total(self, name: str, **chosen: str) -> float:
        """Return the sum of a series over the samples that have the chosen labels."""
        return sum(self.by(name, **chosen).values())


@asynccontextmanager
async def measured_stack(folder: Path, **gateway: str) -> AsyncIterator[Stack]:
    """Run a stack in which only one job of every outcome has run. `gateway` are further settings of its gateway.

    The job that uses up its total time is left out. Its last workflow task comes so close to Temporal's own timeout of
    the workflow that the task may be lost and then be counted twice: see workflows.outcome_metrics.
    """
    models = json.loads(FAST["gateway"]["GATEWAY_MODELS"])
    models[0]["price"] = {"currency": "EUR", "prompt_per_million": 1, "output_per_million": 2}
    environment = {**FAST, "gateway": {**FAST["gateway"], "GATEWAY_MODELS": json.dumps(models), **gateway}}
    async with Stack(stack_settings(folder), environment=environment) as stack:
        temporal = await Client.connect(stack.address("temporal"), data_converter=data_converter)
        chosen = [run for name, run in OUTCOMES.items() if name != "timed-out-in-all"]
        async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
            await asyncio.gather(*(run(LlmServiceStub(channel), temporal) for run in chosen))
        await get(f"http://{stack.address('codec')}/decode", b"{}")
        yield stack


async def get(url: str, body: bytes | None = None) -> str:
    """Return the response to GET, or to POST with a body."""
    return await asyncio.to_thread(lambda: urllib.request.urlopen(url, body, timeout=5).read().decode())


async def scrape(stack: Stack, *names: str) -> Scrape:
    """Scrape these processes; by default all services."""
    return Scrape([await get(stack.metrics_url(name)) for name in names or SERVICES])


async def scrape_until(stack: Stack, condition: Callable[[Scrape], bool], *names: str) -> Scrape:
    """Scrape until the condition holds: metrics of Temporal's SDK are served half a second late."""
    async with asyncio.timeout(30):
        while not condition(found := await scrape(stack, *names)):  # noqa: ASYNC110  nothing notifies
            await asyncio.sleep(0.1)
        return found
