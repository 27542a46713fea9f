"""Encryption at rest, on stacks of real processes: what is nowhere in clear, and what goes on working."""

import asyncio
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import nats
import pytest
from google.protobuf import json_format
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowFailureError, WorkflowHistory
from temporalio.worker import Replayer

from deploy.local.process import Process
from deploy.local.stack import Stack
from encryption import DataKeys, is_hash
from encryption.key_store import KeyStore
from jobs import names
from llm_pb import internal_pb2, llm_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from payload_converter import data_converter
from payload_converter.encryption import encrypting
from tests.contract.test_replay import SANDBOX
from tests.stack.test_readiness import ask_until
from tests.support.batches import Stubs
from tests.support.encryption import SERVICES, Keys
from tests.support.files import refusal
from tests.support.jobs import details_of, new_job, run_job, unpack, until_output, watch, webhook
from tests.support.marked import reads, write_marked
from tests.support.otlp import Collector
from tests.support.pipelines import WITH_PIPELINES, cancel, get
from tests.support.receivers import receiving, status
from tests.support.stacks import stack_settings, temporal_cli
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
    kinds = {*SERVICES, *WITH_PIPELINES, *extra}
    environment = {kind: {**WITH_PIPELINES.get(kind, {}), **extra.get(kind, {})} for kind in kinds}
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
    """Neither in histories nor on a disk, nor in logs and spans. Without encryption the same search finds it.

    They write jobs, files, batches, schedules and pipelines.
    """
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
            async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
                marked = await write_marked(channel, MARKER)
            ids = [succeeded.final.status.workflow_id, failed.final.status.workflow_id, cancelled, "foreign"]
            long = await submit(stub, MARKER, params=LONG)
            await until_output(stub, long)
            records = await feed_records(stack, long)
            worker = ""
            while not worker:
                worker = (await status_of(stub, long)).status.progress.worker
            histories = {id_: await history_of(stack, id_) for id_ in [*ids, long, *marked.workflows]}
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
            **{
                id_: any(MARKER.encode() in event.SerializeToString() for event in history.events)
                for id_, history in histories.items()
            },
            "store": holds(stack.state_dir / "store", MARKER),
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
        first = new_job("before", params={"max_tokens": 20})
        before = await run_job(stub, first)
        through = await submit(stub, "through", params=LONG)
        await until_output(stub, through)
        for changes in ({**keys.environment, "ENCRYPTION_WRITE": "false"}, {"ENCRYPTION_WRITE": "true"}):
            for kind in ("gateway", "gpu-worker", "notifier"):
                await restart(stack, kind, **changes)
        labelled = new_job("during", params={"max_tokens": 20}, labels={"kept": "and shown"})
        during = (await stub.Submit(llm_pb2.SubmitRequest(job=labelled), timeout=60, wait_for_ready=True)).workflow_id
        assert (await watch(stub, during)).states[-1] == "SUCCEEDED"
        seen = await watch(stub, through)
        assert (seen.states[-1], seen.rewinds) == ("SUCCEEDED", 0)
        assert seen.final.result.metadata.output_tokens == LONG["max_tokens"]
        for job, id_ in ((first, before.final.status.workflow_id), (labelled, during)):
            found = await stub.GetJob(llm_pb2.GetJobRequest(workflow_id=id_))
            assert found.job == job
            assert found.result.output
        assert found.status == (await status_of(stub, during)).status
        assert (await listed(stub, {during}, user_id=labelled.user_id))[during].labels == labelled.labels
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


async def test_search_attributes_are_hashed_and_still_found(tmp_path: Path) -> None:
    """Switched on in a running installation: a filter finds the jobs of before, too. List reads the memo."""
    keys = Keys(tmp_path)
    user, project = f"user-{MARKER}", f"project-{MARKER}"
    async with running(tmp_path / "stack", keys.for_services()) as (stack, stub):
        named = {"user_id": user, "project_id": project, "params": {"max_tokens": 5}}
        clear = (await run_job(stub, new_job("clear", **named))).final.status.workflow_id
        await restart(stack, "gateway", ENCRYPTION_SEARCH_ATTRIBUTES="hashed")
        job = new_job("hashed", **named)
        hashed = (await run_job(stub, job)).final.status.workflow_id
        assert (await submit(stub, "hashed", **named, request_id=job.request_id)) == hashed, "the same job"
        for filters in ({"user_id": user}, {"project_id": project}, {"user_id": user, "project_id": project}):
            found = await listed(stub, {clear, hashed}, **filters)
            assert {(item.user_id, item.project_id, item.model) for item in found.values()} == {
                (user, project, "docstrings")
            }
            assert found[hashed].request_id == job.request_id
        temporal = await Client.connect(stack.address("temporal"), data_converter=data_converter)
        for id_, are_hashes in ((clear, False), (hashed, True)):
            values = (await temporal.get_workflow_handle(id_).describe()).typed_search_attributes
            keys_ = (names.USER_ID, names.REQUEST_ID, names.PROJECT_ID)
            assert [is_hash(values[key]) for key in keys_] == [are_hashes] * 3
            assert values[names.MODEL] == "docstrings"
        started = (await history_of(stack, hashed)).events[0].workflow_execution_started_event_attributes
        assert MARKER not in started.priority.fairness_key
        assert MARKER not in str(started.search_attributes)
        await restart(stack, "gateway", ENCRYPTION_SEARCH_ATTRIBUTES="clear")
        await listed(stub, {clear, hashed}, user_id=user)
        keys.store.delete("")
        await restart(stack, "gateway")
        found = await listed(stub, {clear, hashed})
        assert (found[clear].user_id, found[hashed].user_id, found[hashed].request_id) == (user, "", "")
        assert found[hashed].status.state == llm_pb2.JOB_STATE_SUCCEEDED


async def listed(stub: LlmServiceStub, ids: set[str], **filters: str) -> dict[str, llm_pb2.JobSummary]:
    """Return the listed jobs by id, once all of `ids` are listed."""
    async with asyncio.timeout(60):
        while True:
            answer = await stub.List(llm_pb2.ListRequest(**filters), timeout=60, wait_for_ready=True)
            found = {item.status.workflow_id: item for item in answer.jobs}
            if ids <= found.keys():
                return found
            await asyncio.sleep(0.2)


async def test_a_worker_without_keys_takes_no_job(tmp_path: Path) -> None:
    """The job waits for the keys, and goes on where it was. The gateway, which has them in memory, serves meanwhile."""
    keys = Keys(tmp_path)
    async with running(tmp_path / "stack", keys.for_services()) as (stack, stub):
        job = await submit(stub, "waits", params={"max_tokens": 2000})
        await until_output(stub, job)
        worker = stack.processes["gpu-worker"]
        # It hands the job over. After a kill the next attempt would wait for the heartbeat timeout.
        await worker.terminate()
        ring, keys.ring = keys.ring, ""
        await worker.start()
        watching = asyncio.create_task(watch(stub, job))
        await ask_until(stack, "gpu-worker", lambda answer: "keys" in answer.body["degraded"])
        state = (await status_of(stub, job)).status.state
        assert state in (llm_pb2.JOB_STATE_QUEUED, llm_pb2.JOB_STATE_RUNNING)
        assert not watching.done()
        keys.ring = ring
        seen = await watching
        assert (seen.states[-1], seen.rewinds) == ("SUCCEEDED", 0)
        assert seen.final.result.metadata.output_tokens == 2000


@pytest.mark.parametrize("kind", ["gpu-worker", "gateway"])
async def test_a_service_without_keys_beside_others_is_not_ready_and_takes_no_job(
    encrypted: "Encrypted", kind: str
) -> None:
    """It would fail each job that it takes. Temporal lists an open job in clear before those that have ended."""
    stack, stub, _ = encrypted
    client = await Client.connect(stack.address("temporal"), data_converter=data_converter)
    clear = await client.start_workflow(names.JOB_WORKFLOW_TYPE, id=f"clear-{kind}", task_queue="nobody")
    await run_job(stub, new_job(params={"max_tokens": 2}))
    process = stack.add(kind)
    for name in ("ENCRYPTION_KEY_STORE", "ENCRYPTION_KEYRING"):
        del process.environment[name]
    await process.start()
    try:
        await takes_no_job(stack, stub, process.name, "set ENCRYPTION_KEY_STORE")
    finally:
        await process.terminate()
        await clear.terminate()


async def takes_no_job(stack: Stack, stub: LlmServiceStub, name: str, says: str) -> None:
    """Check that a process is not ready and says why, and that others do what is submitted."""
    answer = await ask_until(stack, name, lambda answer: "keys" in answer.body["missing"])
    assert says in answer.body["missing"]["keys"]
    seen = await asyncio.gather(*(run_job(stub, new_job(params={"max_tokens": 2})) for _ in range(20)))
    assert {one.states[-1] for one in seen} == {"SUCCEEDED"}
    assert {one.final.result.metadata.attempts for one in seen} == {1}


@pytest.mark.parametrize("kind", ["gpu-worker", "gateway", "notifier"])
@pytest.mark.parametrize("has", ["nothing", "a key of the month", "a key of another tenant"])
async def test_a_service_waits_for_the_key_store_of_the_others(
    encrypted: "Encrypted", tmp_path: Path, kind: str, has: str
) -> None:
    """It would fail each job that it takes, or encrypt with a key that nobody else has. It makes no key meanwhile."""
    stack, stub, keys = encrypted
    await run_job(stub, new_job(params={"max_tokens": 2}))
    store = KeyStore(tmp_path / "other")
    store.create()
    if has != "nothing":
        await DataKeys(store, keys.keyring).current("" if has == "a key of the month" else "acme")
    before = store.slots()
    mounted = tmp_path / "mounted"
    mounted.symlink_to(tmp_path / "other")
    process = stack.add(kind, {"ENCRYPTION_KEY_STORE": str(mounted)})
    await process.start()
    try:
        await takes_no_job(stack, stub, process.name, "those of another key store")
        assert store.slots() == before
        mounted.unlink()
        mounted.symlink_to(keys.folder)
        await process.wait_ready()
    finally:
        await process.terminate()


@asynccontextmanager
async def waiting_notifier(encrypted: "Encrypted", folder: Path) -> AsyncIterator[tuple[Process, KeyStore]]:
    """Run a notifier with a new key store beside the others while the context is open. It waits for theirs."""
    stack, stub, _ = encrypted
    await run_job(stub, new_job(params={"max_tokens": 2}))
    store = KeyStore(folder / "other")
    store.create()
    process = stack.add("notifier", {"ENCRYPTION_KEY_STORE": str(folder / "other")})
    await process.start()
    try:
        await ask_until(stack, process.name, lambda answer: "keys" in answer.body["missing"])
        yield process, store
    finally:
        await process.terminate()


async def test_a_service_goes_on_waiting_while_temporal_does_not_answer(encrypted: "Encrypted", tmp_path: Path) -> None:
    """One call that failed let it go, with a key store that is none of the others'."""
    stack = encrypted[0]
    async with waiting_notifier(encrypted, tmp_path) as (process, store):
        temporal = stack.processes["temporal"]
        temporal.signal(signal.SIGSTOP)
        try:
            await ask_until(stack, process.name, lambda answer: "temporal" in answer.body["missing"])
        finally:
            temporal.signal(signal.SIGCONT)
        answer = await ask_until(stack, process.name, lambda answer: "temporal" not in answer.body["missing"])
        assert "keys" in answer.body["missing"]
        assert store.slots() == []


async def test_a_service_begins_once_a_lost_key_is_recorded(encrypted: "Encrypted", tmp_path: Path) -> None:
    async with waiting_notifier(encrypted, tmp_path) as (process, store):
        store.give_up((await encrypted[2].data_keys().current("")).key_id)
        await process.wait_ready()


@pytest.fixture(scope="module")
async def encrypted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Stack, LlmServiceStub, Keys]]:
    """A stack that encrypts."""
    folder = tmp_path_factory.mktemp("encrypted")
    keys = Keys(folder)
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


async def test_a_codec_server_without_a_key_says_so(encrypted: Encrypted) -> None:
    stack, stub, keys = encrypted
    job = (await run_job(stub, new_job(params={"max_tokens": 2}))).final.status.workflow_id
    started = (await history_of(stack, job)).events[0].workflow_execution_started_event_attributes
    ring, keys.ring = keys.ring, ""
    await restart(stack, "codec")
    asked = json_format.MessageToDict(started.input)
    async with httpx.AsyncClient(base_url=f"http://{stack.address('codec')}", trust_env=False, timeout=60) as client:
        # Before anybody asks for a key.
        await ask_until(stack, "codec", lambda answer: "keys" in answer.body["degraded"])
        assert (await client.post("/decode", json=asked)).json() == asked
        keys.ring = ring
        async with asyncio.timeout(60):
            while (await client.post("/decode", json=asked)).json() == asked:  # noqa: ASYNC110
                await asyncio.sleep(0.2)


async def until_unreadable(stack: Stack, pipeline_id: str) -> None:
    """Return once an open pipeline was terminated. Meanwhile its gateway may ask to call again."""
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel, asyncio.timeout(120):
        stub: Any = PipelineServiceStub(channel)
        while True:
            code, reason = await refusal(get(stub, pipeline_id))
            if code == "DATA_LOSS":
                assert reason == "CONTENT_UNREADABLE"
                return
            assert code == "UNAVAILABLE"
            await asyncio.sleep(0.2)


async def test_deleted_keys_make_jobs_unreadable_and_end_those_that_run(encrypted: Encrypted) -> None:
    """With a clear error, and no task that is repeated for ever. What is submitted afterwards has a new key."""
    stack, stub, keys = encrypted
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        marked = await write_marked(channel, "ended")
    job = new_job("ended", params={"max_tokens": 20}, labels={"kept": "until then"})
    ended = (await run_job(stub, job)).final.status.workflow_id
    open_ = await submit(stub, "open", params={"max_tokens": 8000})
    await until_output(stub, open_)
    keys.store.delete("")
    # A gateway that has the workflow in memory would go on with what it has decrypted.
    await restart(stack, "gateway")
    temporal = await Client.connect(stack.address("temporal"), data_converter=data_converter)
    of_job = stub.GetJob(llm_pb2.GetJobRequest(workflow_id=ended), timeout=60, wait_for_ready=True)
    for call in (status_of(stub, ended), of_job):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        assert error.value.code() == grpc.StatusCode.DATA_LOSS
        assert details_of(error.value)["ErrorInfo"].reason == "CONTENT_UNREADABLE"
        assert "was deleted" in (error.value.details() or "")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await watch(stub, ended)
    assert error.value.code() == grpc.StatusCode.DATA_LOSS
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        for method, read in reads(channel, marked).items():
            with pytest.raises(grpc.aio.AioRpcError) as error:
                pytest.fail(f"{method} answers {await read}")
            assert error.value.code() == grpc.StatusCode.DATA_LOSS, method
            assert details_of(error.value)["ErrorInfo"].reason == "CONTENT_UNREADABLE"
        # As Cancel of an ended job: the id, the state and the times are in clear.
        batch = await Stubs(FileServiceStub(channel), BatchServiceStub(channel)).cancel(marked.batch.batch_id)
        assert (batch.batch_id, batch.state) == (marked.batch.batch_id, marked.batch.state)
        pipeline = await cancel(PipelineServiceStub(channel), marked.pipeline)
        assert (pipeline.pipeline_id, pipeline.state) == (marked.pipeline, llm_pb2.JOB_STATE_FAILED)
        for of_ended in (batch, pipeline.root):
            assert of_ended.HasField("end_time")
        assert (batch.cancel_requested, pipeline.cancel_requested) == (False, False)
    await until_unreadable(stack, marked.waiting)
    listed = await stub.List(llm_pb2.ListRequest(user_id=job.user_id))
    assert [item.status.state for item in listed.jobs] == [llm_pb2.JOB_STATE_SUCCEEDED]
    assert not listed.jobs[0].labels
    cancelled = await stub.Cancel(llm_pb2.CancelRequest(workflow_id=open_), timeout=60)
    assert cancelled.status.workflow_id == open_
    handle = temporal.get_workflow_handle(open_)
    with pytest.raises(WorkflowFailureError):
        await asyncio.wait_for(handle.result(), 120)
    assert (await handle.describe()).status == WorkflowExecutionStatus.TERMINATED
    assert (await run_job(stub, new_job("new", params={"max_tokens": 20}))).states[-1] == "SUCCEEDED"
