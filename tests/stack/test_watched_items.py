"""Items of batches with "watch": true are jobs of their own, whose results are the items'."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2
from temporalio.client import Client

from batches.chunk import usage_of
from deploy.local.stack import Stack
from jobs.errors import reason_of
from jobs.ids import deletion_workflow_id, item_workflow_id
from llm_pb import batch_pb2, llm_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.stack.test_batches import replay
from tests.support.batches import Stubs, by_index, create, custom_id_of, lines_of, to_jsonl
from tests.support.files import until
from tests.support.jobs import until_output, watch
from tests.support.stacks import FAST, stack_settings


def stubs_of(channel: grpc.aio.Channel) -> Stubs:
    return Stubs(FileServiceStub(channel), BatchServiceStub(channel))


@pytest.fixture
async def stubs(stack: Stack) -> AsyncIterator[Stubs]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield stubs_of(channel)


def watched(lines: list[dict[str, Any]], *indexes: int) -> list[dict[str, Any]]:
    return [{**line, "watch": True} if index in indexes else line for index, line in enumerate(lines)]


async def status_of(stub: LlmServiceStub, id_: str) -> llm_pb2.GetStatusResponse:
    response: llm_pb2.GetStatusResponse = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))
    return response


async def exists(stub: LlmServiceStub, id_: str) -> bool:
    try:
        await status_of(stub, id_)
    except grpc.aio.AioRpcError as error:
        if error.code() != grpc.StatusCode.NOT_FOUND:
            raise
        return False
    return True


async def is_deleted(stub: LlmServiceStub, id_: str) -> bool:
    response = await stub.GetDeletion(llm_pb2.GetDeletionRequest(deletion_id=deletion_workflow_id(id_)))
    return bool(response.deletion.state == llm_pb2.DELETION_STATE_DONE)


async def test_a_watched_item_is_a_job_and_its_result_is_the_items(
    stubs: Stubs, stub: LlmServiceStub, temporal: Client
) -> None:
    lines = watched(lines_of(40, model="docstrings"), 3, 20, 21)
    defaults = llm_pb2.JobRequest(params=llm_pb2.SamplingParams(max_tokens=20))
    created = await create(stubs, lines, defaults=defaults)
    ids = {index: item_workflow_id(created.batch_id, index) for index in (3, 20, 21)}
    assert ids[3] == f"{created.batch_id}/3"
    await until(lambda: exists(stub, ids[3]))
    seen = await watch(stub, ids[3])
    status = await stubs.end(created.batch_id)
    assert status.state == batch_pb2.BATCH_STATE_SUCCEEDED, status
    assert (status.counts.total, status.counts.succeeded) == (40, 40)
    assert status.usage.output_tokens == 40 * 20
    output = await stubs.read(status.output)
    names = [custom_id_of({"custom_id": line.get("custom_id", line.get("request_id"))}) for line in lines]
    assert [custom_id_of(line) for line in output] == names
    items = by_index(await stubs.results(created.batch_id))
    assert {index: item.workflow_id for index, item in items.items() if item.workflow_id} == ids
    assert items[3].result.output.encode() == seen.output
    assert output[3]["response"]["body"]["choices"][0]["message"]["content"].encode() == seen.output
    assert output[20]["workflowId"] == ids[20]
    assert items[20].result == (await status_of(stub, ids[20])).result
    await replay(await temporal.get_workflow_handle(created.batch_id).fetch_history())


async def test_a_cancel_of_the_batch_reaches_its_jobs_and_one_of_a_job_its_item(
    stubs: Stubs, stub: LlmServiceStub, temporal: Client
) -> None:
    lines = watched(lines_of(4, model="docstrings", params={"max_tokens": 8000}), 0, 2)
    lines[1:2] = watched(lines_of(1), 0)
    lines[1]["request_id"] = "idle"
    lines[3] = {"request_id": "unwatched", "model": "idle", "prompt": "p"}
    created = await create(stubs, to_jsonl(lines))
    ids = [item_workflow_id(created.batch_id, index) for index in range(3)]
    for id_ in ids:
        await until(lambda id_=id_: exists(stub, id_))  # type: ignore[misc]
    await until_output(stub, ids[0])
    await until_output(stub, ids[2])
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=ids[2], reason="this one alone"))
    await watch(stub, ids[2])
    await stubs.cancel(created.batch_id, "not needed")
    status = await stubs.end(created.batch_id)
    assert status.state == batch_pb2.BATCH_STATE_CANCELLED
    assert status.counts.cancelled == 4
    items = by_index(await stubs.results(created.batch_id))
    assert [items[index].error.message for index in range(4)] == [
        "not needed",
        "not needed",
        "this one alone",
        "not needed",
    ]
    assert [items[index].workflow_id for index in range(4)] == [*ids, ""]
    assert items[0].result.output
    for index in range(3):
        job = await status_of(stub, ids[index])
        assert job.status.state == llm_pb2.JOB_STATE_CANCELLED
        assert items[index].result == job.result
    assert [custom_id_of(line) for line in await stubs.read(status.errors)] == ["line-0", "idle", "line-2", "unwatched"]
    await replay(await temporal.get_workflow_handle(created.batch_id).fetch_history())


async def test_a_job_deleted_while_it_runs_leaves_no_output_in_its_batch(
    stubs: Stubs, stub: LlmServiceStub, temporal: Client
) -> None:
    line = lines_of(1, model="docstrings", params={"max_tokens": 8000})[0]
    lines = watched([{**line, "request_id": f"{n}"} for n in range(3)], 0, 1, 2)
    created = await create(stubs, lines)
    deleted, terminated, cancelled = ids = [item_workflow_id(created.batch_id, index) for index in range(3)]
    for id_ in ids:
        await until(lambda id_=id_: exists(stub, id_))  # type: ignore[misc]
        await until_output(stub, id_)
    await stub.DeleteJob(llm_pb2.DeleteJobRequest(workflow_id=deleted))
    await stub.DeleteJob(llm_pb2.DeleteJobRequest(workflow_id=terminated))
    # As the deletion does with a job that does not close.
    await temporal.get_workflow_handle(terminated).terminate()
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=cancelled, reason="this one alone"))
    status = await stubs.end(created.batch_id)
    assert status.counts.cancelled == 3
    items = by_index(await stubs.results(created.batch_id))
    for item in (items[0], items[1]):
        assert (item.state, item.workflow_id) == (llm_pb2.JOB_STATE_CANCELLED, ids[item.index])
        assert (item.error.code, reason_of(item.error)) == (code_pb2.NOT_FOUND, "JOB_DELETED")
        assert item.result == llm_pb2.JobResult(metadata=item.result.metadata)
        assert not item.result.metadata.worker
    assert (items[2].error.message, bool(items[2].result.output)) == ("this one alone", True)
    # What a deleted job has used was used.
    used = [usage_of(items[index]).output_tokens for index in range(3)]
    assert used[0] > 0
    assert status.usage.output_tokens == sum(used)
    errors = await stubs.read(status.errors)
    assert ["output" in line["result"] for line in errors] == [False, False, True]
    for id_ in (deleted, terminated):
        await until(lambda id_=id_: is_deleted(stub, id_))  # type: ignore[misc]
        assert not await exists(stub, id_)


async def test_a_gateway_that_dies_loses_no_job_and_starts_none_again(tmp_path_factory: pytest.TempPathFactory) -> None:
    environment = {**FAST, "gateway": {**FAST["gateway"], "GATEWAY_HEARTBEAT_TIMEOUT": "PT5S"}}
    services = ("temporal", "nats", "gateway", "gpu-worker")
    settings = stack_settings(tmp_path_factory.mktemp("watched"))
    async with Stack(settings, only=services, environment=environment) as stack:
        gateway = stack.processes["gateway"]
        async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
            stubs, stub = stubs_of(channel), LlmServiceStub(channel)
            lines = watched(lines_of(3, model="docstrings", params={"max_tokens": 600}), 0, 1, 2)
            del lines[1]
            created = await create(stubs, to_jsonl(lines))
            stopped = await create(stubs, to_jsonl(watched(lines_of(1), 0)))
            ids = [item_workflow_id(created.batch_id, 0), item_workflow_id(stopped.batch_id, 0)]
            for id_ in ids:
                await until(lambda id_=id_: exists(stub, id_))  # type: ignore[misc]
            await until_output(stub, ids[0])
            runs = [(await status_of(stub, id_)).status.run_id for id_ in ids]
            # The next gateway stops a batch whose job nobody follows.
            await stubs.cancel(stopped.batch_id)
            await gateway.kill()
            await gateway.start()
            await gateway.wait_ready()
        async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
            stubs, stub = stubs_of(channel), LlmServiceStub(channel)
            assert (await stubs.end(created.batch_id)).counts.succeeded == 2
            assert (await stubs.end(stopped.batch_id)).counts.cancelled == 1
            jobs = [await status_of(stub, id_) for id_ in ids]
            assert [job.status.run_id for job in jobs] == runs
            assert [job.status.state for job in jobs] == [llm_pb2.JOB_STATE_SUCCEEDED, llm_pb2.JOB_STATE_CANCELLED]
            items = by_index(await stubs.results(created.batch_id))
            assert items[0].result == jobs[0].result
            assert sorted(items) == [0, 1]
