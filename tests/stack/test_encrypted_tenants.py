"""Two tenants with keys of their own, on real stacks: nothing is in clear, and the end of one is not that of the other.

Their users and requests have the same names.
"""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from temporalio.api.common.v1 import Payload
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowFailureError, WorkflowHistory

from deploy.local.stack import Stack
from encryption import is_hash
from jobs import names
from jobs.ids import delivery_workflow_id, ledger_workflow_id
from llm_pb import file_pb2, llm_pb2, schedule_pb2
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.schedule_pb2_grpc import ScheduleServiceStub
from payload_converter import PayloadError, data_converter
from payload_converter.encryption import EncryptingCodec, encrypted_for
from runtime.scopes import SCOPES
from tests.stack.test_encryption import LONG, feed_records, history_of, holds, restart, running, status_of
from tests.stack.test_readiness import ask_until
from tests.support.credentials import CallsAs, KeyFile
from tests.support.encryption import Keys
from tests.support.files import download, new_file, refusal, upload
from tests.support.jobs import details_of, new_job, run_job, until_output, watch, webhook
from tests.support.otlp import Collector
from tests.support.receivers import receiving, status
from tests.support.schedules import new_schedule

TENANTS = ("acme", "globex")
MARKERS = {"acme": "xyzzyofacme", "globex": "plughofglobex"}
QUOTAS = json.dumps({tenant: {"max_open_jobs": 20} for tenant in TENANTS})
PATIENCE = 120
pytestmark = pytest.mark.timeout(600)


@dataclass
class Tenant:
    """A tenant's clients: for all of its users, and for alice alone."""

    name: str
    stub: Any
    alice: Any

    @property
    def marker(self) -> str:
        return MARKERS[self.name]

    async def submit(self, prompt: str, **changes: Any) -> str:
        request = llm_pb2.SubmitRequest(job=new_job(prompt, **changes))
        response: llm_pb2.SubmitResponse = await self.stub.Submit(request, timeout=60, wait_for_ready=True)
        return response.workflow_id

    async def listed(self, stub: Any, ids: set[str], **filters: str) -> dict[str, llm_pb2.JobSummary]:
        """Return the jobs that are listed, once all of `ids` are."""
        async with asyncio.timeout(PATIENCE):
            while True:
                answer = await stub.List(llm_pb2.ListRequest(**filters), timeout=60, wait_for_ready=True)
                found = {item.status.workflow_id: item for item in answer.jobs}
                if ids <= found.keys():
                    return found
                await asyncio.sleep(0.2)


@asynccontextmanager
async def installation(
    folder: Path, extra: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[Stack, Keys, dict[str, Tenant]]]:
    """Run a stack that encrypts and hashes, for two tenants with quotas."""
    keys, file = Keys(folder), KeyFile(folder / "keys.json")
    services = {kind: {**more, **(extra or {})} for kind, more in keys.for_services().items()}
    services["gateway"] |= {
        "GATEWAY_API_KEYS_FILE": str(file.path),
        "GATEWAY_TENANTS": QUOTAS,
        "ENCRYPTION_SEARCH_ATTRIBUTES": "hashed",
        # No gateway reads a tenant's keys, by its ledger, unless it is asked something.
        "GATEWAY_OPEN_JOBS_INTERVAL": "PT0S",
    }
    async with (
        running(folder / "stack", services) as (stack, stub),
        grpc.aio.insecure_channel(stack.address("gateway"), [("grpc.max_reconnect_backoff_ms", 500)]) as channel,
    ):
        # No two services have a method of the same name.
        stubs: Any = SimpleNamespace(
            **vars(stub), **vars(FileServiceStub(channel)), **vars(ScheduleServiceStub(channel))
        )

        def of(tenant: str, user_id: str = "") -> Any:
            return CallsAs(stubs, file.add(SCOPES, user_id, tenant=tenant))

        tenants = {name: Tenant(name, of(name), of(name, "alice")) for name in TENANTS}
        await until_known(*tenants.values())
        yield stack, keys, tenants


async def until_known(*tenants: Tenant) -> None:
    """Return once the gateway has read the keys of the callers."""
    async with asyncio.timeout(PATIENCE):
        for stub in [stub for tenant in tenants for stub in (tenant.stub, tenant.alice)]:
            while True:
                try:
                    await stub.ListModels(llm_pb2.ListModelsRequest(), timeout=60, wait_for_ready=True)
                except grpc.aio.AioRpcError as error:
                    if error.code() != grpc.StatusCode.UNAUTHENTICATED:
                        raise
                    await asyncio.sleep(0.1)
                else:
                    break


def payloads_in(message: Message) -> Iterator[Payload]:
    """Yield the payloads anywhere in a message, but those that are never encrypted.

    They are headers, search attributes, and what the SDK records of a local activity and of a patch: names and times.
    """
    if isinstance(message, Payload):
        if b"complete_time" not in message.data and b'"deprecated"' not in message.data:
            yield message
        return
    for field, value in message.ListFields():
        if field.name in ("header", "search_attributes") or field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            values = [one for one in value.values() if isinstance(one, Message)]
        else:
            values = value if field.is_repeated else [value]
        for one in values:
            yield from payloads_in(one)


def payloads_of(history: WorkflowHistory) -> list[Payload]:
    return [payload for event in history.events for payload in payloads_in(event)]


async def test_what_two_tenants_write_is_nowhere_in_clear_and_each_has_its_own_keys(tmp_path: Path) -> None:
    """In histories of jobs, deliveries and ledgers, in the database, the feed, logs and spans. And not under the key
    of the other tenant, or of none."""
    async with Collector() as collector, receiving() as receiver:
        async with installation(tmp_path, collector.environment) as (stack, keys, tenants):
            for tenant in tenants.values():
                marker, user = tenant.marker, {"user_id": "alice"}
                # The receiver takes nothing for as long as the test lasts: the event waits in the notifier's queue.
                hook = webhook(receiver.on(f"/{tenant.name}", status(503)))
                told = llm_pb2.NotifyOptions(include_output=True)
                choice = {"choice": {"options": [f"{marker} said so"]}}
                job = new_job(marker, params=choice, notify=hook, notify_options=told, **user)
                succeeded = await run_job(tenant.stub, job)
                assert marker in succeeded.output.decode()
                failed = await run_job(tenant.stub, new_job(f"{marker} [[fault:failed@3]]", **user))
                assert "the engine failed" in failed.final.status.error.message
                cancelled = await tenant.submit(marker, params=LONG, **user)
                await until_output(tenant.stub, cancelled)
                cancel = llm_pb2.CancelRequest(workflow_id=cancelled, reason=f"reason {marker}")
                await tenant.stub.Cancel(cancel)
                assert marker in (await watch(tenant.stub, cancelled)).final.status.error.message
                open_ = await tenant.submit(marker, params=LONG, **user)
                await until_output(tenant.stub, open_)
                first = succeeded.final.status.workflow_id
                ids = [first, failed.final.status.workflow_id, cancelled, open_]
                ids += [delivery_workflow_id(first), ledger_workflow_id(tenant.name)]
                histories = [await history_of(stack, id_) for id_ in ids]
                assert marker.encode() not in b"".join(
                    event.SerializeToString() for history in histories for event in history.events
                )
                for id_, history in zip(ids, histories, strict=True):
                    found = payloads_of(history)
                    assert found, id_
                    assert {encrypted_for(payload) for payload in found} == {tenant.name}, id_
                (other,) = {*TENANTS} - {tenant.name}
                own = EncryptingCodec(keys.encryption(), tenant.name)
                assert any(marker.encode() in one.data for one in await own.decode(payloads_of(histories[0])))
                with pytest.raises(PayloadError):
                    await EncryptingCodec(keys.encryption(), other).decode(payloads_of(histories[0]))
                records = await feed_records(stack, open_)
                assert {record.encrypted.tenant for record in records} == {tenant.name}
                started = histories[0].events[0].workflow_execution_started_event_attributes
                assert started.priority.fairness_key
                assert "alice" not in started.priority.fairness_key
                assert "alice" not in str(started.search_attributes)
            database = b"".join(path.read_bytes() for path in stack.state_dir.glob("temporal.db*"))
            for marker in MARKERS.values():
                assert marker.encode() not in database
                assert not holds(stack.state_dir / "nats", marker)
        logs = "".join(path.read_text() for path in (stack.state_dir / "logs").iterdir())
        spans = b"".join(span.raw.SerializeToString() for span in collector.spans.all)
        assert spans
        for marker in MARKERS.values():
            assert marker not in logs
            assert marker.encode() not in spans


@pytest.fixture(scope="module")
async def installed(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[tuple[Stack, Keys, dict[str, Tenant]]]:
    async with installation(tmp_path_factory.mktemp("tenants")) as running:
        yield running


Installed = tuple[Stack, Keys, dict[str, Tenant]]


async def test_hashed_jobs_are_found_by_their_own_tenant_alone(installed: Installed) -> None:
    """By user and by project, by a key of the whole tenant and by one that is bound to the user."""
    stack, _, tenants = installed
    ids = {}
    for tenant in tenants.values():
        named = {"project_id": "same", "params": {"max_tokens": 3}}
        ids[tenant.name] = [await tenant.submit("x", user_id=user, **named) for user in ("alice", "bob")]
    values = {}
    for tenant in tenants.values():
        alices, bobs = ids[tenant.name]
        for stub, filters, those in (
            (tenant.stub, {"user_id": "alice"}, {alices}),
            (tenant.stub, {"user_id": "bob"}, {bobs}),
            (tenant.stub, {"project_id": "same"}, {alices, bobs}),
            (tenant.alice, {}, {alices}),
            (tenant.alice, {"user_id": "alice"}, {alices}),
            (tenant.alice, {"project_id": "same"}, {alices}),
        ):
            found = await tenant.listed(stub, those, **filters)
            assert found.keys() == those
            assert {(item.user_id, item.project_id) for item in found.values()} <= {("alice", "same"), ("bob", "same")}
        assert (await status_of(tenant.alice, alices)).status.workflow_id == alices
        for request in (bobs, ids[next(name for name in TENANTS if name != tenant.name)][0]):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await status_of(tenant.alice, request)
            assert error.value.code() == grpc.StatusCode.NOT_FOUND
        temporal = await Client.connect(stack.address("temporal"), data_converter=data_converter)
        described = await temporal.get_workflow_handle(alices).describe()
        values[tenant.name] = described.typed_search_attributes[names.USER_ID]
        assert is_hash(values[tenant.name])
    assert values["acme"] != values["globex"], "the hashes of a name differ from tenant to tenant"


async def test_a_user_whose_jobs_cannot_be_told_now_is_asked_to_call_again(installed: Installed) -> None:
    """A gateway without the keys cannot read whose a hashed job is. That makes it no missing job."""
    stack, keys, tenants = installed
    acme = tenants["acme"]
    id_ = (await run_job(acme.stub, new_job("x", user_id="alice", params={"max_tokens": 3}))).final.status.workflow_id
    # The next gateway gets no task of a workflow of theirs, for which it would read the keys.
    await until_used(acme, 0)
    temporal = await Client.connect(stack.address("temporal"), data_converter=data_converter)
    running_jobs = f"WorkflowType = '{names.JOB_WORKFLOW_TYPE}' AND ExecutionStatus = 'Running'"
    async with asyncio.timeout(PATIENCE):
        while True:
            if not (await temporal.count_workflows(running_jobs)).count:
                break
            await asyncio.sleep(0.2)
    await restart(stack, "gateway")
    ring, keys.ring = keys.ring, ""
    for ask in (status_of, watch):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await ask(acme.alice, id_)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        assert details_of(error.value)["ErrorInfo"].reason == "KEYS_UNAVAILABLE"
    keys.ring = ring
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                answer = await status_of(acme.alice, id_)
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(0.2)
            else:
                break
    assert answer.status.state == llm_pb2.JOB_STATE_SUCCEEDED


async def test_a_service_waits_for_the_keys_of_all_tenants(installed: Installed, tmp_path: Path) -> None:
    """A copy of the store lacks what came later. Another tenant's newer job let the service go, and it made a key."""
    stack, keys, tenants = installed
    for name in ("acme", "globex"):
        await run_job(tenants[name].stub, new_job(params={"max_tokens": 2}))
    copy = tmp_path / "copy"
    shutil.copytree(keys.folder, copy)
    shutil.rmtree(copy / "acme")
    process = stack.add("gpu-worker", {"ENCRYPTION_KEY_STORE": str(copy)})
    await process.start()
    try:
        answer = await ask_until(stack, process.name, lambda answer: "keys" in answer.body["missing"])
        assert "of tenant 'acme'" in answer.body["missing"]["keys"]
        shutil.copytree(keys.folder / "acme", copy / "acme")
        await process.wait_ready()
    finally:
        await process.terminate()


async def test_the_end_of_one_tenants_keys_is_not_the_others(installed: Installed) -> None:
    """Its jobs are unreadable everywhere and still listed. Its ledger, which is unreadable, too, blocks nobody: neither
    the other tenant nor its own new jobs, which get a new key."""
    stack, keys, tenants = installed
    acme, globex = tenants["acme"], tenants["globex"]
    ended, open_ = {}, {}
    for tenant in tenants.values():
        job = new_job("ended", user_id="carol", params={"max_tokens": 20})
        ended[tenant.name] = (await run_job(tenant.stub, job)).final
        open_[tenant.name] = await tenant.submit("open", user_id="carol", params={"max_tokens": 8000})
        await until_output(tenant.stub, open_[tenant.name])
    carols = {"user_id": "carol"}
    file = (await upload(acme.stub, new_file(file=carols), b"carol's")).ref.file_id
    created = await acme.stub.CreateSchedule(schedule_pb2.CreateScheduleRequest(schedule=new_schedule(**carols)))
    schedule = created.status.schedule_id
    before = await payloads_stored(stack, ended["acme"].status.workflow_id)
    keys.store.delete("acme")
    # A gateway that has workflows in memory would go on with what it has decrypted.
    await restart(stack, "gateway")
    id_ = ended["acme"].status.workflow_id
    for ask in (
        status_of,
        watch,
        lambda stub, id_: stub.GetJob(llm_pb2.GetJobRequest(workflow_id=id_), timeout=60),
        lambda stub, id_: stub.ListDeliveries(llm_pb2.ListDeliveriesRequest(workflow_id=id_), timeout=60),
        lambda stub, id_: stub.Redeliver(llm_pb2.RedeliverRequest(workflow_id=id_), timeout=60),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await ask(acme.stub, id_)
        assert error.value.code() == grpc.StatusCode.DATA_LOSS
        assert details_of(error.value)["ErrorInfo"].reason == "CONTENT_UNREADABLE"
    # To a key of one user they are what never was: nothing tells any more whose they are.
    for asked in (status_of(acme.alice, id_), watch(acme.alice, id_)):
        assert await refusal(asked) == ("NOT_FOUND", "JOB_NOT_FOUND")
    for code, of_file, of_schedule, stub in (
        ("DATA_LOSS", "CONTENT_UNREADABLE", "CONTENT_UNREADABLE", acme.stub),
        ("NOT_FOUND", "FILE_NOT_FOUND", "SCHEDULE_NOT_FOUND", acme.alice),
    ):
        assert await refusal(stub.GetFile(file_pb2.GetFileRequest(file_id=file), timeout=60)) == (code, of_file)
        assert await refusal(download(stub, file)) == (code, of_file)
        about = schedule_pb2.GetScheduleRequest(schedule_id=schedule)
        assert await refusal(stub.GetSchedule(about, timeout=60)) == (code, of_schedule)
    gone = file_pb2.DeleteFileRequest(file_id=file)
    assert await refusal(acme.alice.DeleteFile(gone, timeout=60)) == ("NOT_FOUND", "FILE_NOT_FOUND")
    await acme.stub.DeleteFile(gone, timeout=60)
    assert await refusal(acme.stub.DeleteFile(gone, timeout=60)) == ("NOT_FOUND", "FILE_NOT_FOUND")
    for tenant in ("acme", None):
        with pytest.raises(PayloadError, match="was deleted"):
            await EncryptingCodec(keys.encryption(), tenant).decode(before)
    listed = await acme.listed(acme.stub, {id_, open_["acme"]})
    assert (listed[id_].status.state, listed[id_].user_id) == (llm_pb2.JOB_STATE_SUCCEEDED, "")
    # The other tenant notices nothing.
    answer = await status_of(globex.stub, ended["globex"].status.workflow_id)
    assert answer.result.output == ended["globex"].result.output
    found = await globex.listed(globex.stub, {open_["globex"]}, user_id="carol")
    assert found[open_["globex"]].user_id == "carol"
    await until_used(globex, 1)
    await globex.stub.Cancel(llm_pb2.CancelRequest(workflow_id=open_["globex"]), timeout=60)
    assert (await watch(globex.stub, open_["globex"])).states[-1] == "CANCELLED"
    temporal = await Client.connect(stack.address("temporal"), data_converter=data_converter)
    handle = temporal.get_workflow_handle(open_["acme"])
    with pytest.raises(WorkflowFailureError):
        await asyncio.wait_for(handle.result(), PATIENCE)
    assert (await handle.describe()).status == WorkflowExecutionStatus.TERMINATED
    await until_used(acme, 0)
    for tenant in (acme, globex):
        job = new_job("new", user_id="carol", params={"max_tokens": 20})
        assert (await run_job(tenant.stub, job)).states[-1] == "SUCCEEDED"
        await until_used(tenant, 0)


async def until_used(tenant: Tenant, count: int) -> None:
    """Return once the tenant has so many open jobs. A ledger that is being replaced is UNAVAILABLE."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                answer = await tenant.stub.GetQuota(llm_pb2.GetQuotaRequest(), timeout=60)
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise
            else:
                if answer.open_jobs.used == count:
                    return
            await asyncio.sleep(0.2)


async def payloads_stored(stack: Stack, workflow_id: str) -> list[Payload]:
    return payloads_of(await history_of(stack, workflow_id))
