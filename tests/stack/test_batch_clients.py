"""Batches by the Python client, the command line and OpenAI's own client."""

import asyncio
import hashlib
import json
import signal
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from openai import AsyncOpenAI
from temporalio.client import Client as TemporalClient

from deploy.local.stack import Stack
from durable_llm import AsyncClient
from durable_llm.batch_errors import BatchNotFound
from durable_llm.cli._exits import Exit
from durable_llm.errors import InvalidRequest
from jobs.ids import file_id
from llm_pb import batch_pb2
from llm_pb.file_pb2_grpc import FileServiceStub
from tests.stack.test_openai import openai_client as connected
from tests.support.batches import by_index, lines_of, running, to_jsonl
from tests.support.commands import Ended, run, start
from tests.support.files import PATIENCE, until, until_committed


@pytest.fixture(scope="module")
async def client(stack: Stack) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(stack.address("gateway")) as client:
        yield client


@pytest.fixture(scope="module")
async def openai_client(stack: Stack) -> AsyncIterator[AsyncOpenAI]:
    async with connected(stack.address("http"), max_retries=0) as client:
        yield client


USER = "batcher"


async def cli(stack: Stack, *arguments: str) -> Ended:
    command = (sys.executable, "-m", "durable_llm", *arguments)
    return await run(*command, DURABLE_LLM_USER=USER, DURABLE_LLM_ADDRESS=stack.address("gateway"))


async def begin(stack: Stack, *arguments: str, until: str = "") -> asyncio.subprocess.Process:
    """Start the command, and return once it has said `until`."""
    command = (sys.executable, "-m", "durable_llm", *arguments)
    process = await start(*command, DURABLE_LLM_USER=USER, DURABLE_LLM_ADDRESS=stack.address("gateway"))
    assert process.stderr is not None
    said = ""
    async with asyncio.timeout(PATIENCE):
        while until not in said:
            more = (await process.stderr.readline()).decode()
            assert more, f"the command has ended: {said}"
            said += more
    return process


async def test_the_client_starts_follows_and_reads_a_batch(
    client: AsyncClient, temporal: TemporalClient, stack: Stack, tmp_path: Path
) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(to_jsonl(lines_of(30)))
    async with running(temporal, stack.state_dir):
        started = await client.batches.start(path, user_id="batch-client", window=timedelta(hours=2))
        assert (await client.batches.start(path, user_id="batch-client", window=timedelta(hours=2))).batch_id == (
            started.batch_id
        )
        statuses = [status async for status in client.batches.watch(started.batch_id)]
    assert statuses[-1].state == batch_pb2.BATCH_STATE_SUCCEEDED
    assert (statuses[-1].user_id, statuses[-1].input.file_id) == ("batch-client", started.input.file_id)
    messages = [message async for message in client.batches.results(started.batch_id)]
    assert sorted(by_index([item for message in messages for item in message.items])) == list(range(30))
    again = [message async for message in client.batches.results(started.batch_id, messages[-1].cursor)]
    assert again == []

    async def listed() -> bool:
        return [status.batch_id async for status in client.batches.list(user_id="batch-client")] == [started.batch_id]

    await until(listed)
    with pytest.raises(BatchNotFound):
        await client.batches.get("llmbatch-nobody-nothing")
    with pytest.raises(InvalidRequest):
        await client.batches.create(user_id="batch-client", input={"file_id": "file-x"}, window=timedelta(seconds=1))


async def test_the_command_runs_a_batch_and_comes_back_to_it(
    temporal: TemporalClient, stack: Stack, tmp_path: Path
) -> None:
    lines, output, errors = (tmp_path / name for name in ("lines.jsonl", "output.jsonl", "output.jsonl.errors"))
    lines.write_bytes(to_jsonl(lines_of(40)))
    short, of_short = tmp_path / "short.jsonl", tmp_path / "short.out"
    short.write_bytes(to_jsonl(lines_of(1)))
    stale = tmp_path / "short.out.errors"
    stale.write_text("of an earlier command")
    async with running(temporal, stack.state_dir, failing=frozenset({3})) as engine:
        ended = await cli(stack, "batch", "run", str(lines), str(output))
        assert ended.status == 1, ended.errors
        assert "1 of 40 lines have failed" in ended.errors
        assert "39 succeeded" in ended.errors
        for place in (short, tmp_path / "no folder" / "out"):
            refused = await cli(stack, "batch", "run", str(short), str(place))
            assert (refused.status, str(place) in refused.errors) == (Exit.USAGE, True), refused.errors
        assert (await cli(stack, "batch", "run", str(short), str(of_short))).status == 0
        assert stale.read_bytes() == b""
        began = len(engine.attempts)
        batch_id = ended.errors.splitlines()[0]
        first = output.read_bytes()
        output.unlink()
        assert (await cli(stack, "batch", "run", str(lines), str(output))).status == 1
        assert len(engine.attempts) == began
    assert output.read_bytes() == first
    assert len(first.splitlines()) == 39
    assert [json.loads(line)["custom_id"] for line in errors.read_text().splitlines()] == ["line 3"]
    shown = await cli(stack, "batch", "get", batch_id)
    assert "SUCCEEDED" in shown.output
    assert "39 succeeded, 1 failed" in shown.output
    assert json.loads((await cli(stack, "batch", "get", "--json", batch_id)).output)["batchId"] == batch_id
    results = await cli(stack, "batch", "results", batch_id)
    assert len(results.output.splitlines()) == 40

    async def listed() -> bool:
        found = await cli(stack, "batch", "ls", "--user", "batcher")
        assert found.status == 0, found.errors
        return batch_id in found.output

    await until(listed)
    cancelled = await cli(stack, "batch", "cancel", batch_id)
    assert cancelled.output.strip() == f"{batch_id} SUCCEEDED"
    assert (await cli(stack, "batch", "get", "llmbatch-nobody-nothing")).status == 3


async def test_the_command_may_be_killed_at_any_moment(temporal: TemporalClient, stack: Stack, tmp_path: Path) -> None:
    """The same command comes back to the upload, and to the batch. Nothing runs twice."""
    lines, output = tmp_path / "lines.jsonl", tmp_path / "output.jsonl"
    # Blank lines are no items. The upload of so many takes a moment.
    lines.write_bytes(to_jsonl(lines_of(16)) + 16 * (1_000_000 * b" " + b"\n"))
    arguments = ("batch", "run", str(lines), str(output))
    uploaded = file_id(USER, f"sha256-{hashlib.sha256(lines.read_bytes()).hexdigest()}", "")
    async with running(temporal, stack.state_dir, hold_after=5) as engine:
        uploading = await begin(stack, *arguments)
        async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
            await until_committed(FileServiceStub(channel), uploaded, 1)
        uploading.kill()
        await uploading.communicate()
        following = await begin(stack, *arguments, until="RUNNING")
        following.kill()
        await following.communicate()
        interrupted = await begin(stack, *arguments, until="RUNNING")
        interrupted.send_signal(signal.SIGINT)
        _, errors = await interrupted.communicate()
        assert interrupted.returncode == Exit.INTERRUPTED
        assert "The same command comes back to it." in errors.decode()
        assert not output.exists()
        engine.go_on.set()
        ended = await cli(stack, *arguments)
    assert ended.status == 0, ended.errors
    assert len(output.read_bytes().splitlines()) == 16
    assert engine.attempts == [(0, 0)]


def openai_lines(count: int) -> list[dict[str, Any]]:
    return [line for line in lines_of(2 * count) if "custom_id" in line]


async def test_openais_client_runs_a_batch(openai_client: AsyncOpenAI, temporal: TemporalClient, stack: Stack) -> None:
    file = await openai_client.files.create(file=("in.jsonl", to_jsonl(openai_lines(20))), purpose="batch")
    async with running(temporal, stack.state_dir, failing=frozenset({5})):
        batch = await openai_client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"purpose": "test"},
        )
        assert batch.object == "batch"

        async def completed() -> bool:
            return (await openai_client.batches.retrieve(batch.id)).status == "completed"

        await until(completed)
    ended = await openai_client.batches.retrieve(batch.id)
    assert (ended.endpoint, ended.completion_window, ended.metadata) == (
        "/v1/chat/completions",
        "24h",
        {"purpose": "test"},
    )
    assert ended.request_counts is not None
    assert (ended.request_counts.total, ended.request_counts.completed, ended.request_counts.failed) == (20, 19, 1)
    assert ended.input_file_id == file.id
    assert ended.output_file_id is not None
    output = [json.loads(line) for line in (await openai_client.files.content(ended.output_file_id)).text.splitlines()]
    assert len(output) == 19
    assert output[0]["custom_id"] == "line 1"
    assert output[0]["response"]["status_code"] == 200
    assert output[0]["response"]["body"]["choices"][0]["message"]["content"] == ".1 yaS"
    assert ended.error_file_id is not None
    errors = (await openai_client.files.content(ended.error_file_id)).text.splitlines()
    assert [json.loads(line)["custom_id"] for line in errors] == ["line 11"]

    async def listed() -> bool:
        return batch.id in [found.id async for found in openai_client.batches.list(limit=5)]

    await until(listed)


async def test_openais_client_cancels_a_batch(
    openai_client: AsyncOpenAI, temporal: TemporalClient, stack: Stack
) -> None:
    file = await openai_client.files.create(file=("in.jsonl", to_jsonl(openai_lines(20))), purpose="batch")
    async with running(temporal, stack.state_dir, hold_after=5):
        batch = await openai_client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="2h",  # type: ignore[arg-type]  # OpenAI has no other than 24h
        )

        async def began() -> bool:
            counts = (await openai_client.batches.retrieve(batch.id)).request_counts
            return counts is not None and counts.completed >= 5

        await until(began)
        assert (await openai_client.batches.cancel(batch.id)).status in ("cancelling", "cancelled")

        async def cancelled() -> bool:
            return (await openai_client.batches.retrieve(batch.id)).status == "cancelled"

        await until(cancelled)


async def test_what_openais_client_asks_wrongly_is_refused(openai_client: AsyncOpenAI) -> None:
    good: dict[str, Any] = {
        "input_file_id": "file-" + "0" * 64,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    for change, param in (
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "400d"}, "completion_window"),
        ({"extra_body": {"other": 1}}, "other"),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            await openai_client.batches.create(**{**good, **change})
        assert error.value.param == param
    with pytest.raises(openai.NotFoundError):
        await openai_client.batches.create(**good)
    with pytest.raises(openai.NotFoundError):
        await openai_client.batches.retrieve("batch_nothing")


async def test_bad_lines_are_errors_of_the_batch(openai_client: AsyncOpenAI) -> None:
    lines = openai_lines(3)
    lines[1]["body"]["temperature"] = 9
    lines[2]["custom_id"] = lines[0]["custom_id"]
    file = await openai_client.files.create(file=("in.jsonl", to_jsonl(lines)), purpose="batch")
    batch = await openai_client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )

    async def failed() -> bool:
        return (await openai_client.batches.retrieve(batch.id)).status == "failed"

    await until(failed)
    ended = await openai_client.batches.retrieve(batch.id)
    assert ended.errors is not None
    assert ended.errors.data is not None
    assert [(error.line, error.param, error.code) for error in ended.errors.data] == [
        (2, "body.temperature", "invalid_input"),
        (3, "custom_id", "invalid_input"),
    ]
    assert ended.errors.data[1].message == "must be unique: it is that of line 1, too", "counted as its own line"
