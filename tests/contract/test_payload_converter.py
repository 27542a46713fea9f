"""The payload converter alone, by properties, and with a real Temporal server and workflows in the sandbox."""

import contextlib
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import any_pb2, duration_pb2, timestamp_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st
from temporalio.api.common.v1 import Payload
from temporalio.client import (
    Client,
    Interceptor,
    OutboundInterceptor,
    StartWorkflowInput,
    WorkflowFailureError,
    WorkflowHandle,
)
from temporalio.exceptions import ApplicationError
from temporalio.worker import Worker

from deploy.local.stack import Stack
from llm_pb import llm_pb2
from payload_converter import MAX_PAYLOAD_BYTES, PayloadError, data_converter
from tests.support import payload_converter_workflow as flow
from tests.support.paths import ROOT
from tests.support.stacks import stack_settings, temporal_cli, tool

CONVERTER = data_converter.payload_converter
BETTERPROTO_WORKFLOW = "tests.support.payload_converter_betterproto_workflow"


@pytest.fixture(scope="module", params=["betterproto2", "betterproto"])
def betterproto(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Generate a package of classes from proto/llm.proto with one generation of betterproto, and yield its module.

    It takes seconds, so pytest's cache keeps the package until the protos or the generator change.
    """
    cache = request.config.cache
    assert cache
    kept = cache.mkdir("betterproto")
    directory = kept / f"{request.param}-{_fingerprint()}"
    if not directory.exists():
        fresh = Path(tempfile.mkdtemp(dir=kept))
        _generate(f"python_{request.param}", fresh / "llm_betterproto")
        # Another run may have been faster.
        with contextlib.suppress(OSError):
            fresh.rename(directory)
    sys.path.insert(0, str(directory))
    yield importlib.import_module("llm_betterproto.llm.v1")
    sys.path.remove(str(directory))
    for name in [name for name in sys.modules if "llm_betterproto" in name or name == BETTERPROTO_WORKFLOW]:
        del sys.modules[name]


def _fingerprint() -> str:
    """Return a hash of all that decides what is generated."""
    protos = sorted((ROOT / "proto").glob("*.proto"))
    lock = ROOT / "requirements" / "dev.txt"
    return hashlib.sha256(b"".join(path.read_bytes() for path in (*protos, lock))).hexdigest()[:16]


def _generate(plugin: str, package: Path) -> None:
    package.mkdir()
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", "-I", "proto", "-I", "third_party/googleapis"),
            f"--plugin=protoc-gen-{plugin}={tool(f'protoc-gen-{plugin}')}",
            *(f"--{plugin}_out={package}", "proto/llm.proto"),
        ],
        cwd=ROOT,
        # The plugin formats its output with a program from PATH.
        env={**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])},
        check=True,
        capture_output=True,
    )


def payload_of(message: Message, data: bytes | None = None) -> Payload:
    """Return the message's payload. `data` replaces its bytes."""
    payload = CONVERTER.to_payload(message)
    if data is not None:
        payload.data = data
    return payload


def from_json(encoding: str, data: str, hint: Any = None, message_type: str = "") -> Any:
    metadata = {"encoding": encoding.encode()}
    if message_type:
        metadata["messageType"] = message_type.encode()
    return CONVERTER.from_payload(Payload(metadata=metadata, data=data.encode()), hint)


JOB = llm_pb2.JobRequest(user_id="u", request_id="r", model="m", prompt="p", params=llm_pb2.SamplingParams(seed=3))
JOB_JSON = '{"userId": "u", "request_id": "r", "model": "m", "prompt": "p", "params": {"seed": "3"}}'


# Bytes


@pytest.mark.parametrize("hint", [llm_pb2.JobRequest, llm_pb2.JobRequest | None, None, Any, object, Message])
def test_a_message_is_binary_with_its_type_and_comes_back(hint: Any) -> None:
    payload = CONVERTER.to_payload(JOB)
    assert dict(payload.metadata) == {"encoding": b"binary/protobuf", "messageType": b"llm.v1.JobRequest"}
    assert CONVERTER.from_payload(payload, hint) == JOB


def test_types_of_other_packages_come_back_through_the_pool() -> None:
    error = status_pb2.Status(code=code_pb2.NOT_FOUND, details=[any_pb2.Any(type_url="x.y/z", value=b"1")])
    for message in (error, timestamp_pb2.Timestamp(seconds=1), duration_pb2.Duration(nanos=5)):
        assert CONVERTER.from_payload(CONVERTER.to_payload(message)) == message


@pytest.mark.parametrize("value", [None, b"bytes", "text", 3, {"a": [1]}])
def test_other_values_go_the_sdks_way(value: Any) -> None:
    payload = CONVERTER.to_payload(value)
    assert payload == data_converter.default.payload_converter.to_payload(value)
    assert CONVERTER.from_payload(payload) == value


@pytest.mark.parametrize(
    ("hint", "name"),
    [(llm_pb2.JobResult, "llm.v1.JobResult"), (llm_pb2.JobResult | None, "llm.v1.JobResult | None"), (str, "str")],
)
def test_a_message_of_another_type_than_the_hint_is_refused(hint: Any, name: str) -> None:
    with pytest.raises(PayloadError) as caught:
        CONVERTER.from_payload(CONVERTER.to_payload(JOB), hint)
    assert caught.value.message == f"expected {name}, but the payload is a llm.v1.JobRequest"


def test_a_union_of_messages_takes_the_one_that_the_payload_names() -> None:
    hint: Any = llm_pb2.JobResult | llm_pb2.JobRequest | None
    assert CONVERTER.from_payload(CONVERTER.to_payload(JOB), hint) == JOB
    assert CONVERTER.from_payload(CONVERTER.to_payload(None), hint) is None


def test_an_error_names_both_types_whatever_is_wrong_with_the_bytes() -> None:
    cut = payload_of(JOB, JOB.SerializeToString()[:-1])
    big = payload_of(JOB, b"\x22" + b"\xff" * MAX_PAYLOAD_BYTES)
    foreign = payload_of(JOB)
    foreign.metadata["messageType"] = b"other.v1.Thing"
    nameless = payload_of(JOB)
    del nameless.metadata["messageType"]
    for payload, held in ((cut, "llm.v1.JobRequest"), (big, "llm.v1.JobRequest"), (foreign, "other.v1.Thing")):
        with pytest.raises(PayloadError, match=rf"expected llm\.v1\.JobRequest, but.*{held}") as caught:
            CONVERTER.from_payload(payload, llm_pb2.JobRequest)
        assert caught.value.non_retryable
        assert caught.value.type == "PayloadValidationError"
    with pytest.raises(PayloadError, match="has no messageType"):
        CONVERTER.from_payload(nameless, llm_pb2.JobRequest)


def test_a_type_that_only_newer_code_knows_is_worth_a_retry() -> None:
    payload = payload_of(JOB)
    payload.metadata["messageType"] = b"other.v1.Thing"
    with pytest.raises(RuntimeError) as caught:
        CONVERTER.from_payload(payload)
    assert not isinstance(caught.value, PayloadError)
    assert "unknown message type other.v1.Thing" in str(caught.value.__cause__)


def test_what_temporal_would_refuse_is_refused_first() -> None:
    job = llm_pb2.JobRequest(prompt="x" * (MAX_PAYLOAD_BYTES - 100))
    assert len(CONVERTER.to_payloads([job])) == 1
    with pytest.raises(PayloadError, match=r"llm\.v1\.JobRequest, str: \d+ bytes, over Temporal's limit of 2097152"):
        CONVERTER.to_payloads([job, "x" * 100])


# JSON


def test_json_is_read_as_the_hinted_message() -> None:
    assert from_json("json/plain", JOB_JSON, llm_pb2.JobRequest) == JOB
    assert from_json("json/plain", JOB_JSON, llm_pb2.JobRequest | None) == JOB
    assert from_json("json/plain", "null", llm_pb2.JobRequest | None) is None
    assert from_json("json/plain", '"1.5s"', duration_pb2.Duration) == duration_pb2.Duration(seconds=1, nanos=500000000)
    assert from_json("json/plain", JOB_JSON) == json.loads(JOB_JSON)
    assert from_json("json/protobuf", JOB_JSON, llm_pb2.JobRequest) == JOB
    assert from_json("json/protobuf", JOB_JSON, message_type="llm.v1.JobRequest") == JOB


@pytest.mark.parametrize("encoding", ["json/plain", "json/protobuf"])
@pytest.mark.parametrize(
    ("data", "cause"),
    [
        ('{"userId": 3}', "Failed to parse userId field"),
        ('{"usrId": "u"}', 'no field named "usrId"'),
        ('{"userId": "u", "userId": "v"}', "duplicate key"),
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
        ('{"userId"', "Failed to load JSON"),
        ('{"a":' * 20_000, "recursion"),
        ('{"userId": "' + "x" * MAX_PAYLOAD_BYTES + '"}', "over the limit"),
    ],
)
def test_json_that_is_not_the_message_is_refused(encoding: str, data: str, cause: str) -> None:
    with pytest.raises(PayloadError, match=cause) as caught:
        from_json(encoding, data, llm_pb2.JobRequest)
    assert "expected llm.v1.JobRequest, but the" in caught.value.message


def test_json_of_another_type_or_of_any_of_two_is_refused() -> None:
    with pytest.raises(PayloadError, match=r"expected llm\.v1\.JobResult, but the payload is a llm\.v1\.JobRequest"):
        from_json("json/protobuf", JOB_JSON, llm_pb2.JobResult, "llm.v1.JobRequest")
    with pytest.raises(PayloadError, match="no messageType to tell"):
        from_json("json/plain", JOB_JSON, llm_pb2.JobResult | llm_pb2.JobRequest)


# betterproto


def test_a_betterproto_message_is_the_same_payload_as_its_pb2_twin(betterproto: Any) -> None:
    twin = betterproto.JobRequest(
        user_id="u", request_id="r", model="m", prompt="p", params=betterproto.SamplingParams(seed=3)
    )
    payload = CONVERTER.to_payload(twin)
    assert payload == CONVERTER.to_payload(JOB)
    assert CONVERTER.from_payload(payload, betterproto.JobRequest) == twin
    assert CONVERTER.from_payload(payload, betterproto.JobRequest | None) == twin
    assert from_json("json/plain", JOB_JSON, betterproto.JobRequest) == twin
    with pytest.raises(PayloadError, match=r"expected llm\.v1\.JobResult, but the payload is a llm\.v1\.JobRequest"):
        CONVERTER.from_payload(payload, betterproto.JobResult)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x08\x01", id="a number where user_id is a text"),
        pytest.param(b"\x53\x22\x01p\x54", id="a group whose inner field looks like the prompt"),
        pytest.param(b"\x32\x02\x0a\x00", id="inside params, bytes where temperature is a double"),
    ],
)
def test_what_betterproto_would_misread_is_refused_for_betterproto(betterproto: Any, data: bytes) -> None:
    assert CONVERTER.from_payload(payload_of(JOB, data), llm_pb2.JobRequest).prompt == ""
    with pytest.raises(PayloadError, match="wrong wire type"):
        CONVERTER.from_payload(payload_of(JOB, data), betterproto.JobRequest)


def test_a_value_that_betterproto_cannot_hold_is_refused(betterproto: Any) -> None:
    status = llm_pb2.JobStatus(create_time=timestamp_pb2.Timestamp(seconds=2**60))
    with pytest.raises(PayloadError, match="betterproto cannot hold it"):
        CONVERTER.from_payload(CONVERTER.to_payload(status), betterproto.JobStatus)


def test_a_class_that_protobuf_does_not_know_is_named(betterproto: Any) -> None:
    stranger = type("Other", (betterproto.JobRequest.__mro__[1],), {"__module__": "some.where.llm.v1"})
    with pytest.raises(RuntimeError, match=r"no protobuf type is known for the betterproto class some\.where"):
        CONVERTER.to_payload(stranger())


# Properties

words = st.text(max_size=12)
unknown_fields = st.builds(
    lambda number, data: any_pb2.Any(value=data).SerializeToString().replace(b"\x12", number, 1) if data else b"",
    st.just(b"\xc2\x3e"),  # field 1000, length delimited
    st.binary(max_size=12),
)
requests = st.builds(
    lambda job, top, inner: llm_pb2.JobRequest.FromString(
        job.SerializeToString()
        + top
        + llm_pb2.JobRequest(params=llm_pb2.SamplingParams.FromString(inner)).SerializeToString()
    ),
    st.builds(
        llm_pb2.JobRequest,
        user_id=words,
        prompt=words,
        priority=st.integers(-(2**31), 2**31 - 1),
        messages=st.lists(
            st.builds(llm_pb2.ChatMessage, role=st.sampled_from([0, 1, 2, 9]), content=words), max_size=3
        ),
        params=st.builds(
            llm_pb2.SamplingParams,
            temperature=st.none() | st.floats(),
            seed=st.none() | st.integers(-(2**63), 2**63 - 1),
            stop=st.lists(words, max_size=2),
            choice=st.none() | st.builds(llm_pb2.Choice, options=st.lists(words, max_size=2)),
        ),
        notify=st.lists(st.builds(llm_pb2.NotifyTarget), max_size=2),
    ),
    unknown_fields,
    unknown_fields,
)


@given(requests)
def test_every_message_comes_back_with_the_fields_that_nobody_here_knows(job: llm_pb2.JobRequest) -> None:
    back = CONVERTER.from_payload(CONVERTER.to_payload(job), llm_pb2.JobRequest)
    assert back.SerializeToString(deterministic=True) == job.SerializeToString(deterministic=True)


@given(job=requests)
def test_every_message_comes_back_from_a_betterproto_worker(betterproto: Any, job: llm_pb2.JobRequest) -> None:
    there = CONVERTER.from_payload(CONVERTER.to_payload(job), betterproto.JobRequest)
    back = CONVERTER.from_payload(CONVERTER.to_payload(there), llm_pb2.JobRequest)
    assert back.SerializeToString(deterministic=True) == job.SerializeToString(deterministic=True)


@given(job=requests, share=st.floats(0, 1, exclude_max=True))
def test_cut_bytes_are_refused_for_either_kind_of_class(
    betterproto: Any, job: llm_pb2.JobRequest, share: float
) -> None:
    """Bytes that are cut at the end of a field are a valid message, because protobuf does not mark a message's end."""
    data = job.SerializeToString()
    cut = data[: int(len(data) * share)]
    try:
        expected = llm_pb2.JobRequest.FromString(cut)
    except DecodeError:
        for hint in (llm_pb2.JobRequest, betterproto.JobRequest):
            with pytest.raises(PayloadError):
                CONVERTER.from_payload(payload_of(job, cut), hint)
    else:
        read = CONVERTER.from_payload(payload_of(job, cut), llm_pb2.JobRequest)
        assert read.SerializeToString() == expected.SerializeToString()


@given(st.binary(max_size=40), st.sampled_from(["binary/protobuf", "json/protobuf", "json/plain"]))
def test_no_bytes_make_another_error_than_a_payload_error(data: bytes, encoding: str) -> None:
    payload = Payload(metadata={"encoding": encoding.encode(), "messageType": b"llm.v1.JobRequest"}, data=data)
    with contextlib.suppress(PayloadError):
        assert isinstance(CONVERTER.from_payload(payload, llm_pb2.JobRequest), llm_pb2.JobRequest)


# A real server


class OwnerHeader(Interceptor):
    """Interceptor that starts every workflow with a message in its header."""

    def intercept_client(self, next: OutboundInterceptor) -> OutboundInterceptor:  # noqa: A002 - the SDK's name
        class AddHeader(OutboundInterceptor):
            async def start_workflow(self, input: StartWorkflowInput) -> WorkflowHandle[Any, Any]:  # noqa: A002
                owner = CONVERTER.to_payload(llm_pb2.JobSummary(user_id="owner"))
                input.headers = {**input.headers, "owner": owner}
                return await super().start_workflow(input)

        return AddHeader(next)


@pytest.fixture(scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """Run Temporal alone."""
    async with Stack(stack_settings(tmp_path_factory.mktemp("temporal")), only=("temporal",)) as stack:
        yield stack


@pytest.fixture(scope="module")
async def client(stack: Stack, betterproto: Any) -> AsyncIterator[Client]:
    """Yield a client with the converter while a worker with the converter runs."""
    address = stack.address("temporal")
    client = await Client.connect(address, data_converter=data_converter, interceptors=[OwnerHeader()])
    betterproto_flow = importlib.import_module(BETTERPROTO_WORKFLOW)
    workflows = [flow.Convert, betterproto_flow.ConvertBetterproto]
    async with Worker(client, task_queue=flow.TASK_QUEUE, workflows=workflows, activities=[flow.generate]):
        yield client


async def test_every_kind_of_payload_carries_messages_through_a_sandboxed_workflow(client: Client) -> None:
    """The kinds are input, memo, header, activity, heartbeat, signal, query and the failure's detail."""
    progress = llm_pb2.JobProgress(percent=50)
    handle = await client.start_workflow(
        flow.Convert.run, JOB, id="every-kind", task_queue=flow.TASK_QUEUE, memo={"progress": progress}
    )
    status = await handle.query(flow.Convert.get_status)
    assert status == llm_pb2.JobStatus(workflow_id="owner", progress=progress)
    assert (await (await handle.describe()).memo())["progress"] == progress
    assert await handle.query("Nothing", None) is None

    await handle.signal(flow.Convert.on_cancel, llm_pb2.CancelRequest(reason="enough"))
    with pytest.raises(WorkflowFailureError) as caught:
        await handle.result()
    cause = caught.value.cause
    assert isinstance(cause, ApplicationError)
    metadata = llm_pb2.ResultMetadata(output_tokens=7, model="m")
    assert (cause.type, list(cause.details)) == ("REFUSED", [llm_pb2.JobResult(output="p, decode", metadata=metadata)])


async def test_the_cli_starts_a_workflow_from_json(client: Client, stack: Stack) -> None:
    job = json.dumps({**json.loads(JOB_JSON), "priority": 1})
    target = ("--type", "Convert", "--task-queue", flow.TASK_QUEUE, "--workflow-id", "from-cli")
    await temporal_cli(stack, "workflow", "start", *target, "--input", job)
    result = await client.get_workflow_handle("from-cli", result_type=llm_pb2.JobResult).result()
    assert result.output == "p, decode"


async def test_bad_input_from_the_cli_fails_the_workflow_at_once(client: Client, stack: Stack) -> None:
    """Any other error would fail the workflow task, which the server would retry for ever."""
    target = ("--type", "Convert", "--task-queue", flow.TASK_QUEUE, "--workflow-id", "bad-input")
    await temporal_cli(stack, "workflow", "start", *target, "--input", '{"prompt": 3}')
    with pytest.raises(WorkflowFailureError) as caught:
        await client.get_workflow_handle("bad-input").result()
    assert isinstance(caught.value.cause, ApplicationError)
    assert caught.value.cause.type == "PayloadValidationError"
    assert "expected llm.v1.JobRequest, but the json/plain payload cannot be read" in caught.value.cause.message


async def test_a_workflow_may_work_with_betterproto_in_the_sandbox(client: Client) -> None:
    result = await client.execute_workflow(
        "ConvertBetterproto",
        JOB,
        id="betterproto",
        task_queue=flow.TASK_QUEUE,
        result_type=llm_pb2.JobResult,
    )
    assert result == llm_pb2.JobResult(output="p")
