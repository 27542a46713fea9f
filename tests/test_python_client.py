"""The Python client on a real stack: every byte once, whatever breaks; every error a class of its own."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import timedelta

import durable_llm
import pytest
from durable_llm import AsyncClient, AsyncJob, Client, Output, RetryPolicy, errors

from deploy.local.stack import Stack
from jobs.errors import BY_REASON, DeliveryFailed, DeliveryRefused
from llm_pb import llm_pb2
from tests.conftest import new_job

GREEDY = {"temperature": 0.0}


@pytest.fixture(scope="module")
async def client(stack: Stack) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(stack.address("gateway")) as client:
        yield client


async def read_into(output: Output, job: AsyncJob) -> None:
    """Add all pieces of a job's output."""
    async for piece in job.stream():
        output.add(piece)


async def test_a_job_from_its_fields_to_its_result(client: AsyncClient) -> None:
    """Pieces, joined, are the output; messages may be dicts; a job is found again by its id."""
    messages = [{"role": "user", "content": "Hello"}]
    job = await client.submit(user_id="ann", model="docstrings", messages=messages, params={"max_tokens": 20})
    output = Output()
    await read_into(output, job)
    result = await client.job(job.workflow_id).result(timedelta(seconds=30))
    assert output.text == result.output
    assert result.metadata.output_tokens == 20
    assert (await job.get()).status.state == llm_pb2.JOB_STATE_SUCCEEDED


async def test_a_stream_goes_on_after_any_piece(client: AsyncClient) -> None:
    job = await client.submit(new_job(params={"max_tokens": 40}))
    pieces = [piece async for piece in job.stream()]
    for index in range(len(pieces)):
        rest = [piece async for piece in job.stream(pieces[index].resume_token)]
        whole = "".join(piece.text for piece in [*pieces[: index + 1], *rest])
        assert whole == (await job.result()).output


async def test_a_rewind_is_reported(client: AsyncClient) -> None:
    job = await client.submit(new_job("x [[vary]] [[fault:failed@30:once]]", params={"max_tokens": 60}))
    output, rewinds = Output(), 0
    async for piece in job.stream():
        rewinds += piece.rewind
        output.add(piece)
    assert rewinds >= 1
    assert output.text == (await job.result()).output


async def test_every_byte_comes_once_however_often_the_gateway_dies(stack: Stack) -> None:
    gateway = stack.add("gateway")
    await gateway.start()
    await gateway.wait_ready()
    async with AsyncClient(stack.address(gateway.name)) as client:
        job = await client.submit(new_job(params={"max_tokens": 600, **GREEDY}))
        output, pieces = Output(), 0
        async with asyncio.timeout(100):
            async for piece in job.stream():
                assert not piece.rewind
                output.add(piece)
                pieces += 1
                if pieces in (1, 5, 20):
                    await gateway.kill()
                    await gateway.start()
        assert output.text == (await job.result()).output
    await gateway.terminate()


async def test_a_job_that_fails_raises_its_own_error_with_what_it_produced(client: AsyncClient) -> None:
    job = await client.submit(new_job("[[fault:oom@7]]", params={"max_tokens": 20}))
    output = Output()
    with pytest.raises(errors.OutOfMemory) as failed:
        await read_into(output, job)
    assert failed.value.result.output == output.text
    assert failed.value.result.metadata.output_tokens == 7
    with pytest.raises(errors.OutOfMemory):
        await job.result()


async def test_a_cancelled_job_raises_cancelled(client: AsyncClient) -> None:
    job = await client.submit(new_job(params={"max_tokens": 5000}))
    await anext(job.stream())
    await job.cancel("enough")
    with pytest.raises(errors.Cancelled, match="enough"):
        await job.result()


async def test_result_may_be_waited_for_a_while(client: AsyncClient) -> None:
    """The job goes on after that."""
    job = await client.submit(new_job(params={"max_tokens": 400}))
    with pytest.raises(TimeoutError):
        await job.result(timedelta(milliseconds=50))
    assert (await job.result()).metadata.output_tokens == 400


async def test_calls_raise_an_error_of_their_own(client: AsyncClient) -> None:
    with pytest.raises(errors.InvalidRequest) as invalid:
        await client.submit(user_id="-", model="docstrings", prompt="x", params={"temperature": 9})
    assert {violation.field for violation in invalid.value.violations} == {"job.user_id", "job.params.temperature"}
    with pytest.raises(errors.JobNotFound):
        await client.job("llmjob-no-such").result()
    job = new_job()
    await client.submit(job)
    with pytest.raises(errors.RequestIdReused):
        await client.submit(job, prompt="something else")
    with pytest.raises(ValueError, match="no_such_field"):
        await client.submit(no_such_field=1)


async def test_a_wrong_address_is_given_up() -> None:
    policy = RetryPolicy(connect_timeout=timedelta(seconds=1))
    began = time.monotonic()
    async with AsyncClient("127.0.0.1:1", retry=policy) as client:
        with pytest.raises(errors.Unavailable):
            await client.submit(new_job())
        with pytest.raises(errors.Unavailable):
            await client.job("llmjob-a-b").result()
    assert time.monotonic() - began > 2


async def test_many_jobs_at_a_time(client: AsyncClient) -> None:
    """One that is refused and one that fails are outcomes; so many run at once, and no more."""
    jobs = [new_job(params={"max_tokens": 20}) for _ in range(10)]
    jobs[3].model = "no-such-model"
    jobs[6].prompt = "[[fault:oom@3]]"
    outcomes = [outcome async for outcome in client.map(iter(jobs), concurrency=4)]
    assert sorted(outcome.index for outcome in outcomes) == list(range(10))
    kinds = {outcome.index: type(outcome.error) for outcome in outcomes if outcome.error}
    assert kinds == {3: errors.InvalidRequest, 6: errors.OutOfMemory}
    assert all(outcome.result.metadata.output_tokens == 20 for outcome in outcomes if outcome.result)


async def test_jobs_and_models_are_listed(client: AsyncClient) -> None:
    for _ in range(3):
        await (await client.submit(new_job(user_id="lister"))).result()
    listed: set[str] = set()
    async with asyncio.timeout(30):
        # Temporal's visibility lags.
        while len(listed) < 3:
            listed |= {one.status.workflow_id async for one in client.list(user_id="lister", page_size=1)}
    assert "docstrings" in [model.name for model in await client.models()]


async def test_the_client_without_asyncio(stack: Stack) -> None:
    """All of it, in a thread that has no event loop."""

    def work() -> None:
        with Client(stack.address("gateway")) as client:
            job = client.submit(new_job(params={"max_tokens": 30}))
            output = Output()
            for piece in job.stream():
                output.add(piece)
            assert output.text == job.result(timedelta(seconds=30)).output == job.get().result.output
            for message in client.job(job.workflow_id).watch():
                assert message.next_offset
                break
            long = client.submit(new_job(params={"max_tokens": 5000}))
            assert long.cancel("enough").cancel_requested
            with pytest.raises(errors.Cancelled):
                long.result()
            outcomes = list(client.map([new_job(params={"max_tokens": 5}) for _ in range(3)]))
            assert [outcome.error for outcome in outcomes] == [None] * 3
            assert client.models()
            assert next(client.list())

    await asyncio.to_thread(work)


def test_every_error_of_a_job_has_a_class() -> None:
    of_jobs = set(BY_REASON) - {DeliveryFailed.reason, DeliveryRefused.reason}
    assert set(errors.JOB_ERRORS) == of_jobs


def test_every_public_name_is_there() -> None:
    assert all(getattr(durable_llm, name) is not None for name in durable_llm.__all__)
