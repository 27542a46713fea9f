"""What jobs cost and what their budgets allow: exact, whatever dies, on a stack of its own whose model has a price."""

import asyncio
import json
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from temporalio.client import Client

from deploy.local.process import Process
from deploy.local.stack import Stack
from durable_llm.errors import BudgetSpent
from jobs import names
from llm_pb import common_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from payload_converter import data_converter
from tests.support.commands import run
from tests.support.http_fronts import running_front
from tests.support.jobs import (
    assert_not_tried_again,
    details_of,
    new_job,
    run_job,
    unpack,
    until_output,
    watch,
    webhook,
)
from tests.support.receivers import Receiver, status
from tests.support.scrapes import scrape_until
from tests.support.stacks import FAST, stack_settings
from tests.support.watchers import when_output_reaches

SIZES = {"context_tokens": 8192, "max_output_tokens": 8192, "default_max_tokens": 64}
PRICE = {"currency": "EUR", "prompt_per_million": "0.15", "output_per_million": 0.7}
PROMPT, OUTPUT = 150_000, 700_000
"""The price in millionths of the currency for a million tokens."""
SLOW = {"tokens_per_second": 100}


def models(**price: Any) -> str:
    """Return the setting GATEWAY_MODELS with these changes of the price."""
    served = {"name": "docstrings", "tokenizer": "models/docstrings/tokenizer.json", "price": {**PRICE, **price}}
    free = {"name": "free", "queue": "llm-gpu-activities.free", "tokenizer": "models/docstrings/tokenizer.json"}
    return json.dumps([{**SIZES, **served}, {**SIZES, **free}])


def cost(metadata: llm_pb2.ResultMetadata) -> int:
    """Return what a result costs: the definition, in other words than the code's."""
    millionths, rest = divmod(metadata.prompt_tokens * PROMPT + metadata.output_tokens * OUTPUT, 1_000_000)
    return millionths + (rest > 0)


@pytest.fixture(scope="module")
async def priced(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    gateway = {**FAST["gateway"], "GATEWAY_MODELS": models(), "GATEWAY_HEARTBEAT_TIMEOUT": "PT3S"}
    settings = stack_settings(tmp_path_factory.mktemp("costs"))
    only = ("temporal", "nats", "gateway", "notifier")
    async with Stack(settings, only=only, environment={**FAST, "gateway": gateway}) as stack:
        yield stack


@pytest.fixture(scope="module")
async def client(priced: Stack) -> AsyncIterator[LlmServiceStub]:
    async with grpc.aio.insecure_channel(priced.address("gateway")) as channel:
        yield LlmServiceStub(channel)


@asynccontextmanager
async def worker(stack: Stack, **options: Any) -> AsyncIterator[Process]:
    """Run a worker with these options of the simulated engine. It may have died when the context ends."""
    process = stack.add("gpu-worker", {"GPU_WORKER_ENGINE_OPTIONS": json.dumps({"tokens_per_second": 400, **options})})
    await process.start()
    await process.wait_ready()
    try:
        yield process
    finally:
        if process.running:
            await process.terminate()


async def submit(stub: LlmServiceStub, job: llm_pb2.JobRequest) -> str:
    return (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id


async def violations(stub: LlmServiceStub, job: llm_pb2.JobRequest) -> dict[str, str]:
    """Return why a job is refused, by field."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await submit(stub, job)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    return {item.field: item.description for item in details_of(error.value)["BadRequest"].field_violations}


def reason_of(status: llm_pb2.JobStatus) -> str:
    return str(unpack(status.error)["ErrorInfo"].reason)


async def until_listed(stub: LlmServiceStub, costs: dict[str, int]) -> None:
    """Return once List shows these costs of these jobs, by their ids."""
    async with asyncio.timeout(60):
        found: dict[str, int] = {}
        while {id_: found.get(id_) for id_ in costs} != costs:
            await asyncio.sleep(0.2)
            listed = await stub.List(llm_pb2.ListRequest(page_size=100))
            found = {job.status.workflow_id: job.cost_micros for job in listed.jobs if job.HasField("cost_micros")}


async def test_every_outcome_costs_what_it_has(priced: Stack, client: LlmServiceStub, receiver: Receiver) -> None:
    """Whole, cancelled, failed and timed-out results. All that shows a job tells the same cost."""
    url = receiver.on("/costs", status(200))
    async with worker(priced, **SLOW):
        seen = [await run_job(client, new_job(params={"max_tokens": 7}, notify=webhook(url)))]
        failing = new_job("[[fault:oom@5]]", params={"max_tokens": 9})
        limit = llm_pb2.JobTimeouts(run=Duration(seconds=2))
        late = new_job(params={"max_tokens": 8000}, timeouts=limit)
        seen += [await run_job(client, failing), await run_job(client, late)]
        id_ = await submit(client, new_job(params={"max_tokens": 8000}))
        await until_output(client, id_)
        await client.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
        seen.append(await watch(client, id_))
    assert [one.states[-1] for one in seen] == ["SUCCEEDED", "FAILED", "TIMED_OUT", "CANCELLED"]
    for one in seen:
        metadata = one.final.result.metadata
        assert metadata.prompt_tokens > 0
        assert metadata.output_tokens > 0
        assert metadata.cost_micros == cost(metadata)
        id_ = one.final.status.workflow_id
        read = await client.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))
        job = await client.GetJob(llm_pb2.GetJobRequest(workflow_id=id_))
        assert read.result.metadata == job.result.metadata == metadata
    costs = {one.final.status.workflow_id: one.final.result.metadata.cost_micros for one in seen}
    await until_listed(client, costs)
    (request,) = await receiver.received("/costs")
    assert request.event["data"]["result"]["metadata"]["costMicros"] == str(seen[0].final.result.metadata.cost_micros)
    total = sum(one.final.result.metadata.cost_micros for one in seen)
    labels = {"gen_ai_request_model": "docstrings", "llm_tenant": ""}
    await scrape_until(priced, lambda now: now.total("llm_job_cost_micros_total", **labels) == total, "gateway")


async def test_a_terminated_job_costs_what_it_left(priced: Stack, client: LlmServiceStub) -> None:
    """Its workflow could not settle the outcome."""
    temporal = await Client.connect(priced.address("temporal"), data_converter=data_converter)
    async with worker(priced, **SLOW):
        id_ = await submit(client, new_job(params={"max_tokens": 8000}))
        await until_output(client, id_)
        await temporal.get_workflow_handle(id_).terminate()
        metadata = (await watch(client, id_)).final.result.metadata
    assert metadata.output_tokens > 0
    assert metadata.cost_micros == cost(metadata)


async def test_models_tell_their_price(client: LlmServiceStub) -> None:
    priced, free = (await client.ListModels(llm_pb2.ListModelsRequest())).models
    expected = {"currency": "EUR", "prompt_micros_per_million": PROMPT, "output_micros_per_million": OUTPUT}
    assert priced.price == llm_pb2.ModelPrice(**expected)
    assert not free.HasField("price")


async def test_people_see_prices_and_costs(priced: Stack, client: LlmServiceStub) -> None:
    """On the command line and in the console's list."""
    async with worker(priced):
        seen = await run_job(client, new_job("Hi.", params={"max_tokens": 3}))
    command, address = (sys.executable, "-m", "durable_llm"), ("--address", priced.address("gateway"))
    shown = await run(*command, "get", seen.final.status.workflow_id, *address)
    assert re.search(r"^cost +0\.000003$", shown.output, re.MULTILINE), shown
    assert "0.15 + 0.70 EUR/M" in (await run(*command, "models", *address)).output
    job = seen.final.status.workflow_id
    await until_listed(client, {job: seen.final.result.metadata.cost_micros})
    async with running_front(priced) as front:
        page = (await front.client.get("/console/")).text
    row = re.search(rf'<tr data-key="{job}">.*?</tr>', page, re.DOTALL)
    assert row is not None
    assert ">0.000003</td>" in row[0]


async def test_a_budget_of_tokens_is_exact_across_a_kill(priced: Stack, client: LlmServiceStub) -> None:
    """The job ends at the token, keeps its output, and is not tried again."""
    async with worker(priced):
        whole = await run_job(client, new_job("Go on.", params={"max_tokens": 300}))
    assert whole.states[-1] == "SUCCEEDED"
    budgets = [
        common_pb2.Budget(output_tokens=300),
        # 6 prompt tokens and 300 output tokens cost 210.9.
        common_pb2.Budget(cost_micros=211, output_tokens=8000),
    ]
    for budget in budgets:
        async with worker(priced, **SLOW) as first:
            id_ = await submit(client, new_job("Go on.", params={"max_tokens": 4000}, budget=budget))
            await when_output_reaches(client, id_, len(whole.output) // 3)
            first.signal(signal.SIGKILL)
            await first.wait()
        async with worker(priced, **SLOW):
            seen = await watch(client, id_)
        assert seen.states[-1] == "FAILED"
        assert reason_of(seen.final.status) == BudgetSpent.reason
        assert_not_tried_again(seen)
        result = seen.final.result
        assert result.metadata.attempts == 2
        assert (result.metadata.output_tokens, result.metadata.wasted_tokens) == (300, 0)
        assert seen.output == result.output.encode()
        # Text that a job holds back until the next token is certain only at the end of an answer.
        assert whole.output.startswith(seen.output) or seen.output == whole.output
        assert result.metadata.cost_micros == cost(result.metadata) == 211


async def test_what_ends_by_itself_within_its_budget_succeeds(priced: Stack, client: LlmServiceStub) -> None:
    """Also at the last token: max_tokens is reached together with the budget, or the model ends its answer there."""
    async with worker(priced, answer_tokens=4):
        equal = new_job(params={"max_tokens": 3}, budget=common_pb2.Budget(output_tokens=3))
        ended = new_job(params={"max_tokens": 9}, budget=common_pb2.Budget(output_tokens=5, prompt_tokens=50))
        results = [(await run_job(client, job)).final for job in (equal, ended)]
    assert [one.status.state for one in results] == [llm_pb2.JOB_STATE_SUCCEEDED] * 2
    assert [one.result.metadata.output_tokens for one in results] == [3, 5]
    reasons = [llm_pb2.FINISH_REASON_LENGTH, llm_pb2.FINISH_REASON_STOP]
    assert [one.result.finish_reason for one in results] == reasons


async def test_a_prompt_beyond_the_budget_is_refused(priced: Stack, client: LlmServiceStub) -> None:
    """By the gateway where its tokenizer counts it, otherwise by the worker before the engine runs."""
    long = "Return the value. " * 20
    found = await violations(client, new_job(long, budget=common_pb2.Budget(prompt_tokens=5)))
    assert "the prompt has" in found.pop("job.budget.prompt_tokens")
    assert not found
    found = await violations(client, new_job(long, budget=common_pb2.Budget(cost_micros=1)))
    assert "one output token cost" in found.pop("job.budget.cost_micros")
    assert not found
    turns = [llm_pb2.ChatMessage(role=llm_pb2.ROLE_USER, content=long)]
    assert "job.budget.prompt_tokens" in await violations(
        client, new_job(messages=turns, budget=common_pb2.Budget(prompt_tokens=5))
    )
    async with worker(priced):
        # Each byte is a token of the simulated engine, which is more than the gateway counts.
        for budget in (common_pb2.Budget(prompt_tokens=len(long) - 1), common_pb2.Budget(cost_micros=54)):
            seen = await run_job(client, new_job(long, budget=budget))
            assert seen.states[-1] == "FAILED"
            assert reason_of(seen.final.status) == BudgetSpent.reason
            assert_not_tried_again(seen)
            metadata = seen.final.result.metadata
            assert (metadata.prompt_tokens, metadata.output_tokens, metadata.cost_micros) == (0, 0, 0)
        seen = await run_job(client, new_job(long, budget=common_pb2.Budget(prompt_tokens=len(long), cost_micros=55)))
    assert reason_of(seen.final.status) == BudgetSpent.reason
    assert seen.final.result.metadata.output_tokens == 1


async def test_budgets_that_cannot_be_kept_are_refused(priced: Stack, client: LlmServiceStub) -> None:
    found = await violations(client, new_job(model="free", budget=common_pb2.Budget(cost_micros=1)))
    assert found == {"job.budget.cost_micros": "the model free has no price"}
    negative = {"output_tokens": -1, "prompt_tokens": -1, "cost_micros": -1, "engine_time": Duration(seconds=-1)}
    found = await violations(client, new_job(budget=common_pb2.Budget(**negative)))
    assert set(found) == {f"job.budget.{name}" for name in negative}
    # A workflow that is started by hand has no price.
    temporal = await Client.connect(priced.address("temporal"), data_converter=data_converter)
    job = new_job(budget=common_pb2.Budget(cost_micros=1000))
    async with worker(priced):
        handle: Any = await temporal.start_workflow(
            names.JOB_WORKFLOW_TYPE, job, id="llmjob-by-hand", task_queue=names.WORKFLOW_QUEUE
        )
        seen = await watch(client, handle.id)
    assert reason_of(seen.final.status) == "INVALID_JOB"


async def test_a_budget_of_time_ends_a_job(priced: Stack, client: LlmServiceStub) -> None:
    """It counts the time in engines over all attempts, not that in the queue."""
    budget = common_pb2.Budget(engine_time=Duration(seconds=3))
    id_ = await submit(client, new_job(params={"max_tokens": 8000}, budget=budget))
    async with worker(priced, **SLOW) as first:
        await until_output(client, id_)
        await first.terminate()
    async with worker(priced, **SLOW):
        seen = await watch(client, id_)
    assert reason_of(seen.final.status) == BudgetSpent.reason
    metadata = seen.final.result.metadata
    assert metadata.engine_time.ToTimedelta() >= budget.engine_time.ToTimedelta()
    # It generates 100 tokens a second at most.
    assert 0 < metadata.output_tokens <= metadata.engine_time.ToTimedelta().total_seconds() * 100 + 2
    assert metadata.output_tokens < 8000
    assert seen.output == seen.final.result.output.encode()


async def test_tokens_that_a_crash_made_twice_cost_nothing(priced: Stack, client: LlmServiceStub) -> None:
    """[[vary]] makes an attempt start over."""
    async with worker(priced, **SLOW) as first:
        id_ = await submit(client, new_job("[[vary]]", params={"max_tokens": 200}))
        before = await when_output_reaches(client, id_, 100)
        first.signal(signal.SIGKILL)
        await first.wait()
    async with worker(priced):
        seen = await watch(client, id_)
    metadata = seen.final.result.metadata
    assert seen.states[-1] == "SUCCEEDED"
    assert metadata.rewinds == 1
    assert metadata.output_tokens == 200
    assert max(before.progress.output_tokens, 1) <= metadata.wasted_tokens < 200
    assert metadata.cost_micros == cost(metadata)


async def test_the_price_is_that_of_the_submit(priced: Stack, client: LlmServiceStub) -> None:
    """The job is accepted at another gateway, which then ends; it runs under the gateway with the present price."""
    dear = priced.add("gateway", {"GATEWAY_ROLE": "api", "GATEWAY_MODELS": models(output_per_million="1000000")})
    await dear.start()
    await dear.wait_ready()
    async with grpc.aio.insecure_channel(priced.address(dear.name)) as channel:
        id_ = await submit(LlmServiceStub(channel), new_job("Hi", params={"max_tokens": 3}))
    await dear.terminate()
    async with worker(priced):
        metadata = (await watch(client, id_)).final.result.metadata
    assert metadata.cost_micros == 3_000_000 + 1
