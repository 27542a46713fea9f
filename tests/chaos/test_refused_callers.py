"""What callers who are refused cost a gateway that asks for credentials, also those that do not read the refusal."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from temporalio import activity
from temporalio.client import Client
from temporalio.worker import Worker

from deploy.local.process import Process
from deploy.local.stack import Stack
from jobs import names
from llm_pb import internal_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from payload_converter import data_converter
from tests.support.attacks import PREFACE, SETTINGS, call_frames, frame, stalled_clients
from tests.support.credentials import KeyFile, bearer
from tests.support.jobs import new_job, run_job
from tests.support.memory import resident_bytes
from tests.support.scrapes import scrape_until

STREAM_STATUS = "/llm.v1.LlmService/StreamStatus"
LIST_MODELS = "/llm.v1.LlmService/ListModels"
MB = 1_000_000


class Guarded(NamedTuple):
    """A gateway with a file of keys, and a key."""

    gateway: Process
    file: KeyFile
    key: str
    address: str
    stub: LlmServiceStub

    async def serves(self) -> None:
        await self.stub.ListModels(llm_pb2.ListModelsRequest(), metadata=bearer(self.key), timeout=60)


@pytest.fixture
async def guarded(stack: Stack, tmp_path: Path) -> AsyncIterator[Guarded]:
    file = KeyFile(tmp_path / "keys.json")
    key = file.add(["jobs:*", "models:*"])
    settings = {"GATEWAY_API_KEYS_FILE": str(file.path), "GATEWAY_STALL_TIMEOUT": "PT20S"}
    # Streams go on in small messages.
    gateway = stack.add("gateway", {**settings, "GATEWAY_UNREAD_BYTES": str(1024 * 1024)})
    await gateway.start()
    await gateway.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
        yield Guarded(gateway, file, key, stack.address(gateway.name), LlmServiceStub(channel))
    await gateway.terminate()
    assert gateway.returncode == 0


@activity.defn(name=names.ACTIVITY_RUN)
async def large_answer(request: internal_pb2.RunRequest) -> llm_pb2.JobResult:
    """Answer at once with two million bytes."""
    return llm_pb2.JobResult(
        output="x" * 2 * MB,
        finish_reason=llm_pb2.FINISH_REASON_STOP,
        metadata=llm_pb2.ResultMetadata(output_tokens=1),
    )


async def test_a_revoked_reader_that_has_stopped_reading_is_not_served_for_long(
    stack: Stack, stub: LlmServiceStub, guarded: Guarded
) -> None:
    """Its streams cannot be told; when it reads on there is no more than was under way, and else it is cut off."""
    client = await Client.connect(stack.address("temporal"), data_converter=data_converter)
    async with Worker(client, task_queue="llm-gpu-activities.idle", activities=[large_answer]):
        id_ = (await run_job(stub, new_job(model="idle"))).final.status.workflow_id
    key = guarded.file.add(["jobs:read"])
    request = llm_pb2.StreamStatusRequest(workflow_id=id_)
    async with stalled_clients(guarded.address, 2, 1000) as (waiting, reading), asyncio.timeout(120):
        await until_accepted(guarded, key)
        for stalled in (waiting, reading):
            stalled.call(STREAM_STATUS, request, 5, bearer(key))
            await stalled.all_answered()
        open_id = (await stub.Submit(llm_pb2.SubmitRequest(job=new_job(model="idle")))).workflow_id
        reader = guarded.stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=open_id), metadata=bearer(key))
        assert await reader.read() is not grpc.aio.EOF
        guarded.file.revoke(key)
        # One that reads is told, and all have been looked at together.
        with pytest.raises(grpc.aio.AioRpcError, match="revoked"):
            await read_to_end(reader)
        for call in range(5):
            reading.take(4 * MB, call)
        await reading.all_ended()
        assert sum(reading.received.values()) < 5 * MB
        await waiting.all_ended()
        await scrape_until(stack, lambda found: found.total("llm_gateway_watchers") == 0, guarded.gateway.name)
    await guarded.serves()


async def read_to_end(stream: Any) -> None:
    while await stream.read() is not grpc.aio.EOF:
        pass


async def until_accepted(guarded: Guarded, key: str) -> None:
    while True:
        try:
            await guarded.stub.List(llm_pb2.ListRequest(), metadata=bearer(key), timeout=60)
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.1)
        else:
            return


async def test_refusals_that_nobody_reads_cost_little(guarded: Guarded) -> None:
    """One connection makes calls without a credential for as long as it is taken, and reads nothing: it is closed."""
    await guarded.serves()
    before = resident_bytes(guarded.gateway)
    host, port = guarded.address.rsplit(":", 1)
    with socket.create_connection((host, int(port))) as unread:
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        unread.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(unread, PREFACE + frame(SETTINGS))
        stream = 1
        async with asyncio.timeout(120):
            while True:
                calls = b"".join(call_frames(stream + 2 * number, LIST_MODELS, b"") for number in range(100))
                stream += 200
                try:
                    await loop.sock_sendall(unread, calls)
                except OSError:
                    break
    await guarded.serves()
    assert resident_bytes(guarded.gateway) - before < 100 * MB


@pytest.mark.long
async def test_many_refusals_leave_nothing_behind(guarded: Guarded) -> None:
    """Neither in memory nor in the log."""

    async def refused(count: int) -> None:
        for _ in range(count):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await guarded.stub.ListModels(llm_pb2.ListModelsRequest(), metadata=bearer("llmk_a_b"), timeout=60)
            assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED

    await asyncio.gather(*(refused(250) for _ in range(20)))
    before, logged = resident_bytes(guarded.gateway), len(guarded.gateway.log)
    await asyncio.gather(*(refused(500) for _ in range(20)))
    assert resident_bytes(guarded.gateway) - before < 20 * MB
    assert len(guarded.gateway.log) - logged < 1000
