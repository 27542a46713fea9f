"""The gauge of open jobs, with a real Temporal server that goes down and comes back."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from temporalio.client import Client

from deploy.local.stack import Stack
from jobs import names
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from payload_converter import data_converter
from services.gateway.open_work import OpenWork
from tests.support.jobs import new_job, until_output
from tests.support.scrapes import Scrape, scrape, scrape_until
from tests.support.stacks import FAST, stack_settings

ROOM = {"context_tokens": 8192, "max_output_tokens": 8192, "default_max_tokens": 64}
MODELS = [
    {"name": "twin", "queue": "llm-gpu-activities.twins", **ROOM},
    {"name": "other-twin", "queue": "llm-gpu-activities.twins", **ROOM},
    {"name": "docstrings", **ROOM},
    {"name": "idle", "queue": "llm-gpu-activities.idle", **ROOM},
]
"""Models, whose jobs the gateway counts in this order."""
NOTHING = {
    ("docstrings", "queued"): 0,
    ("docstrings", "running"): 0,
    ("idle", "queued"): 0,
    ("idle", "running"): 0,
}


@pytest.fixture(scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """Run a stack whose only worker runs one job at a time."""
    environment = {
        "gateway": {
            **FAST["gateway"],
            "GATEWAY_MODELS": json.dumps(MODELS),
            "GATEWAY_OPEN_JOBS_INTERVAL": "PT1S",
        },
        "gpu-worker": {
            **FAST["gpu-worker"],
            "GPU_WORKER_MAX_CONCURRENT": "1",
            "GPU_WORKER_ENGINE_OPTIONS": '{"tokens_per_second": 20}',
        },
    }
    kinds = ("temporal", "nats", "gateway", "gpu-worker")
    async with Stack(stack_settings(tmp_path_factory.mktemp("open")), only=kinds, environment=environment) as running:
        yield running


def counted(found: Scrape) -> dict[tuple[str, ...], float]:
    return found.by("llm_job_open", "gen_ai_request_model", "llm_job_state")


async def until_counted(stack: Stack, expected: dict[tuple[str, str], float]) -> None:
    await scrape_until(stack, lambda found: counted(found) == expected, "gateway")


async def test_open_jobs_are_counted_by_model_and_state(stack: Stack) -> None:
    """Models that share a queue have no samples, because their jobs cannot be distinguished in the queue."""
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        client = LlmServiceStub(channel)

        async def submit(model: str) -> str:
            job = new_job(model=model, params={"max_tokens": 8000})
            return (await client.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id

        await until_counted(stack, NOTHING)
        ids = [await submit("docstrings")]
        await until_output(client, ids[0])
        ids += [await submit(model) for model in ("docstrings", "docstrings", "idle", "twin")]
        open_jobs = NOTHING | {("docstrings", "running"): 1, ("docstrings", "queued"): 2, ("idle", "queued"): 1}
        await until_counted(stack, open_jobs)

        for id_ in ids:
            await client.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
        await until_counted(stack, NOTHING)


async def test_nothing_is_said_while_temporal_is_away(stack: Stack) -> None:
    """The gauge has no samples instead of the last ones, and all samples again afterwards."""
    await until_counted(stack, NOTHING)
    temporal, gateway = stack.processes["temporal"], stack.processes["gateway"]
    await temporal.kill()
    await until_counted(stack, {})
    await temporal.start()
    await temporal.wait_ready()
    await until_counted(stack, NOTHING)
    messages = [json.loads(line)["message"] for line in gateway.log.splitlines()]
    warnings = [message for message in messages if "cannot be counted" in message]
    assert len(warnings) == 2, "the log must have one line for each model that was counted before"


async def test_counting_can_be_turned_off(stack: Stack) -> None:
    """The gateway never calls CountWorkflowExecutions, neither before nor after a call that reaches Temporal."""
    silent = stack.add("gateway", {"GATEWAY_OPEN_JOBS_INTERVAL": "PT0S"})
    await silent.start()
    await silent.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(silent.name)) as channel:
        await LlmServiceStub(channel).ListModels(llm_pb2.ListModelsRequest())

    def asked(found: Scrape, operation: str) -> float:
        return found.total("temporal_request_total", operation=operation)

    found = await scrape_until(stack, lambda found: asked(found, "DescribeTaskQueue") > 0, silent.name)
    assert asked(found, "CountWorkflowExecutions") == 0
    assert asked(await scrape(stack, "gateway"), "CountWorkflowExecutions") > 0
    assert counted(found) == {}
    await silent.terminate()


async def test_the_oldest_batch_is_found_beyond_the_first_page(stack: Stack) -> None:
    """Each look lists one page, and the next one goes on where it has ended."""
    temporal = await Client.connect(stack.address("temporal"), data_converter=data_converter)
    reader = InMemoryMetricReader()
    meter = MeterProvider([reader]).get_meter("test")
    looking = asyncio.create_task(OpenWork(temporal, meter, "batch", most=2).keep_counting(timedelta(milliseconds=50)))

    async def until(condition: Callable[[dict[str, float]], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition(read()):  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    def read() -> dict[str, float]:
        found = reader.get_metrics_data()
        return {
            metric.name: point.value
            for resource in (found.resource_metrics if found else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
        }

    # Nobody polls the queue, so that none of them ends.
    handles = [
        await temporal.start_workflow(names.BATCH_WORKFLOW_TYPE, id=f"llmbatch-many-{number}", task_queue="nobody")
        for number in range(5)
    ]
    oldest = (await handles[0].describe()).start_time
    await until(lambda seen: seen.get("llm.batch.open") == 5)
    least = (datetime.now(UTC) - oldest).total_seconds()
    await until(lambda seen: seen["llm.batch.oldest.age"] >= least)
    await handles[0].terminate()
    await until(lambda seen: seen["llm.batch.open"] == 4)
    for handle in handles[1:]:
        await handle.terminate()
    await until(lambda seen: (seen["llm.batch.open"], seen["llm.batch.oldest.age"]) == (0, 0))
    looking.cancel()
