"""Clients without this code base: buf by reflection, those of other languages by the proto file; and Python's."""

import asyncio
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.message_factory import GetMessages
from google.rpc import code_pb2 as rpc_code

from deploy.local.ports import free_port
from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.commands import NODE, interrupt, interrupt_another_thread, missing, run, start
from tests.support.debian_tools import cpp_example, go_example, java_example, ruby_example
from tests.support.jobs import new_job, run_job, until_output, webhook
from tests.support.paths import ROOT
from tests.support.stacks import FAST, tool
from tests.support.unsteady_gateway import Turn, serving

SPECIFIED = {
    "user_id": "user-123",
    "model": "docstrings",
    "prompt": "Tell me about durable jobs.",
    "params": {"temperature": "0.1", "max_tokens": 30},
}
"""Job in the form of the original specification, with a number as a string and names in snake case."""


async def node_example(name: str) -> tuple[str, str]:
    """Return the command of a Node.js example. Without Node.js it calls missing()."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None:
        missing("node")
    # What npm writes last: an interrupted installation has none.
    if not (NODE / "node_modules" / ".package-lock.json").exists():
        if npm is None:
            missing("npm")
        installed = await run(npm, "ci", "--prefix", str(NODE), "--ignore-scripts", "--no-audit", "--no-fund")
        assert installed.status == 0, installed.errors
    return node, str(NODE / name)


@pytest.fixture(scope="module", params=["python", "node", "ruby", "go", "cpp", "java"])
async def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sequence[str]:
    """Return the command of an example client. All examples take the same arguments."""
    if request.param == "ruby":
        return await ruby_example(tmp_path_factory.mktemp("ruby"))
    if request.param == "go":
        return await go_example(tmp_path_factory.mktemp("go"))
    if request.param == "cpp":
        return await cpp_example()
    if request.param == "java":
        return await java_example(tmp_path_factory.mktemp("java"))
    if request.param == "python":
        return (sys.executable, "-m", "clients.python.examples.client")
    return await node_example("client.js")


def of_python(client: Sequence[str]) -> bool:
    return client[0] == sys.executable


def job(client: Sequence[str], name: str, **changes: Any) -> str:
    # The programs of two languages have one name, in different folders.
    example = "-".join(Path(client[-1]).parts[-2:])
    return json.dumps({**SPECIFIED, "request_id": f"{example}-{name}", **changes})


async def test_an_example_submits_and_watches_a_job(client: Sequence[str], stack: Stack, stub: LlmServiceStub) -> None:
    """It accepts the JSON of the specification unchanged and prints the job's output."""
    address = stack.address("gateway")
    submitted = await run(*client, "submit", job(client, "whole"), LLM_ADDRESS=address)
    assert submitted.status == 0, submitted.errors
    workflow_id = submitted.output.strip()
    assert workflow_id.startswith("llmjob-user--123-")
    watched = await run(*client, "watch", workflow_id, LLM_ADDRESS=address)
    assert watched.status == 0, watched.errors
    assert "JOB_STATE_SUCCEEDED" in watched.errors
    look = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=workflow_id))
    assert watched.output == look.result.output != ""


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "JSON"), ('{"nope": 1}', "nope"), ('{"params": {"temprature": 1}}', "temprature"), ("[1]", "")],
)
async def test_an_example_says_what_is_wrong_with_a_job(
    client: Sequence[str], stack: Stack, text: str, says: str
) -> None:
    """A field that the message does not have is named, wherever it is, and is not dropped."""
    ended = await run(*client, "submit", text, LLM_ADDRESS=stack.address("gateway"))
    assert (ended.status, ended.output) == (1, "")
    assert says in ended.errors
    assert "Traceback" not in ended.errors
    assert "    at " not in ended.errors


async def test_an_example_cancels_a_job(client: Sequence[str], stack: Stack, stub: LlmServiceStub) -> None:
    """Its watcher prints the reason and exits with another status."""
    address = stack.address("gateway")
    text = job(client, "cancelled", params={"max_tokens": 4000})
    workflow_id = (await run(*client, "submit", text, LLM_ADDRESS=address)).output.strip()
    await until_output(stub, workflow_id)
    reason = ["not needed"] if not of_python(client) else ["--reason", "not needed"]
    cancelled = await run(*client, "cancel", workflow_id, *reason, LLM_ADDRESS=address)
    assert cancelled.output == "cancel requested\n", cancelled.errors
    watched = await run(*client, "watch", workflow_id, LLM_ADDRESS=address)
    assert watched.status == 1
    assert watched.errors.endswith("not needed\n")
    again = await run(*client, "cancel", workflow_id, LLM_ADDRESS=address)
    assert "cancel" in again.output.lower()


async def test_an_example_says_what_is_wrong(client: Sequence[str], stack: Stack) -> None:
    """For a refused job it exits with the gateway's error message."""
    address = stack.address("gateway")
    refused = await run(*client, "submit", job(client, "bad", model="gpt", priority=9), LLM_ADDRESS=address)
    assert refused.status == 1
    assert refused.errors.startswith("INVALID_ARGUMENT: job.priority must be")
    assert "job.model" in refused.errors


@pytest.mark.parametrize("command", [("submit", "{}"), ("watch", "llmjob-a-b"), ("cancel", "llmjob-a-b")])
async def test_an_example_gives_a_wrong_address_up(client: Sequence[str], command: Sequence[str]) -> None:
    """The error names the address and its source."""
    address = f"127.0.0.1:{free_port()}"
    ended = await run(*client, *command, LLM_ADDRESS=address)
    assert ended.status == 1
    assert "UNAVAILABLE" in ended.errors
    assert ended.errors.endswith(f"Does a gateway listen at {address}? LLM_ADDRESS names another address.\n")
    assert "Traceback" not in ended.errors


class SilentGateway(grpc.GenericRpcHandler):
    """Takes every call and answers none."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def hold(request: bytes, context: Any) -> None:
            await asyncio.Event().wait()

        return grpc.unary_unary_rpc_method_handler(hold)


@pytest.mark.parametrize("command", [("submit", "{}"), ("cancel", "llmjob-a-b")], ids=lambda command: command[0])
async def test_an_example_gives_a_gateway_up_that_does_not_answer(
    client: Sequence[str], command: Sequence[str]
) -> None:
    if of_python(client):
        pytest.skip("the library has the deadline")
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([SilentGateway()])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        async with asyncio.timeout(60):
            ended = await run(*client, *command, LLM_ADDRESS=address, LLM_TIMEOUT_SECONDS="1")
    finally:
        await server.stop(None)
    assert ended.status == 1
    assert ended.errors.startswith("DEADLINE_EXCEEDED: ")


@pytest.mark.parametrize("send", [interrupt, interrupt_another_thread])
async def test_the_python_example_is_interrupted_without_a_traceback(
    stack: Stack, stub: LlmServiceStub, send: Callable[[int], None]
) -> None:
    response = await stub.Submit(llm_pb2.SubmitRequest(job=new_job(model="idle")))
    command = (sys.executable, "-m", "clients.python.examples.client", "watch", response.workflow_id)
    watching = await start(*command, LLM_ADDRESS=stack.address("gateway"))
    assert watching.stderr is not None
    await watching.stderr.readline()
    send(watching.pid)
    _, errors = await watching.communicate()
    assert watching.returncode == 130
    assert b"Traceback" not in errors
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=response.workflow_id))


async def test_an_example_outlives_its_gateway(client: Sequence[str], stack: Stack, stub: LlmServiceStub) -> None:
    """When the gateway is killed and started again, a watcher prints every byte once."""
    gateway = stack.add("gateway")
    await gateway.start()
    await gateway.wait_ready()
    # Long enough that on a busy machine, too, it runs when the gateway is killed.
    text = job(client, "killed", params={"max_tokens": 2000})
    # Another gateway runs the workflow: the death of its own would delay it until a timeout of Temporal.
    submitted = await run(*client, "submit", text, LLM_ADDRESS=stack.address("gateway"))
    workflow_id = submitted.output.strip()
    watching = await start(*client, "watch", workflow_id, LLM_ADDRESS=stack.address(gateway.name))
    assert watching.stdout is not None
    first = await watching.stdout.read(1)
    await gateway.kill()
    await gateway.start()
    rest, errors = await watching.communicate()
    assert watching.returncode == 0, errors
    assert b"going on at byte" in errors
    look = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=workflow_id))
    assert (first + rest).decode() == look.result.output
    await gateway.terminate()


async def test_an_example_waits_as_long_as_the_gateway_asks_for(client: Sequence[str], stack: Stack) -> None:
    """A gateway that has no place for one more watcher has answered: its address is not wrong."""
    submitted = await run(*client, "submit", job(client, "asked"), LLM_ADDRESS=stack.address("gateway"))
    asked = Turn(messages=0, full=True, retry_delay=timedelta(seconds=2))
    # The wait of the library gets longer with each failure, and has no limit of tries.
    again = [asked._replace(retry_delay=timedelta(milliseconds=1))] * (0 if of_python(client) else 5)
    async with serving(stack, asked, *again, Turn(fails=False)) as gateway:
        began = time.monotonic()
        watched = await run(*client, "watch", submitted.output.strip(), LLM_ADDRESS=gateway.address)
    assert watched.status == 0, watched.errors
    assert time.monotonic() - began >= 2
    assert gateway.streams == 1 + len(again) + 1


async def test_an_example_goes_on_after_a_stream_that_ends_before_its_job(
    client: Sequence[str], stack: Stack, stub: LlmServiceStub
) -> None:
    """Status OK is no job's end. A stream that falls silent is opened again as well."""
    submitted = await run(*client, "submit", job(client, "early"), LLM_ADDRESS=stack.address("gateway"))
    workflow_id = submitted.output.strip()
    turns = [Turn(messages=0, fails=False), Turn(messages=1, fails=False)]
    environment = {}
    if not of_python(client):
        turns.append(Turn(messages=0, silent=True))
        environment |= {"LLM_IDLE_SECONDS": "2", "LLM_STREAM_SECONDS": "2"}
    async with serving(stack, *turns, Turn(fails=False)) as gateway:
        watched = await run(*client, "watch", workflow_id, LLM_ADDRESS=gateway.address, **environment)
    assert watched.status == 0, watched.errors
    assert gateway.streams >= len(turns) + 1
    look = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=workflow_id))
    assert watched.output == look.result.output != ""


@pytest.mark.long
async def test_an_example_watches_a_job_that_is_silent_for_hours(
    client: Sequence[str], stack: Stack, stub: LlmServiceStub
) -> None:
    """Each stream brings the status, and nothing more until its time is up."""
    if of_python(client):
        pytest.skip("the library has the deadline")
    response = await stub.Submit(llm_pb2.SubmitRequest(job=new_job(model="idle")))
    silent = [Turn(messages=1, silent=True)] * 61
    async with serving(stack, *silent, Turn(fails=False)) as gateway:
        limits = {"LLM_IDLE_SECONDS": "0.3", "LLM_STREAM_SECONDS": "0.3"}
        watching = await start(*client, "watch", response.workflow_id, LLM_ADDRESS=gateway.address, **limits)
        async with asyncio.timeout(120):
            while gateway.streams <= len(silent) and watching.returncode is None:  # noqa: ASYNC110  nothing notifies
                await asyncio.sleep(0.1)
        await stub.Cancel(llm_pb2.CancelRequest(workflow_id=response.workflow_id, reason="not needed"))
        _, errors = await watching.communicate()
    assert errors.endswith(b"not needed\n"), errors


async def test_an_example_goes_on_after_a_stream_that_a_proxy_resets(
    client: Sequence[str], stack: Stack, stub: LlmServiceStub
) -> None:
    """gRPC reports it as INTERNAL without details."""
    submitted = await run(*client, "submit", job(client, "reset"), LLM_ADDRESS=stack.address("gateway"))
    workflow_id = submitted.output.strip()
    turns = Turn(messages=0, reset=True), Turn(messages=1, reset=True), Turn(fails=False)
    async with serving(stack, *turns) as gateway:
        watched = await run(*client, "watch", workflow_id, LLM_ADDRESS=gateway.address)
    assert watched.status == 0, watched.errors
    assert gateway.streams == len(turns)
    look = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=workflow_id))
    assert watched.output == look.result.output != ""


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        (Turn(messages=1, retry_delay=timedelta(milliseconds=1)), b"UNAVAILABLE: the connection broke"),
        (Turn(messages=0, full=True, retry_delay=timedelta(milliseconds=1)), b"RESOURCE_EXHAUSTED: too many watchers"),
    ],
    ids=["broken", "full"],
)
async def test_an_example_gives_a_stream_up_that_brings_nothing_new(
    client: Sequence[str], stack: Stack, stub: LlmServiceStub, turn: Turn, says: bytes
) -> None:
    """Each stream repeats the status and breaks, or is refused. The short RetryInfo spares the test the waits."""
    if of_python(client):
        pytest.skip("the library has no limit of tries")
    response = await stub.Submit(llm_pb2.SubmitRequest(job=new_job(model="idle")))
    async with serving(stack, turn) as gateway:
        watching = await start(*client, "watch", response.workflow_id, LLM_ADDRESS=gateway.address)
        try:
            async with asyncio.timeout(120):
                _, errors = await watching.communicate()
        finally:
            if watching.returncode is None:
                watching.kill()
                await watching.communicate()
    assert watching.returncode == 1
    assert says in errors
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=response.workflow_id))


async def call(stack: Stack, method: str, request: dict[str, Any]) -> list[Any]:
    """Call a method with `buf curl`, which reads the contract by reflection, and return the responses."""
    url = f"http://{stack.address('gateway')}/llm.v1.LlmService/{method}"
    options = ("--protocol", "grpc", "--http2-prior-knowledge")
    ended = await run(tool("buf"), "curl", *options, "--data", json.dumps(request), url)
    assert ended.status == 0, ended.errors
    return list(json_values(ended.output))


def json_values(text: str) -> list[Any]:
    """Return the concatenated JSON values of a text."""
    values, decoder = [], json.JSONDecoder()
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        values.append(value)
        text = text[end:]
    return values


async def test_buf_submits_and_streams_a_job(stack: Stack) -> None:
    """It needs only reflection."""
    (submitted,) = await call(stack, "Submit", {"job": {**SPECIFIED, "request_id": "buf-whole"}})
    messages = await call(stack, "StreamStatus", {"workflow_id": submitted["workflowId"]})
    output = "".join(message["delta"]["text"] for message in messages if "delta" in message)
    assert messages[-1]["status"]["state"] == "JOB_STATE_SUCCEEDED"
    assert messages[-1]["result"]["output"] == output != ""


async def test_buf_cancels_a_job(stack: Stack, stub: LlmServiceStub) -> None:
    """It sees the reason of the end."""
    submitted_job = {**SPECIFIED, "request_id": "buf-cancelled", "params": {"max_tokens": 4000}}
    (submitted,) = await call(stack, "Submit", {"job": submitted_job})
    named = {"workflow_id": submitted["workflowId"]}
    await until_output(stub, submitted["workflowId"])
    (cancelled,) = await call(stack, "Cancel", {**named, "reason": "not needed"})
    assert cancelled["status"]["cancelRequested"]
    *_, last = await call(stack, "StreamStatus", named)
    assert last["status"]["state"] == "JOB_STATE_CANCELLED"
    assert last["status"]["error"]["message"] == "not needed"
    # Reflection describes the types of the error's details, too.
    assert last["status"]["error"]["details"][0]["reason"] == "CANCELLED"


async def test_buf_lists_jobs_and_models(stack: Stack) -> None:
    """These calls need only reflection as well."""
    (models,) = await call(stack, "ListModels", {})
    assert models["models"][0]["name"] == "docstrings"
    await call(stack, "List", {"userId": "user-123"})
    (look,) = await call(stack, "GetStatus", {"workflow_id": "llmjob-user--123-buf-whole"})
    assert look["status"]["state"] == "JOB_STATE_SUCCEEDED"


@pytest.mark.parametrize("version", ["grpc-v1", "grpc-v1alpha"])
async def test_buf_reflects_by_either_version(stack: Stack, version: str) -> None:
    """Newer clients ask for v1. Older ones know only v1alpha."""
    url = f"http://{stack.address('gateway')}"
    options = ("--protocol", "grpc", "--http2-prior-knowledge", "--reflect-protocol", version)
    ended = await run(tool("buf"), "curl", *options, "--list-methods", url)
    assert "llm.v1.LlmService/Submit" in ended.output, ended.errors


async def test_third_party_holds_what_error_details_need(stub: LlmServiceStub, tmp_path: Path) -> None:
    """A client with only the proto files of this repository can read the details of an error."""
    folder, out = ROOT / "third_party" / "googleapis", tmp_path / "descriptors"
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.proto"))
    compiled = await run(
        *(sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}", "--include_imports", f"-o{out}", *files)
    )
    assert compiled.status == 0, compiled.errors
    messages = GetMessages(FileDescriptorSet.FromString(out.read_bytes()).file)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.Submit(llm_pb2.SubmitRequest(job=new_job(priority=9)))
    trailers = dict(error.value.trailing_metadata() or ())
    status = messages["google.rpc.Status"].FromString(trailers["grpc-status-details-bin"])
    details = {}
    for packed in status.details:  # type: ignore[attr-defined]
        name = packed.type_url.rpartition("/")[2]
        details[name] = messages[name].FromString(packed.value)
    assert details["google.rpc.BadRequest"].field_violations[0].field == "job.priority"
    assert details["google.rpc.ErrorInfo"].reason == "INVALID_REQUEST"


def test_third_party_is_what_its_package_ships() -> None:
    shipped = Path(rpc_code.__file__).parent
    for file in (ROOT / "third_party").rglob("*.proto"):
        assert file.read_text() == (shipped / file.name).read_text()


@pytest.mark.parametrize("place", [0, 1], ids=["new secret", "old secret"])
async def test_a_receiver_in_another_language_verifies_webhooks(stub: LlmServiceStub, place: int) -> None:
    """Standard Webhooks' library for Node.js verifies an event with either active secret, and refuses a forgery."""
    secret = json.loads(FAST["notifier"]["NOTIFIER_WEBHOOK_SECRETS"])[place]
    receiver = await start(*await node_example("receiver.js"), WEBHOOK_SECRET=secret)
    assert receiver.stdout is not None
    assert receiver.stderr is not None
    try:
        port = (await receiver.stderr.readline()).decode().removeprefix("port ").strip()
        url = f"http://127.0.0.1:{port}/"
        forged = {"webhook-id": "a", "webhook-timestamp": str(int(time.time())), "webhook-signature": "v1,AAAA"}
        async with aiohttp.ClientSession() as session, session.post(url, data="{}", headers=forged) as answer:
            assert answer.status == 400
        notify_options = llm_pb2.NotifyOptions(include_output=True)
        seen = await run_job(stub, new_job(notify=webhook(url), notify_options=notify_options))
        assert not seen.output.isascii(), "the test needs text whose bytes a receiver could change"
        event = json.loads(await receiver.stdout.readline())
        assert event["data"]["result"]["output"] == seen.final.result.output
        assert seen.final.status.notifications[0].state == llm_pb2.NOTIFY_STATE_DELIVERED
    finally:
        receiver.kill()
        await receiver.communicate()
