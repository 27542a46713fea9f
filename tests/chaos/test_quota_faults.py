"""The quota of open jobs is exact whichever process dies: no slot is given twice, and none is lost."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from temporalio.client import Client, WorkflowExecutionStatus

from deploy.local.stack import Stack
from llm_pb import llm_pb2
from payload_converter import data_converter
from tests.support.ledgers import start_ledger
from tests.support.quotas import (
    PATIENCE,
    Installation,
    end,
    is_refused,
    queued_job,
    race,
    reason_of,
    submit,
    until_accepted,
)
from tests.support.stacks import FAST, stack_settings
from tests.support.temporal_proxy import temporal_proxy

QUOTA = 20
TENANTS: dict[str, dict[str, Any]] = {"one": {"max_open_jobs": 1}, "many": {"max_open_jobs": QUOTA}, "free": {}}
START = "StartWorkflowExecution"
OFTEN = {"check_interval": {"nanos": 50_000_000}}


@pytest.fixture
async def installation(tmp_path: Path) -> AsyncIterator[Installation]:
    """Run Temporal, and a gateway that runs workflows for the gateways of the tests."""
    gateway = {**FAST["gateway"], "GATEWAY_ROLE": "workflows"}
    only = ("temporal", "nats", "gateway")
    async with Stack(stack_settings(tmp_path / "stack"), only=only, environment={"gateway": gateway}) as stack:
        yield Installation(stack, tmp_path, TENANTS)


@pytest.fixture
async def temporal(installation: Installation) -> Client:
    return await Client.connect(installation.stack.address("temporal"), data_converter=data_converter)


API = {"GATEWAY_ROLE": "api"}


async def is_open(temporal: Client, id_: str) -> bool:
    """Return whether a job is open, as Temporal has it."""
    return (await temporal.get_workflow_handle(id_).describe()).status == WorkflowExecutionStatus.RUNNING


async def test_a_gateway_dies_between_reservation_and_start(installation: Installation, temporal: Client) -> None:
    """Its slot comes back."""
    await start_ledger(temporal, "one", start_timeout={"seconds": 2}, **OFTEN)
    async with temporal_proxy(installation.stack.address("temporal")) as (proxy, address):
        proxy.silent.add(START)
        async with (
            installation.gateway(**API, TEMPORAL_ADDRESS=address) as dying,
            installation.gateway(**API) as other,
        ):
            submitting = asyncio.create_task(submit(dying.of("one"), queued_job()))
            async with asyncio.timeout(PATIENCE):
                while not proxy.running[START]:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            assert await other.used("one") == 1
            await dying.process.kill()
            assert isinstance(await submitting, grpc.aio.AioRpcError)
            await until_accepted(other.of("one"), queued_job())
            assert await other.used("one") == 1


async def test_a_slot_is_kept_while_its_job_is_being_started(installation: Installation, temporal: Client) -> None:
    """However often the ledger is checked meanwhile."""
    await start_ledger(temporal, "one", **OFTEN)
    async with temporal_proxy(installation.stack.address("temporal")) as (proxy, address):
        proxy.delays[START] = 3
        async with (
            installation.gateway(**API, TEMPORAL_ADDRESS=address) as slow,
            installation.gateway(**API) as other,
        ):
            submitting = asyncio.create_task(submit(slow.of("one"), queued_job()))
            async with asyncio.timeout(PATIENCE):
                while not proxy.running[START]:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            while not submitting.done():
                assert await is_refused(other.of("one"))
            answer = await submitting
            assert isinstance(answer, llm_pb2.SubmitResponse)
            assert await is_refused(other.of("one"))
            assert await is_open(temporal, answer.workflow_id)


async def test_an_update_that_temporal_gives_up_is_made_again(installation: Installation, temporal: Client) -> None:
    """As a server does that stops. The job has one slot, although the first update has reserved it, too."""
    await start_ledger(temporal, "one", **OFTEN)

    async def nothing() -> None: ...

    async with (
        temporal_proxy(installation.stack.address("temporal")) as (proxy, address),
        installation.gateway(**API, TEMPORAL_ADDRESS=address) as gateway,
    ):
        proxy.lost["UpdateWorkflowExecution"] = (grpc.StatusCode.CANCELLED, nothing)
        answer = await submit(gateway.of("one"), queued_job())
        assert isinstance(answer, llm_pb2.SubmitResponse), answer
        assert not proxy.lost
        assert await gateway.used("one") == 1


async def test_nobody_runs_the_ledger(installation: Installation, temporal: Client) -> None:
    """A tenant with a quota is told to call again, the others are served. What was tried meanwhile loses its slot."""
    await start_ledger(temporal, "one", start_timeout={"seconds": 2}, **OFTEN)
    async with installation.gateway(**API) as gateway:
        await end(temporal, gateway.of("one"), [await until_accepted(gateway.of("one"), queued_job())])
        workflows = installation.stack.processes["gateway"]
        await workflows.kill()
        answer = await submit(gateway.of("one"), queued_job())
        assert isinstance(answer, grpc.aio.AioRpcError)
        assert (answer.code(), reason_of(answer)) == (grpc.StatusCode.UNAVAILABLE, "TEMPORAL_UNAVAILABLE")
        assert isinstance(await submit(gateway.of("free"), queued_job()), llm_pb2.SubmitResponse)
        await workflows.start()
        await workflows.wait_ready()
        await until_accepted(gateway.of("one"), queued_job())


async def test_all_gateways_die(installation: Installation, temporal: Client) -> None:
    """In mid-race, with those that run the workflows. The gateways after them accept what is left of the quota."""
    await start_ledger(temporal, "many", start_timeout={"seconds": 2}, **OFTEN)
    workflows = installation.stack.processes["gateway"]
    jobs = [queued_job() for _ in range(200)]
    async with installation.gateways(2) as dying:
        stubs = [gateway.of("many") for gateway in dying]
        racing = [asyncio.create_task(submit(stubs[n % 2], job)) for n, job in enumerate(jobs)]
        done, _ = await asyncio.wait(racing, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE)
        assert done
        for process in (workflows, *(gateway.process for gateway in dying)):
            await process.kill()
        answers = await asyncio.gather(*racing)
    await workflows.start()
    await workflows.wait_ready()
    await quota_is_exact(installation, temporal, jobs, answers)


async def test_temporal_restarts(installation: Installation, temporal: Client) -> None:
    """In mid-race."""
    await start_ledger(temporal, "many", start_timeout={"seconds": 2}, **OFTEN)
    server = installation.stack.processes["temporal"]
    jobs = [queued_job() for _ in range(200)]
    async with installation.gateways(2) as gateways:
        stubs = [gateway.of("many") for gateway in gateways]
        racing = [asyncio.create_task(submit(stubs[n % 2], job)) for n, job in enumerate(jobs)]
        await asyncio.wait(racing, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE)
        await server.kill()
        await server.start()
        await server.wait_ready()
        answers = await asyncio.gather(*racing)
    await quota_is_exact(installation, temporal, jobs, answers)


async def quota_is_exact(
    installation: Installation, temporal: Client, jobs: list[llm_pb2.JobRequest], answers: list[Any]
) -> None:
    """Assert that no more jobs were accepted than the quota, and that as many fit now as it says.

    A job whose client got no answer may have been accepted: a repeat finds it.
    """
    accepted = {answer.workflow_id for answer in answers if isinstance(answer, llm_pb2.SubmitResponse)}
    reasons = {reason_of(answer) for answer in answers if _has_details(answer)}
    assert reasons <= {"QUOTA_EXCEEDED", "TEMPORAL_UNAVAILABLE", "LIMIT_REACHED", "GATEWAY_SHUTDOWN"}
    async with installation.gateways(2) as gateways:
        stubs = [gateway.of("many") for gateway in gateways]
        # Slots whose jobs were never started come back, until the quota is full of jobs.
        async with asyncio.timeout(PATIENCE):
            while True:
                repeated = await race(stubs, jobs)
                accepted |= {*repeated}
                started = [id_ for id_ in accepted if await is_open(temporal, id_)]
                assert len(started) <= QUOTA
                if len(started) == QUOTA:
                    break
        assert {*started} == accepted
        assert await gateways[0].used("many") == QUOTA
        assert await is_refused(stubs[0])
        await end(temporal, stubs[0], started)
        assert len(await race(stubs, [queued_job() for _ in range(3 * QUOTA)])) == QUOTA


def _has_details(answer: Any) -> bool:
    """Return whether a call failed with an error of the API's; a broken connection has none."""
    return isinstance(answer, grpc.aio.AioRpcError) and any(
        key == "grpc-status-details-bin" for key, _ in answer.trailing_metadata() or ()
    )
