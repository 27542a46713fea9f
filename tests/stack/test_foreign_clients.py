"""Temporal clients that read JSON but no protobuf, such as TypeScript's with its default converter."""

import asyncio
from typing import Any

import grpc
import pytest
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowHandle
from temporalio.converter import (
    BinaryNullPayloadConverter,
    BinaryPlainPayloadConverter,
    CompositePayloadConverter,
    DataConverter,
    JSONPlainPayloadConverter,
)

from deploy.local.stack import Stack
from jobs import names, options
from jobs.ids import job_digest, unshortened_workflow_id, workflow_id
from jobs.memo import from_memo, to_memo
from llm_pb import internal_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from payload_converter import data_converter
from tests.support.jobs import new_job, run_job, unpack, until_output, watch


class PlainPayloadConverter(CompositePayloadConverter):
    """Converter with the encodings of TypeScript's default converter."""

    def __init__(self) -> None:
        super().__init__(BinaryNullPayloadConverter(), BinaryPlainPayloadConverter(), JSONPlainPayloadConverter())


@pytest.fixture(scope="module")
async def plain(stack: Stack) -> Client:
    converter = DataConverter(payload_converter_class=PlainPayloadConverter)
    return await Client.connect(stack.address("temporal"), data_converter=converter)


async def test_a_plain_client_starts_a_job_and_sees_it_end(plain: Client, stub: LlmServiceStub) -> None:
    job = {"user_id": "plain", "request_id": "1", "model": "docstrings", "prompt": "Hi", "params": {"maxTokens": 4000}}
    handle: WorkflowHandle[Any, Any] = await plain.start_workflow(
        names.JOB_WORKFLOW_TYPE, job, id="llmjob-plain-1", task_queue=names.WORKFLOW_QUEUE
    )
    await until_output(stub, handle.id)
    assert await (await handle.describe()).memo() == {}
    await handle.signal(names.SIGNAL_CANCEL, {"reason": "by hand"})
    assert (await watch(stub, handle.id)).final.status.error.message == "by hand"
    described = await handle.describe()
    assert described.status == WorkflowExecutionStatus.CANCELED
    status = (await described.memo())[names.MEMO_STATUS]
    assert (status["state"], status["error"]["message"]) == ("JOB_STATE_CANCELLED", "by hand")


async def test_a_plain_client_describes_and_lists_the_gateways_jobs(plain: Client, stub: LlmServiceStub) -> None:
    job = new_job(params={"max_tokens": 1}, user_id="plain-reader")
    id_ = (await run_job(stub, job)).final.status.workflow_id
    memo = await (await plain.get_workflow_handle(id_).describe()).memo()
    assert memo[names.MEMO_OPTIONS]["gpuTaskQueue"] == names.GPU_QUEUE
    assert memo[names.MEMO_STATUS]["state"] == "JOB_STATE_SUCCEEDED"
    async with asyncio.timeout(30):
        while not (found := [e async for e in plain.list_workflows("UserID = 'plain-reader'")]):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert (await found[0].memo())[names.MEMO_OPTIONS] == memo[names.MEMO_OPTIONS]


async def test_a_job_of_an_older_gateway_goes_on(stub: LlmServiceStub, temporal: Client) -> None:
    """Its memo is in protobuf, and its digest that of the job's bytes. It runs with its options and is found again.

    A job that writes out the defaults of the first one finds it as well.
    """
    job = new_job(params={"max_tokens": 2})
    chosen = internal_pb2.JobOptions()
    chosen.CopyFrom(options.DEFAULTS)
    chosen.gpu_task_queue = "nobody"
    id_ = workflow_id(job.user_id, job.request_id)
    memo = {names.MEMO_OPTIONS: chosen, names.MEMO_DIGEST: job_digest(job)}
    await temporal.start_workflow(names.JOB_WORKFLOW_TYPE, job, id=id_, task_queue=names.WORKFLOW_QUEUE, memo=memo)
    for priority in (0, 3):
        job.priority = priority
        assert (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id == id_
    assert (await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))).status.state == llm_pb2.JOB_STATE_QUEUED
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    assert (await watch(stub, id_)).states[-1] == "CANCELLED"


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "structured", "params": {"regex": "((a*)*)*"}},
        {"model": "m" * 256},
        {"model": "retired"},
        {"priority": 1},
        {"user_id": "u" * 125, "request_id": "r" * 117, "priority": 1},
        {"notify": [{"webhook": {"url": "https://10.1/hook"}}]},
    ],
    ids=["a rule", "the length of a model", "a model", "a bound", "a bound, with long ids", "a host"],
)
async def test_a_job_is_found_again_that_is_refused_since(
    stub: LlmServiceStub, temporal: Client, changes: dict[str, Any]
) -> None:
    """An older gateway, or one with other settings, accepted it. Another job under its key is still refused."""
    job = new_job(**changes)
    chosen = internal_pb2.JobOptions()
    chosen.CopyFrom(options.DEFAULTS)
    chosen.gpu_task_queue = "nobody"
    id_ = unshortened_workflow_id(job.user_id, job.request_id)
    memo = {names.MEMO_OPTIONS: chosen, names.MEMO_DIGEST: job_digest(job)}
    await temporal.start_workflow(names.JOB_WORKFLOW_TYPE, job, id=id_, task_queue=names.WORKFLOW_QUEUE, memo=memo)
    answer = await stub.Submit(llm_pb2.SubmitRequest(job=job), timeout=60)
    assert (answer.workflow_id, answer.status.state) == (id_, llm_pb2.JOB_STATE_QUEUED)
    for field, value in (
        ("prompt", "Something else."),
        ("request_id", "another"),
        ("request_id", ""),
        ("user_id", "-"),
    ):
        other = llm_pb2.JobRequest()
        other.CopyFrom(job)
        setattr(other, field, value)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Submit(llm_pb2.SubmitRequest(job=other), timeout=60)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    assert (await watch(stub, id_)).states[-1] == "CANCELLED"


async def test_options_that_are_none_fail_the_job(stub: LlmServiceStub, temporal: Client) -> None:
    """Invalid options are not retried for ever."""
    memo = {names.MEMO_OPTIONS: "nonsense", names.MEMO_TRACEPARENT: 5, names.MEMO_STATUS: []}
    queue = names.WORKFLOW_QUEUE
    await temporal.start_workflow(names.JOB_WORKFLOW_TYPE, new_job(), id="odd-options", task_queue=queue, memo=memo)
    final = (await watch(stub, "odd-options")).final.status
    assert final.state == llm_pb2.JOB_STATE_FAILED
    assert unpack(final.error)["ErrorInfo"].reason == "INVALID_JOB"
    assert final.error.message == "memo options: is no llm.v1.JobOptions"


async def test_what_this_build_writes_an_older_one_reads() -> None:
    """The older build decodes JSON as well as bytes, as long as it knows every field that is set."""
    (payload,) = await data_converter.encode([to_memo(options.DEFAULTS)])
    assert payload.metadata["encoding"] == b"json/plain"
    assert await data_converter.decode([payload], [internal_pb2.JobOptions]) == [options.DEFAULTS]


def test_a_field_of_a_newer_build_is_skipped() -> None:
    newer = {**to_memo(options.DEFAULTS), "aFieldFromTheFuture": {"a": 1}}
    assert from_memo(newer, internal_pb2.JobOptions) == options.DEFAULTS


def test_a_message_of_an_older_build_is_taken_as_it_is() -> None:
    assert from_memo(options.DEFAULTS, internal_pb2.JobOptions) is options.DEFAULTS
    assert from_memo(None, internal_pb2.JobOptions) is None


@pytest.mark.parametrize("value", [llm_pb2.JobStatus(), "nonsense", {"timeouts": 1}])
def test_what_is_no_such_message_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"is no llm\.v1\.JobOptions"):
        from_memo(value, internal_pb2.JobOptions)
