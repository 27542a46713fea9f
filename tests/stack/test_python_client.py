"""The Python client on a real stack: every byte comes once, whatever breaks, and every error has its own class."""

import asyncio
import logging
import os
import pickle
import re
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2

import durable_llm
from deploy.local.stack import Stack
from durable_llm import AsyncClient, AsyncJob, Client, Output, RetryPolicy, errors
from durable_llm.batch_errors import BATCH_ERRORS
from durable_llm.file_errors import FILE_ERRORS
from durable_llm.model_errors import MODEL_ERRORS
from durable_llm.pipeline_errors import PIPELINE_ERRORS
from jobs.errors import BY_REASON, DeliveryFailed, DeliveryRefused
from llm_pb import llm_pb2
from services.gateway.job_record import FINAL_STATES
from tests.support.commands import interrupt, interrupt_another_thread, run
from tests.support.jobs import new_job
from tests.support.paths import ROOT
from tests.support.unsteady_gateway import Turn, serving

GREEDY = {"temperature": 0.0}

# The test interrupts this process while it waits for an answer after the first one.
INTERRUPTED = """
import signal, sys
from durable_llm import Client

# Tests that a shell runs in the background have it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

with Client(sys.argv[1]) as client:
    jobs = [{"user_id": "ann", "request_id": name, "model": model, "prompt": "x", "params": {"max_tokens": 1}}
            for name, model in zip(sys.argv[3:], ("docstrings", "idle"))]
    if sys.argv[2] == "map":
        answers = client.map(jobs)
    else:
        answers = client.submit(**jobs[1]).watch()
    for _ in answers:
        print("waiting", flush=True)
"""


@asynccontextmanager
async def unsteady(stack: Stack, *turns: Turn, **options: Any) -> AsyncIterator[AsyncClient]:
    """Serve an UnsteadyGateway while the context is open, and yield a client of it."""
    async with serving(stack, *turns) as gateway, AsyncClient(gateway.address, **options) as client:
        yield client


@pytest.fixture(scope="module")
async def client(stack: Stack) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(stack.address("gateway")) as client:
        yield client


async def read_into(output: Output, job: AsyncJob) -> None:
    """Add all pieces of a job's output to `output`."""
    async for piece in job.stream():
        output.add(piece)


async def test_a_job_from_its_fields_to_its_result(client: AsyncClient) -> None:
    """The joined pieces are the output, messages may be dicts, and a job is found by its id."""
    messages = [{"role": "user", "content": "Hello"}]
    fields = {"messages": messages, "params": {"max_tokens": 20}, "labels": {"team": "red"}}
    job = await client.submit(user_id="ann", model="docstrings", **fields)
    output = Output()
    await read_into(output, job)
    result = await client.job(job.workflow_id).result(timedelta(seconds=30))
    assert output.text == result.output
    assert result.metadata.output_tokens == 20
    found = await client.job(job.workflow_id).get_job()
    assert (found.status, found.result) == ((await job.get()).status, result)
    assert found.status.state == llm_pb2.JOB_STATE_SUCCEEDED
    assert (found.job.user_id, found.job.messages[0].content, found.job.labels) == ("ann", "Hello", {"team": "red"})


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


async def test_every_byte_comes_once_while_gateways_are_upgraded(stack: Stack, client: AsyncClient) -> None:
    """Gateways of an earlier version have no resume_token. Streams break and resume at gateways of both versions."""
    job = await client.submit(new_job(params={"max_tokens": 400}))
    earlier, newer = Turn(messages=4, knows_tokens=False), Turn(messages=4)
    async with unsteady(stack, newer, earlier, earlier, newer, newer, earlier, Turn(fails=False)) as other:
        output = b""
        async for piece in other.job(job.workflow_id).stream():
            assert (piece.offset, piece.rewind) == (len(output), False)
            output += piece.text.encode()
    assert output.decode() == (await job.result()).output


async def test_an_earlier_gateway_that_overlooks_a_token_rewinds_its_reader(stack: Stack, client: AsyncClient) -> None:
    """Without the rewind the reader would append the start of the output to its piece."""
    job = await client.submit(new_job(params={"max_tokens": 40}))
    first, *_ = [piece async for piece in job.stream()]
    output = Output()
    output.add(first)
    async with unsteady(stack, Turn(fails=False, knows_tokens=False)) as other:
        pieces = [piece async for piece in other.job(job.workflow_id).stream(first.resume_token)]
    assert [piece.rewind for piece in pieces] == [True, *[False] * (len(pieces) - 1)]
    for piece in pieces:
        output.add(piece)
    assert output.text == (await job.result()).output


async def test_a_stream_that_ends_before_its_job_goes_on(stack: Stack, client: AsyncClient) -> None:
    """The stream resumes even after status OK, because the job's outcome is not known."""
    job = await client.submit(new_job(params={"max_tokens": 100}))
    output = Output()
    async with unsteady(
        stack, Turn(messages=3, fails=False), Turn(messages=0, fails=False), Turn(fails=False)
    ) as other:
        await read_into(output, other.job(job.workflow_id))
    assert output.text == (await job.result()).output


async def test_a_broken_stream_waits_as_long_as_the_gateway_asks_for(
    stack: Stack, client: AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has the error and the offset at which the stream continues."""
    job = await client.submit(new_job(params={"max_tokens": 20}))
    result = await job.result()
    delay = timedelta(seconds=2)
    output = Output()
    began = time.monotonic()
    with caplog.at_level(logging.INFO, "durable_llm"):
        async with unsteady(stack, Turn(messages=1, retry_delay=delay), Turn(fails=False)) as other:
            await read_into(output, other.job(job.workflow_id))
    assert time.monotonic() - began >= delay.total_seconds()
    assert output.text == result.output
    (said,) = [record.getMessage() for record in caplog.records if record.name == "durable_llm"]
    assert re.fullmatch(r"the connection broke; going on at byte \d+ in \d+\.\d s", said)


async def test_a_stream_that_always_ends_before_its_job_is_given_up(stack: Stack, client: AsyncClient) -> None:
    job = await client.submit(new_job(model="idle"))
    policy = RetryPolicy(connect_timeout=timedelta(seconds=1))
    async with unsteady(stack, Turn(messages=0, fails=False), retry=policy) as other:
        with pytest.raises(errors.Unavailable, match="before the job"):
            await other.job(job.workflow_id).result()


async def test_the_end_is_told_once(stack: Stack, client: AsyncClient) -> None:
    """A stream that breaks after the end is not resumed."""
    job = await client.submit(new_job(params={"max_tokens": 1}))
    result = await job.result()
    async with unsteady(stack, Turn(), Turn(fails=False)) as other:
        messages = [message async for message in other.job(job.workflow_id).watch()]
    assert [message.result.output for message in messages if message.HasField("result")] == [result.output]


async def test_a_result_is_whole_after_a_stream_that_was_left(client: AsyncClient) -> None:
    """In the stream of an ended job the first message has the final state, and only the last one has the result."""
    job = await client.submit(new_job(params={"max_tokens": 20}))
    result = await job.result()
    again = client.job(job.workflow_id)
    async for _ in again.stream():
        break
    assert await again.result() == result


async def test_a_token_of_another_job_rewinds_to_where_the_outputs_part(client: AsyncClient) -> None:
    """A reader of the other job's output does not get the rest of this job's output appended."""
    long, short = [await client.submit(new_job(f"{n}", params={"max_tokens": n})) for n in (60, 10)]
    await short.result()
    for mine, other in ((long, short), (short, long)):
        output, pieces = Output(), 0
        async for piece in other.stream():
            output.add(piece)
        async for rest in mine.stream(piece.resume_token):
            assert rest.rewind == (pieces == 0)
            output.add(rest)
            pieces += 1
        assert output.text == (await mine.result()).output
    with pytest.raises(errors.InvalidRequest, match="resume_token"):
        await anext(long.stream("no token"))


async def test_a_call_is_repeated_when_the_gateway_is_silent(stack: Stack) -> None:
    gateway = stack.add("gateway")
    await gateway.start()
    await gateway.wait_ready()
    async with AsyncClient(stack.address(gateway.name), timeout=timedelta(seconds=2)) as client:
        assert await client.models()
        gateway.signal(signal.SIGSTOP)
        asked = asyncio.create_task(client.models())
        await asyncio.wait([asked], timeout=3)
        still = not asked.done()
        gateway.signal(signal.SIGCONT)
        assert still, "the call ended while the gateway was silent"
        assert await asked
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
    """The job continues after the timeout."""
    job = await client.submit(new_job(params={"max_tokens": 400}))
    with pytest.raises(TimeoutError):
        await job.result(timedelta(milliseconds=50))
    assert (await job.result()).metadata.output_tokens == 400


async def test_no_time_to_wait_is_not_any_time(client: AsyncClient) -> None:
    job = await client.submit(new_job(model="idle"))
    asked = asyncio.create_task(job.result(timedelta(0)))
    done, _ = await asyncio.wait([asked], timeout=30)
    assert done
    assert isinstance(asked.exception(), TimeoutError)


async def test_the_address_may_come_from_the_environment(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_ADDRESS", stack.address("gateway"))
    async with AsyncClient() as client:
        assert await client.models()


async def test_the_channel_takes_options_of_grpc(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The option of this test keeps the channel from using the environment's proxy."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("no_grpc_proxy", raising=False)
    policy = RetryPolicy(connect_timeout=timedelta(seconds=1))
    address, options = stack.address("gateway"), (("grpc.enable_http_proxy", 0),)
    async with AsyncClient(address, options=options) as client:
        assert await client.models()
    with Client(address, options=options) as waiting:
        assert await asyncio.to_thread(waiting.models)
    async with AsyncClient(address, retry=policy) as client:
        with pytest.raises(errors.Unavailable):
            await client.models()


async def test_deltas_of_a_watch_are_pieces_of_its_output(client: AsyncClient) -> None:
    job = await client.submit(new_job("x [[vary]] [[fault:failed@30:once]]", params={"max_tokens": 60}))
    output = Output()
    async for message in job.watch():
        if message.HasField("delta"):
            output.add(message.delta)
        assert len(output) == message.next_offset
    assert output.text == (await job.result()).output


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
    """A refused job and a failed job are outcomes. The number of concurrent jobs keeps its limit."""
    jobs = [new_job(params={"max_tokens": 20}) for _ in range(10)]
    jobs[3].model = "no-such-model"
    jobs[6].prompt = "[[fault:oom@3]]"
    outcomes = [outcome async for outcome in client.map(iter(jobs), concurrency=4)]
    assert sorted(outcome.index for outcome in outcomes) == list(range(10))
    kinds = {outcome.index: type(outcome.error) for outcome in outcomes if outcome.error}
    assert kinds == {3: errors.InvalidRequest, 6: errors.OutOfMemory}
    assert all(outcome.result.metadata.output_tokens == 20 for outcome in outcomes if outcome.result)


@pytest.mark.parametrize(
    "bad",
    [
        {"promt": "x"},
        {"prompt": 1},
        {"params": {"max_tokens": "many"}},
        {"messages": [{"role": "nobody", "content": "x"}]},
        {1: "x"},
        "a prompt",
        None,
    ],
    ids=str,
)
async def test_a_job_that_is_none_is_an_outcome(client: AsyncClient, bad: Any) -> None:
    """It does not end the other jobs."""
    good = new_job(params={"max_tokens": 20})
    outcomes = {outcome.index: outcome async for outcome in client.map([good, bad, good])}
    assert outcomes[0].result == outcomes[2].result is not None
    assert outcomes[1].job is None
    assert isinstance(outcomes[1].error, errors.InvalidRequest)
    assert str(outcomes[1].error)


async def test_jobs_and_models_are_listed(client: AsyncClient) -> None:
    for _ in range(3):
        await (await client.submit(new_job(user_id="lister"))).result()
    listed: set[str] = set()
    async with asyncio.timeout(30):
        # Temporal's visibility store is updated a moment later.
        while len(listed) < 3:
            listed |= {one.status.workflow_id async for one in client.list(user_id="lister", page_size=1)}
    assert "docstrings" in [model.name for model in await client.models()]


async def test_the_client_without_asyncio(stack: Stack) -> None:
    """Every method works in a thread without an event loop."""

    def work() -> None:
        with Client(stack.address("gateway")) as client:
            job = client.submit(new_job(params={"max_tokens": 30}))
            output = Output()
            for piece in job.stream():
                output.add(piece)
            assert output.text == job.result(timedelta(seconds=30)).output == job.get().result.output
            assert job.get_job().job.params.max_tokens == 30
            for message in client.job(job.workflow_id).watch():
                assert message.next_offset
                break
            long = client.submit(new_job(params={"max_tokens": 5000}))
            assert long.cancel("enough").cancel_requested
            with pytest.raises(errors.Cancelled):
                long.result()
            outcomes = list(client.map([new_job(params={"max_tokens": 5}) for _ in range(3)]))
            assert [outcome.error for outcome in outcomes] == [None] * 3
            for outcome in outcomes:
                assert outcome.job is not None
                assert outcome.job.result() == outcome.result
            assert client.models()
            assert next(client.list())

    await asyncio.to_thread(work)


@pytest.mark.parametrize("send", [interrupt, interrupt_another_thread])
@pytest.mark.parametrize("method", ["map", "watch"])
async def test_ctrl_c_ends_a_wait_as_it_ends_any(stack: Stack, method: str, send: Callable[[int], None]) -> None:
    """This holds even if the signal does not wake the main thread."""
    names = [new_job().request_id for _ in range(2)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", INTERRUPTED, stack.address("gateway"), method, *names),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(120):
        assert await process.stdout.readline() == b"waiting\n"
        send(process.pid)
        _, said = await process.communicate()
    assert said.decode().splitlines()[-1] == "KeyboardInterrupt"
    assert "RuntimeError" not in said.decode()
    assert "Exception ignored" not in said.decode()
    assert process.returncode == -signal.SIGINT


async def test_ctrl_c_may_come_as_a_wait_begins(stack: Stack) -> None:
    """The signal comes when the client's thread has the call and the caller does not wait for it yet."""
    script = """
import signal, sys
from durable_llm import Client

def interrupt(frame, event, _):
    if event == "return" and frame.f_code.co_name == "call_soon_threadsafe":
        sys.setprofile(None)
        signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
with Client(sys.argv[1]) as client:
    messages = client.submit(user_id="ann", request_id=sys.argv[2], model="idle", prompt="x").watch()
    next(messages)
    sys.setprofile(interrupt)
    next(messages)
"""
    async with asyncio.timeout(120):
        ended = await run(sys.executable, "-c", script, stack.address("gateway"), new_job().request_id)
    assert ended.errors.splitlines()[-1] == "KeyboardInterrupt"
    assert "RuntimeError" not in ended.errors
    assert ended.status == -signal.SIGINT


async def test_a_client_without_asyncio_that_is_closed(stack: Stack) -> None:
    """It ends the waits and loops of other threads. Later calls raise an error that says that it is closed."""

    def work() -> None:
        client = Client(stack.address("gateway"))
        job = client.submit(new_job(model="idle"))
        messages = job.watch()
        assert next(messages)
        ended: list[BaseException] = []

        def wait() -> None:
            try:
                job.result()
            except RuntimeError as error:
                ended.append(error)

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        client.close()
        client.close()
        waiting.join(60)
        assert len(ended) == 1, "the wait must end"
        messages.close()
        with pytest.raises(RuntimeError, match="closed"):
            job.get()

    await asyncio.to_thread(work)


async def test_jobs_may_come_from_the_same_client(stack: Stack) -> None:
    """The jobs are read in the caller's thread, where a call of the client waits for nothing of its own."""

    def work() -> list[str]:
        with Client(stack.address("gateway")) as client:

            def jobs() -> Iterator[dict[str, Any]]:
                for _ in range(3):
                    yield {"user_id": "ann", "model": client.models()[0].name, "messages": messages()}

            def messages() -> Iterator[dict[str, str]]:
                yield {"role": "user", "content": client.models()[0].name}

            return [outcome.result.output for outcome in client.map(jobs(), concurrency=2) if outcome.result]

    outputs = await asyncio.wait_for(asyncio.to_thread(work), 60)
    assert len(outputs) == 3


async def test_jobs_that_are_waited_for_hold_up_no_other_call(stack: Stack) -> None:
    """The jobs of map and the messages of submit may come from a queue or a pipe."""
    reading, more = threading.Event(), threading.Event()

    def jobs() -> Iterator[llm_pb2.JobRequest]:
        reading.set()
        more.wait(120)
        yield new_job(params={"max_tokens": 1})

    def messages() -> Iterator[dict[str, str]]:
        reading.set()
        more.wait(120)
        yield {"role": "user", "content": "Hello"}

    def mapped(client: Client) -> None:
        assert [outcome.error for outcome in client.map(jobs())] == [None]

    def submitted(client: Client) -> None:
        assert client.submit(user_id="ann", model="docstrings", messages=messages()).workflow_id

    with await asyncio.to_thread(Client, stack.address("gateway")) as client:
        for work in (mapped, submitted):
            reading.clear()
            more.clear()
            working = asyncio.create_task(asyncio.to_thread(work, client))
            assert await asyncio.to_thread(reading.wait, 60)
            asked = asyncio.create_task(asyncio.to_thread(client.models))
            done, _ = await asyncio.wait([asked], timeout=30)
            more.set()
            await working
            assert done, "the call waited for the jobs"
            assert await asked


async def test_ctrl_c_ends_a_wait_for_a_job_of_map() -> None:
    script = """
import signal, sys
from durable_llm import Client

def jobs():
    print("waiting", flush=True)
    yield {"prompt": sys.stdin.readline()}

signal.signal(signal.SIGINT, signal.default_int_handler)
with Client("127.0.0.1:1") as client:
    for _ in client.map(jobs()):
        pass
"""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(120):
            assert await process.stdout.readline() == b"waiting\n"
            interrupt(process.pid)
            assert process.stderr is not None
            said = (await process.stderr.read()).decode()
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
    assert said.splitlines()[-1] == "KeyboardInterrupt"
    assert "Exception ignored" not in said
    assert process.returncode == -signal.SIGINT


def test_a_call_in_the_clients_own_thread_is_refused() -> None:
    """It would wait for itself for ever."""

    class CallingPolicy(RetryPolicy):
        def backoff(self, *_: Any, **__: Any) -> timedelta | None:
            assert client.models()
            return None

    with Client("127.0.0.1:1", retry=CallingPolicy()) as client, pytest.raises(RuntimeError, match="its own thread"):
        client.models()


def test_a_client_that_could_not_be_made_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    wrong: list[dict[str, Any]] = [{"metadata": [("a", "b")]}, {"options": (("grpc.x", object()),)}]
    for arguments in wrong:
        with pytest.raises((AttributeError, TypeError)):
            Client("127.0.0.1:1", **arguments)
    assert set(threading.enumerate()) <= before


def test_every_error_of_a_job_has_a_class() -> None:
    of_jobs = set(BY_REASON) - {DeliveryFailed.reason, DeliveryRefused.reason}
    assert set(errors.JOB_ERRORS) == of_jobs


def test_every_error_of_a_call_has_a_class_of_its_own() -> None:
    """The table of the page is complete, which test_docs proves."""
    page = (ROOT / "docs" / "errors.md").read_text()
    reasons = re.findall(r"^\| `(\w+)` \| `\w+` \| (?!yes \||no \|)", page, re.MULTILINE)
    kinds = {**errors.API_ERRORS, **FILE_ERRORS, **BATCH_ERRORS, **PIPELINE_ERRORS, **MODEL_ERRORS}
    assert set(kinds) == set(reasons)
    assert [kind.reason for kind in kinds.values()] == list(kinds)


def every_error(kind: type[errors.DurableLLMError]) -> Iterator[type[errors.DurableLLMError]]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from every_error(narrower)


def test_every_error_goes_to_another_process_whole() -> None:
    status = llm_pb2.JobStatus(workflow_id="llmjob-ann-1", error=status_pb2.Status(message="failed"))
    violations = (errors.Violation("job.model", "is not served here"),)
    of_call = ("refused", grpc.StatusCode.INVALID_ARGUMENT, "A_REASON", timedelta(seconds=3), violations)
    of_job = (status, llm_pb2.JobResult(output="a part"))
    for kind in every_error(errors.DurableLLMError):
        error = kind(*(of_call if issubclass(kind, errors.ApiError) else of_job))
        error.add_note("a note")
        other = pickle.loads(pickle.dumps(error))
        assert type(other) is kind
        assert (str(other), other.args, vars(other)) == (str(error), error.args, vars(error))


def test_the_services_final_states_are_the_clients() -> None:
    """The two stand apart: the client's distribution needs nothing of the suite, and no service needs the client."""
    assert durable_llm.FINAL_STATES == FINAL_STATES


def test_every_public_name_is_there() -> None:
    assert all(getattr(durable_llm, name) is not None for name in durable_llm.__all__)
