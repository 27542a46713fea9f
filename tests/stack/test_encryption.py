"""Encryption at rest, on stacks of real processes: what is nowhere in clear, and what goes on working."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import nats
import pytest
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowFailureError, WorkflowHistory
from temporalio.worker import Replayer

from deploy.local.stack import Stack
from jobs import names
from llm_pb import internal_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from payload_converter import data_converter
from payload_converter.encryption import encrypting
from tests.contract.test_replay import SANDBOX
from tests.support.encryption import SERVICES, Keys
from tests.support.jobs import details_of, new_job, run_job, unpack, until_output, watch, webhook
from tests.support.otlp import Collector
from tests.support.receivers import receiving, status
from tests.support.stacks import FAST, stack_settings, temporal_cli
from workflows.llm_delivery import LLMDeliveryWorkflow
from workflows.llm_job import LLMJobWorkflow

MARKER = "xyzzymarker"
"""Part of prompts, outputs and errors, and of nothing else."""
MODELS = """[{"name": "docstrings", "context_tokens": 8192, "max_output_tokens": 8192, "default_max_tokens": 64,
    "structured_output": true}]"""
LONG = {"max_tokens": 4000}


@asynccontextmanager
async def running(folder: Path, extra: Mapping[str, Mapping[str, str]]) -> AsyncIterator[tuple[Stack, LlmServiceStub]]:
    """Run a stack and yield it with a client of its gateway, which survives the gateway's restarts."""
    kinds = {*SERVICES, *FAST, *extra}
    environment = {kind: {**FAST.get(kind, {}), **extra.get(kind, {})} for kind in kinds}
    environment["gateway"]["GATEWAY_MODELS"] = MODELS
    async with (
        Stack(stack_settings(folder), environment=environment) as stack,
        grpc.aio.insecure_channel(stack.address("gateway"), [("grpc.max_reconnect_backoff_ms", 500)]) as channel,
    ):
        yield stack, LlmServiceStub(channel)


async def restart(stack: Stack, kind: str, **environment: str) -> None:
    process = stack.processes[kind]
    await process.terminate()
    process.environment |= environment
    await process.start()
    await process.wait_ready()


async def submit(stub: LlmServiceStub, prompt: str, **changes: object) -> str:
    request = llm_pb2.SubmitRequest(job=new_job(prompt, **changes))
    return (await stub.Submit(request, timeout=60, wait_for_ready=True)).workflow_id


async def history_of(stack: Stack, workflow_id: str) -> WorkflowHistory:
    """Return a history as Temporal has it."""
    client = await Client.connect(stack.address("temporal"), data_converter=data_converter)
    return await client.get_workflow_handle(workflow_id).fetch_history()


async def status_of(stub: LlmServiceStub, workflow_id: str) -> llm_pb2.GetStatusResponse:
    request = llm_pb2.GetStatusRequest(workflow_id=workflow_id)
    return await stub.GetStatus(request, timeout=60, wait_for_ready=True)


def holds(folder: Path, needle: str) -> bool:
    return any(needle.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("encrypted", [False, True], ids=["in clear", "encrypted"])
async def test_what_users_write_is_nowhere_in_clear(tmp_path: Path, encrypted: bool) -> None:
    """Neither in histories nor on a disk, nor in logs and spans. Without encryption the same search finds it."""
    keys = Keys(tmp_path)
    converter = encrypting(keys.encryption()) if encrypted else data_converter
    async with Collector() as collector, receiving() as receiver:
        extra = {kind: {**collector.environment} for kind in SERVICES}
        for kind, more in (keys.for_services() if encrypted else {}).items():
            extra[kind] |= more
        async with running(tmp_path / "stack", extra) as (stack, stub):
            temporal = await Client.connect(stack.address("temporal"), data_converter=converter)
            hook = webhook(receiver.on("/hook", status(503), status(200)))
            told = llm_pb2.NotifyOptions(include_output=True)
            choice = {"choice": {"options": [f"{MARKER} said so"]}}
            succeeded = await run_job(stub, new_job(MARKER, params=choice, notify=hook, notify_options=told))
            assert MARKER in succeeded.output.decode()
            (_, delivered) = await receiver.received("/hook", 2)
            assert MARKER in delivered.body.decode(), "a receiver gets what it is meant to get"
            failed = await run_job(stub, new_job(f"{MARKER} [[fault:failed@3]]", params={"max_tokens": 20}))
            assert "the engine failed" in failed.final.status.error.message
            cancelled = await submit(stub, MARKER, params=LONG)
            await until_output(stub, cancelled)
            await stub.Cancel(llm_pb2.CancelRequest(workflow_id=cancelled, reason=f"reason {MARKER}"))
            assert MARKER in (await watch(stub, cancelled)).final.status.error.message
            await temporal.start_workflow(
                names.JOB_WORKFLOW_TYPE, {MARKER: 1}, id="foreign", task_queue=names.WORKFLOW_QUEUE
            )
            assert MARKER in (await watch(stub, "foreign")).final.status.error.message
            ids = [succeeded.final.status.workflow_id, failed.final.status.workflow_id, cancelled, "foreign"]
            long = await submit(stub, MARKER, params=LONG)
            await until_output(stub, long)
            records = await feed_records(stack, long)
            worker = ""
            while not worker:
                worker = (await status_of(stub, long)).status.progress.worker
            histories = {id_: await history_of(stack, id_) for id_ in [*ids, long]}
            replayer = Replayer(
                workflows=[LLMJobWorkflow, LLMDeliveryWorkflow], data_converter=converter, workflow_runner=SANDBOX
            )
            for id_ in ids[:3]:
                await replayer.replay_workflow(histories[id_])
            shown = await temporal_cli(
                *(stack, "workflow", "show", "--detailed", "--workflow-id", ids[0]),
                *("--codec-endpoint", f"http://{stack.address('codec')}"),
            )
            assert MARKER in shown, "the codec server shows it"
        found = {
            "history": any(
                MARKER.encode() in event.SerializeToString() for each in histories.values() for event in each.events
            ),
            "database": any(MARKER.encode() in path.read_bytes() for path in stack.state_dir.glob("temporal.db*")),
            # A record holds a few characters: what names its worker is in one piece.
            "feed": holds(stack.state_dir / "nats", worker) or any(not item.HasField("encrypted") for item in records),
        }
        assert found == dict.fromkeys(found, not encrypted)
        spans = [span.raw for span in collector.spans.all if MARKER.encode() in span.raw.SerializeToString()]
        assert bool(spans) != encrypted, "in clear they hold what errors say"
        logs = stack.state_dir / "logs"
        assert [line for path in logs.iterdir() for line in path.read_text().splitlines() if MARKER in line] == []


async def feed_records(stack: Stack, workflow_id: str) -> list[internal_pb2.FeedRecord]:
    """Return what the broker stores of a running job."""
    run_id = (await history_of(stack, workflow_id)).run_id
    client = await nats.connect(f"nats://{stack.address('nats')}")
    subscription = await client.jetstream().subscribe(f"llm.feed.{run_id}", ordered_consumer=True)
    messages = [await subscription.next_msg(timeout=60) for _ in range(20)]
    await client.close()
    return [internal_pb2.FeedRecord.FromString(message.data) for message in messages]


async def test_it_is_switched_on_while_jobs_run(tmp_path: Path) -> None:
    """First every service learns to decrypt, then every one encrypts: one after the other, and no job is lost."""
    keys = Keys(tmp_path)
    async with running(tmp_path / "stack", {}) as (stack, stub):
        before = await run_job(stub, new_job("before", params={"max_tokens": 20}))
        through = await submit(stub, "through", params=LONG)
        await until_output(stub, through)
        for changes in ({**keys.environment, "ENCRYPTION_WRITE": "false"}, {"ENCRYPTION_WRITE": "true"}):
            for kind in ("gateway", "gpu-worker", "notifier"):
                await restart(stack, kind, **changes)
        during = await submit(stub, "during", params={"max_tokens": 20})
        assert (await watch(stub, during)).states[-1] == "SUCCEEDED"
        seen = await watch(stub, through)
        assert (seen.states[-1], seen.rewinds) == ("SUCCEEDED", 0)
        assert seen.final.result.metadata.output_tokens == LONG["max_tokens"]
        answer = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=before.final.status.workflow_id))
        assert answer.result.output == before.final.result.output
        history = await history_of(stack, through)
        encodings = {word for event in history.events for word in encodings_of(event.SerializeToString())}
        assert encodings == {"clear", "encrypted"}
        converter = encrypting(keys.encryption())
        replayer = Replayer(workflows=[LLMJobWorkflow], data_converter=converter, workflow_runner=SANDBOX)
        for id_ in (before.final.status.workflow_id, through, during):
            await replayer.replay_workflow(await history_of(stack, id_))


def encodings_of(data: bytes) -> set[str]:
    return {kind for kind, word in (("clear", b"binary/protobuf"), ("encrypted", b"binary/encrypted")) if word in data}


@pytest.fixture(scope="module")
async def encrypted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Stack, LlmServiceStub, Keys]]:
    """A stack that encrypts; its key is old enough to be deleted."""
    folder = tmp_path_factory.mktemp("encrypted")
    keys = Keys(folder)
    await keys.age()
    async with running(folder / "stack", keys.for_services()) as (stack, stub):
        yield stack, stub, keys


Encrypted = tuple[Stack, LlmServiceStub, Keys]


async def test_the_error_of_an_attempt_is_shown_while_the_next_one_waits(encrypted: Encrypted) -> None:
    """It is in what Temporal describes of a pending activity, and not in the history yet."""
    _, stub, _ = encrypted
    seen = await run_job(stub, new_job("[[fault:failed@3:once]]", params={"max_tokens": 200}))
    errors = {message.status.error.message for message in seen.messages if message.status.HasField("error")}
    assert errors <= {"scripted: the engine failed on this job"}
    assert seen.states[-1] == "SUCCEEDED"
    job = await submit(stub, "[[fault:failed@3]]", params={"max_tokens": 20})
    async with asyncio.timeout(60):
        answer = await status_of(stub, job)
        while not answer.status.HasField("error"):
            answer = await status_of(stub, job)
    assert answer.status.error.message == "scripted: the engine failed on this job"
    assert unpack(answer.status.error)["ErrorInfo"].reason == "ENGINE_FAILED"


async def test_a_key_encryption_key_is_turned_while_jobs_run(encrypted: Encrypted) -> None:
    stack, stub, keys = encrypted
    before = await run_job(stub, new_job("before", params={"max_tokens": 20}))
    through = await submit(stub, "through", params={"max_tokens": 1000})
    await until_output(stub, through)
    keys.keyring.turn()
    for kind in ("gateway", "gpu-worker"):
        await restart(stack, kind)
    seen = await watch(stub, through)
    assert (seen.states[-1], seen.rewinds) == ("SUCCEEDED", 0)
    answer = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=before.final.status.workflow_id))
    assert answer.result.output == before.final.result.output


async def test_deleted_keys_make_jobs_unreadable_and_end_those_that_run(encrypted: Encrypted) -> None:
    """With a clear error, and no task that is repeated for ever. What is submitted afterwards has a new key."""
    stack, stub, keys = encrypted
    job = new_job("ended", params={"max_tokens": 20})
    ended = (await run_job(stub, job)).final.status.workflow_id
    open_ = await submit(stub, "open", params={"max_tokens": 8000})
    await until_output(stub, open_)
    keys.store.delete("")
    # A gateway that has the workflow in memory would go on with what it has decrypted.
    await restart(stack, "gateway")
    temporal = await Client.connect(stack.address("temporal"), data_converter=data_converter)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await status_of(stub, ended)
    assert error.value.code() == grpc.StatusCode.DATA_LOSS
    assert details_of(error.value)["ErrorInfo"].reason == "CONTENT_UNREADABLE"
    assert "it was deleted" in (error.value.details() or "")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await watch(stub, ended)
    assert error.value.code() == grpc.StatusCode.DATA_LOSS
    listed = await stub.List(llm_pb2.ListRequest(user_id=job.user_id))
    assert [item.status.state for item in listed.jobs] == [llm_pb2.JOB_STATE_SUCCEEDED]
    await temporal.get_workflow_handle(open_).signal(names.SIGNAL_CANCEL, llm_pb2.CancelRequest())
    handle = temporal.get_workflow_handle(open_)
    with pytest.raises(WorkflowFailureError):
        await asyncio.wait_for(handle.result(), 120)
    assert (await handle.describe()).status == WorkflowExecutionStatus.TERMINATED
    assert (await run_job(stub, new_job("new", params={"max_tokens": 20}))).states[-1] == "SUCCEEDED"
