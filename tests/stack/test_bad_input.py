"""Every invalid request, from bad_requests or of random bytes, gets an error that names its fault."""

import re
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.local.stack import Stack
from jobs.rules import check_job
from llm_pb import batch_pb2, file_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.bad_batches import batch, batch_rows
from tests.support.bad_files import NO_FILE, file_rows, first
from tests.support.bad_pipelines import pipeline_rows, valid_pipeline
from tests.support.bad_requests import NO_BAD_VALUE, REQUESTS, Row, field_paths, not_utf8_rows, rows, send, submit
from tests.support.bad_schedules import schedule_rows, valid
from tests.support.jobs import details_of, new_job, webhook
from tests.support.receivers import Receiver
from tests.support.stacks import FAST, stack_settings

ROWS = [*rows(), *schedule_rows(), *file_rows(), *batch_rows(), *pipeline_rows()]
NOT_UTF8 = list(not_utf8_rows())
MAX_TRAILERS = 8 * 1024
"""Bytes of metadata that most gRPC clients accept by default."""


@pytest.fixture(scope="module")
async def channel(stack: Stack) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield channel


async def refused(channel: grpc.aio.Channel, row: Row) -> set[str]:
    """Send a bad request, and return the fields that its INVALID_ARGUMENT names."""
    error = await send(channel, row.rpc, row.data, row.earlier)
    assert error is not None, "the bad request was accepted"
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    details = details_of(error)
    assert details["ErrorInfo"].reason == "INVALID_REQUEST"
    violations = details["BadRequest"].field_violations
    assert all(violation.description for violation in violations)
    assert violations[0].field in (error.details() or "")
    return {violation.field for violation in violations}


def row_ids(row: Row) -> str:
    return f"{row.rpc}: {row.what}"


@pytest.mark.parametrize("row", ROWS, ids=row_ids)
async def test_a_bad_request_is_told_every_bad_field(channel: grpc.aio.Channel, row: Row) -> None:
    """INVALID_ARGUMENT names all bad fields and no other."""
    assert await refused(channel, row) == row.fields


@pytest.mark.parametrize("row", NOT_UTF8, ids=row_ids)
async def test_text_that_is_not_utf8_is_named(channel: grpc.aio.Channel, row: Row) -> None:
    """The gateway names the field and any other bad field, where gRPC's own parser would return INTERNAL."""
    assert row.fields <= await refused(channel, row)


def test_every_field_of_every_request_is_in_the_table() -> None:
    """A new field of the protos needs a row, or an entry in NO_BAD_VALUE."""
    index = re.compile(r'\[(\d+|".*")\]')
    named = {f"{row.rpc} {index.sub('', field)}" for row in ROWS for field in row.fields}
    fields = {f"{rpc} {name}" for rpc, kind in REQUESTS.items() for name, _ in field_paths(kind.DESCRIPTOR)}
    assert fields - named == NO_BAD_VALUE.keys()


async def test_the_limits_themselves_are_allowed(stub: LlmServiceStub, receiver: Receiver) -> None:
    """A job with every value at its limit is accepted."""
    characters = "Az09._:@=+~-"
    job = new_job(
        user_id=(characters * 11)[:128],
        request_id=(characters * 11)[:128],
        project_id=(characters * 11)[:128],
        model="idle",
        params={
            "temperature": 2,
            "top_p": 1,
            "top_k": 1_000_000,
            "min_p": 1,
            "max_tokens": 8192,
            "min_tokens": 8192,
            "seed": 2**63 - 1,
            "stop": ["x" * 256] * 16,
            "presence_penalty": -2,
            "frequency_penalty": 2,
            "repetition_penalty": 2,
            "logprobs": 20,
        },
        priority=5,
        messages=[llm_pb2.ChatMessage(role=llm_pb2.ROLE_SYSTEM, content="\x00")] * 1024,
        notify=webhook(f"{receiver.url}/".ljust(2048, "a")) * 4,
        labels={chr(0x1F600 + number) * 64: chr(0x1F600) * 512 for number in range(16)},
    )
    job.timeouts.total.FromSeconds(24 * 3600)
    job.timeouts.queue.FromSeconds(12 * 3600)
    job.timeouts.run.FromMilliseconds(1)
    response = await stub.Submit(llm_pb2.SubmitRequest(job=job))
    cancel = llm_pb2.CancelRequest(workflow_id=response.workflow_id, reason="é" * 512)
    assert (await stub.Cancel(cancel)).status.cancel_requested


async def test_a_page_token_holds_for_its_filters(stub: LlmServiceStub) -> None:
    """A token that is sent with other filters is refused, because its page would belong to neither list."""
    for _ in range(2):
        await stub.Submit(llm_pb2.SubmitRequest(job=new_job(user_id="pager", params={"max_tokens": 1})))
    request = llm_pb2.ListRequest(user_id="pager", page_size=1)
    token = ""
    while not token:
        token = (await stub.List(request)).next_page_token
    await stub.List(llm_pb2.ListRequest(user_id="pager", page_size=2, page_token=token))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.List(llm_pb2.ListRequest(user_id="other", page_token=token))
    assert [item.field for item in details_of(error.value)["BadRequest"].field_violations] == ["page_token"]


async def test_a_thousand_bad_fields_fit_one_answer(channel: grpc.aio.Channel) -> None:
    """The trailers of a call are small, so the error names the fields that fit and the number of the others."""
    bad = llm_pb2.JobRequest(messages=[llm_pb2.ChatMessage()] * 1024, params=llm_pb2.SamplingParams(stop=[""] * 16))
    error = await send(channel, "Submit", llm_pb2.SubmitRequest(job=bad).SerializeToString())
    assert error is not None
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    violations = details_of(error)["BadRequest"].field_violations
    assert len(violations) > 20
    # There are two for each message, three required texts and sixteen stop texts.
    assert violations[-1].description == f"and {2 * 1024 + 3 + 16 - (len(violations) - 1)} more"
    assert trailers_size(error) < MAX_TRAILERS


async def test_a_hundred_thousand_texts_that_are_not_utf8_fit_one_answer(channel: grpc.aio.Channel) -> None:
    """The error of a hostile request stays small."""
    data = b"\x2a\x03\x12\x01\xff" * 100_000
    head = b"\x0a" + _varint(len(data))
    error = await send(channel, "Submit", head + data)
    assert error is not None
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert trailers_size(error) < MAX_TRAILERS


async def test_a_message_over_the_size_limit_is_refused_by_grpc(channel: grpc.aio.Channel) -> None:
    """gRPC itself refuses a request over GATEWAY_MAX_MESSAGE_BYTES, 4 MiB by default, before it is read."""
    error = await send(channel, "Submit", submit(prompt="x" * (5 << 20)))
    assert error is not None
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(4 << 20) in (error.details() or "")


async def test_what_does_not_exist_is_not_found(channel: grpc.aio.Channel) -> None:
    """These methods return NOT_FOUND for a valid id without a job."""
    for rpc in ("GetStatus", "GetJob", "StreamStatus", "Cancel"):
        error = await send(channel, rpc, REQUESTS[rpc](workflow_id="llmjob-no-body").SerializeToString())
        assert error is not None
        assert error.code() == grpc.StatusCode.NOT_FOUND
        assert details_of(error)["ErrorInfo"].reason == "JOB_NOT_FOUND"


VALID = {
    "Submit": submit(params={"max_tokens": 1, "stop": ["x"], "temperature": 1.0}, project_id="p", priority=4),
    "GetStatus": llm_pb2.GetStatusRequest(workflow_id="llmjob-u-r").SerializeToString(),
    "GetJob": llm_pb2.GetJobRequest(workflow_id="llmjob-u-r").SerializeToString(),
    "StreamStatus": llm_pb2.StreamStatusRequest(workflow_id="llmjob-u-r", output_offset=1).SerializeToString(),
    "Cancel": llm_pb2.CancelRequest(workflow_id="llmjob-u-r", reason="why").SerializeToString(),
    "List": llm_pb2.ListRequest(
        user_id="u", states=[llm_pb2.JOB_STATE_QUEUED], page_size=1, page_token="AAAA"
    ).SerializeToString(),
    "ListModels": b"",
    "SetModelAlias": llm_pb2.SetModelAliasRequest(model="m", alias="a", version=1).SerializeToString(),
    "DeleteModelVersion": llm_pb2.DeleteModelVersionRequest(model="m", version=1).SerializeToString(),
    "ListWorkers": llm_pb2.ListWorkersRequest(model="docstrings").SerializeToString(),
    "ListDeliveries": llm_pb2.ListDeliveriesRequest(workflow_id="llmjob-u-r").SerializeToString(),
    "Redeliver": llm_pb2.RedeliverRequest(workflow_id="llmjob-u-r", delivery_ids=["a"]).SerializeToString(),
    "GetQuota": b"",
    "DeleteJob": llm_pb2.DeleteJobRequest(workflow_id="llmjob-u-r").SerializeToString(),
    "DeleteJobs": llm_pb2.DeleteJobsRequest(
        user_id="nobody", states=[llm_pb2.JOB_STATE_QUEUED], model="m", project_id="p"
    ).SerializeToString(),
    "DeleteUser": llm_pb2.DeleteUserRequest(user_id="nobody").SerializeToString(),
    "GetDeletion": llm_pb2.GetDeletionRequest(deletion_id="llmdelete-llmjob-u-r").SerializeToString(),
    **{rpc: valid(rpc).SerializeToString() for rpc in REQUESTS if "Schedule" in rpc},
    **{rpc: valid_pipeline(rpc).SerializeToString() for rpc in REQUESTS if "Pipeline" in rpc or rpc == "AnswerStep"},
    "UploadFile": first().SerializeToString(),
    "DownloadFile": file_pb2.DownloadFileRequest(file_id=NO_FILE, offset=1, limit=1).SerializeToString(),
    "GetFile": file_pb2.GetFileRequest(file_id=NO_FILE).SerializeToString(),
    "ListFiles": file_pb2.ListFilesRequest(user_id="u", purpose="p", page_size=1).SerializeToString(),
    "DeleteFile": file_pb2.DeleteFileRequest(file_id=NO_FILE).SerializeToString(),
    "CreateBatch": batch_pb2.CreateBatchRequest(batch=batch(labels={"a": "b"})).SerializeToString(),
    "GetBatch": batch_pb2.GetBatchRequest(batch_id="llmbatch-u-r").SerializeToString(),
    "StreamBatch": batch_pb2.StreamBatchRequest(batch_id="llmbatch-u-r").SerializeToString(),
    "StreamBatchResults": batch_pb2.StreamBatchResultsRequest(batch_id="llmbatch-u-r", cursor="a").SerializeToString(),
    "CancelBatch": batch_pb2.CancelBatchRequest(batch_id="llmbatch-u-r", reason="why").SerializeToString(),
    "ListBatches": batch_pb2.ListBatchesRequest(user_id="u", page_size=1).SerializeToString(),
}


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Draw a request in which random bytes replace a part."""
    start = draw(st.integers(0, len(data)))
    end = draw(st.integers(start, min(len(data), start + 8)))
    return data[:start] + draw(st.binary(max_size=8)) + data[end:]


@pytest.mark.parametrize("rpc", REQUESTS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_no_bytes_make_an_internal_error(channel: grpc.aio.Channel, rpc: str, data: Any) -> None:
    """Random bytes and damaged requests get an answer or an error of the client's, never INTERNAL."""
    error = await send(channel, rpc, data.draw(st.binary(max_size=64) | damaged(VALID[rpc])))
    allowed = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ALREADY_EXISTS)
    if rpc == "UploadFile":
        # The file that another example has begun.
        allowed += (grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.ABORTED)
    if rpc in ("DeleteJobs", "DeleteUser"):
        # On a busy machine as many deletions of other examples as may run at the same time.
        allowed += (grpc.StatusCode.RESOURCE_EXHAUSTED,)
    assert error is None or error.code() in allowed, error


def once_right(row: Row) -> bool:
    """Return True for a Submit whose job an older gateway, or one with other settings, may have accepted."""
    if row.rpc != "Submit":
        return False
    try:
        request = llm_pb2.SubmitRequest.FromString(row.data)
    except DecodeError:
        return False
    return not check_job(request.job, strict=False)


async def test_temporal_is_not_asked_about_bad_requests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """While Temporal is down a bad request gets the same error. A good one gets UNAVAILABLE, and health NOT_SERVING.

    A bad request that an older gateway may have accepted gets UNAVAILABLE as well, because its job may exist.
    Once Temporal is back the gateway serves again without a restart.
    """
    settings_ = stack_settings(tmp_path_factory.mktemp("no-temporal"))
    async with (
        Stack(settings_, only=("temporal", "gateway"), environment=FAST) as stack,
        grpc.aio.insecure_channel(stack.address("gateway")) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="llm.v1.LlmService"))
        # A busy machine may be between two of its answers.
        while (await health.read()).status != health_pb2.HealthCheckResponse.SERVING:
            pass
        await stack.processes["temporal"].kill()
        assert (await health.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING

        for row in (*(row for row in ROWS if not once_right(row) and not row.earlier), *NOT_UTF8):
            assert row.fields <= await refused(channel, row), row_ids(row)
        was_good = await send(channel, "Submit", submit(priority=1))
        assert was_good is not None
        assert was_good.code() == grpc.StatusCode.UNAVAILABLE
        error = await send(channel, "Submit", submit())
        assert error is not None
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        details = details_of(error)
        assert details["ErrorInfo"].reason == "TEMPORAL_UNAVAILABLE"
        assert details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() > 0

        await stack.processes["temporal"].start()
        assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING
        assert await send(channel, "Submit", submit()) is None


def trailers_size(error: grpc.aio.AioRpcError) -> int:
    """Return the size in bytes of an error's metadata, as HTTP/2 counts it."""
    binary = sum(len(key) + 32 + (len(value) * 4 + 2) // 3 for key, value in error.trailing_metadata() or ())
    return binary + len("grpc-message") + 32 + 3 * len((error.details() or "").encode())


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])
