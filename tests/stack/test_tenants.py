"""Two tenants on one installation: the same users and requests, each with jobs, lists, limits and turns of its own."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from temporalio.client import Client
from temporalio.common import SearchAttributePair, TypedSearchAttributes

from deploy.local.stack import Stack
from jobs import names
from llm_pb import common_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from services.gateway import scopes
from tests.support.credentials import CallsAs, KeyFile
from tests.support.jobs import details_of, new_job, run_job, until_output, watch, webhook
from tests.support.receivers import Receiver, hang, receiving, status
from tests.support.stacks import running, temporal_cli

ALL = sorted(scopes.SCOPES)
PATIENCE = 60
OF_USER = "RESOURCE_EXHAUSTED: 3 streams watch this user's jobs, the limit; end one first"
OF_TENANT = "RESOURCE_EXHAUSTED: 4 streams watch this tenant's jobs, the limit; end one first"
pytestmark = pytest.mark.timeout(400)


class Keys:
    """The file with a key of each of three callers: of two tenants, and of none."""

    def __init__(self, folder: Path) -> None:
        file = KeyFile(folder / "keys.json")
        self.path = str(file.path)
        self.of = {tenant: file.add(ALL, tenant=tenant) for tenant in ("acme", "globex", "")}


class Tenants:
    """A client of a gateway for each key."""

    def __init__(self, stub: LlmServiceStub, keys: Keys) -> None:
        self.acme: Any = CallsAs(stub, keys.of["acme"])
        self.globex: Any = CallsAs(stub, keys.of["globex"])
        self.nobody: Any = CallsAs(stub, keys.of[""])

    @property
    def all(self) -> dict[str, Any]:
        """The clients by tenant."""
        return {"acme": self.acme, "globex": self.globex, "": self.nobody}


@pytest.fixture(scope="module")
async def tenants(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Tenants]:
    keys = Keys(tmp_path_factory.mktemp("tenants"))
    gateway = stack.add(
        "gateway",
        {
            "GATEWAY_API_KEYS_FILE": keys.path,
            "GATEWAY_MAX_WATCHERS_PER_TENANT": "4",
            "GATEWAY_MAX_WATCHERS_PER_USER": "3",
        },
    )
    await gateway.start()
    await gateway.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
        yield Tenants(LlmServiceStub(channel), keys)
    await gateway.terminate()


async def all_listed(stub: Any, count: int, **filters: Any) -> list[llm_pb2.JobSummary]:
    """Return the jobs of all pages once there are `count`; visibility learns of a job a moment later."""
    async with asyncio.timeout(PATIENCE):
        while True:
            jobs, request = [], llm_pb2.ListRequest(page_size=2, **filters)
            while True:
                page = await stub.List(request)
                jobs += page.jobs
                if not page.next_page_token:
                    break
                request.page_token = page.next_page_token
            if len(jobs) >= count:
                return jobs
            await asyncio.sleep(0.1)


async def test_tenants_with_the_same_users_and_requests_have_jobs_of_their_own(tenants: Tenants) -> None:
    """Each streams its own text, and a repeat finds its own."""
    job = new_job()
    texts = {}
    for tenant, stub in tenants.all.items():
        own = llm_pb2.JobRequest()
        own.CopyFrom(job)
        own.prompt = f"This is of {tenant or 'nobody'}."
        seen = await run_job(stub, own)
        assert seen.states[-1] == "SUCCEEDED"
        again = await stub.Submit(llm_pb2.SubmitRequest(job=own))
        assert again.status.state == llm_pb2.JOB_STATE_SUCCEEDED
        result = (await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=again.workflow_id))).result
        assert result.output.encode() == seen.output != b""
        texts[tenant] = (again.workflow_id, seen.output)
    form = f"{job.user_id.replace('-', '--')}-{job.request_id}"
    assert [id_ for id_, _ in texts.values()] == [
        f"llmjob--acme-{form}",
        f"llmjob--globex-{form}",
        f"llmjob-{form}",
    ]
    assert len({text for _, text in texts.values()}) == 3


async def test_everybody_lists_their_own_jobs(tenants: Tenants, temporal: Client) -> None:
    """Page by page. What a workflow that was started by hand says of itself counts for nothing."""
    user, count = new_job().user_id, 5
    attributes = [SearchAttributePair(names.USER_ID, user), SearchAttributePair(names.TENANT_ID, "acme")]
    forged = await temporal.start_workflow(
        names.JOB_WORKFLOW_TYPE,
        new_job(),
        id=f"forged-{user}",
        task_queue="nobody",
        search_attributes=TypedSearchAttributes(attributes),
    )
    ids: dict[str, set[str]] = {}
    for tenant, stub in tenants.all.items():
        jobs = [new_job(user_id=user, model="idle") for _ in range(count)]
        ids[tenant] = {(await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id for job in jobs}
    for tenant, stub in tenants.all.items():
        for filters in ({"user_id": user}, {"user_id": user, "states": [llm_pb2.JOB_STATE_QUEUED]}):
            listed = await all_listed(stub, count, **filters)
            assert {item.status.workflow_id for item in listed} == ids[tenant]
            assert {item.user_id for item in listed} == {user}
    everything = [item.status.workflow_id for item in await all_listed(tenants.acme, count)]
    assert {id_.partition("-")[2][:6] for id_ in everything} == {"-acme-"}
    described = {tenant: await temporal.get_workflow_handle(min(found)).describe() for tenant, found in ids.items()}
    for tenant, description in described.items():
        assert description.typed_search_attributes.get(names.TENANT_ID) == (tenant or None)
    await forged.terminate()


async def test_a_page_token_is_its_tenants(tenants: Tenants) -> None:
    user = new_job().user_id
    for stub in tenants.all.values():
        for _ in range(3):
            await stub.Submit(llm_pb2.SubmitRequest(job=new_job(user_id=user, model="idle")))
        await all_listed(stub, 3, user_id=user)
    request = llm_pb2.ListRequest(user_id=user, page_size=2)
    for tenant, stub in tenants.all.items():
        request.page_token = ""
        request.page_token = (await stub.List(request)).next_page_token
        assert (await stub.List(request)).jobs
        for other, others in tenants.all.items():
            if other != tenant:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await others.List(request)
                assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
                assert details_of(error.value)["BadRequest"].field_violations[0].field == "page_token"


async def test_a_tenant_watches_only_so_many_jobs_at_once(tenants: Tenants) -> None:
    """However many users it names. Others watch on, a user of the same name as well."""
    streams = []

    async def refused(stub: Any, user: str) -> str:
        id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=new_job(user_id=user, model="idle")))).workflow_id
        stream = stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=id_))
        try:
            assert (await stream.read()).status.workflow_id == id_
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        streams.append(stream)
        return ""

    for _ in range(3):
        assert await refused(tenants.acme, "same") == ""
    assert await refused(tenants.acme, "same") == OF_USER
    assert await refused(tenants.acme, "invented-1") == ""
    assert await refused(tenants.acme, "invented-2") == OF_TENANT
    for stub in (tenants.globex, tenants.nobody):
        for _ in range(3):
            assert await refused(stub, "same") == ""
        assert await refused(stub, "same") == OF_USER
    for number in range(3):
        # As ever where there are no tenants.
        assert await refused(tenants.nobody, f"invented-{number}") == ""
    for stream in streams:
        stream.cancel()


async def test_a_job_that_was_started_by_hand_under_a_tenants_id_is_the_tenants(
    tenants: Tenants, temporal: Client
) -> None:
    job = new_job(params={"max_tokens": 5})
    id_ = f"llmjob--acme-by--hand-{job.request_id}"
    await temporal.start_workflow(names.JOB_WORKFLOW_TYPE, job, id=id_, task_queue=names.WORKFLOW_QUEUE)
    assert (await watch(tenants.acme, id_)).states[-1] == "SUCCEEDED"
    listed = await all_listed(tenants.acme, 1, user_id=job.user_id)
    assert [item.status.workflow_id for item in listed] == [id_]
    for stub in (tenants.globex, tenants.nobody):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))
        assert error.value.code() == grpc.StatusCode.NOT_FOUND


async def test_a_tenants_cancel_is_its_own(tenants: Tenants) -> None:
    """Of two running jobs with the same user and request."""
    job = new_job(params={"max_tokens": 8000})
    ids = {name: (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id for name, stub in tenants.all.items()}
    for name, stub in tenants.all.items():
        await until_output(stub, ids[name])
    await tenants.acme.Cancel(llm_pb2.CancelRequest(workflow_id=ids["acme"]))
    assert (await watch(tenants.acme, ids["acme"])).states[-1] == "CANCELLED"
    for name in ("globex", ""):
        stub = tenants.all[name]
        found = (await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=ids[name]))).status
        assert found.state == llm_pb2.JOB_STATE_RUNNING
        await stub.Cancel(llm_pb2.CancelRequest(workflow_id=ids[name]))


async def test_a_tenant_of_two_jobs_does_not_wait_for_one_of_two_hundred(stack: Stack, tmp_path: Path) -> None:
    """Although the other one names twenty users: they share its turns."""
    file = KeyFile(tmp_path / "keys.json")
    many, few = file.add(ALL, tenant="many"), file.add(ALL, tenant="few")
    queue = "turns-of-tenants"
    sizes = {"context_tokens": 8192, "max_output_tokens": 8192, "default_max_tokens": 64}
    gateway = stack.add(
        "gateway",
        {
            "GATEWAY_API_KEYS_FILE": str(file.path),
            "GATEWAY_MODELS": json.dumps([{"name": "turns", "queue": queue, **sizes}]),
        },
    )
    worker = stack.add(
        "gpu-worker",
        {"GPU_WORKER_TASK_QUEUE": queue, "GPU_WORKER_MODEL": "turns", "GPU_WORKER_MAX_CONCURRENT": "1"},
    )
    await gateway.start()
    await gateway.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
        stub = LlmServiceStub(channel)

        async def submit(key: str, user: str) -> str:
            job = new_job(user_id=user, model="turns", params={"max_tokens": 1})
            response = await CallsAs(stub, key).Submit(llm_pb2.SubmitRequest(job=job))
            id_: str = response.workflow_id
            return id_

        flood: list[str] = []
        for _ in range(10):
            flood += await asyncio.gather(*(submit(many, f"user-{number}") for number in range(20)))
        others = [await submit(few, "user-0") for _ in range(2)]
        await worker.start()
        seen = [await watch(CallsAs(stub, few), id_) for id_ in others]  # type: ignore[arg-type]
        await worker.terminate()
        last = max(one.final.status.start_time.ToNanoseconds() for one in seen)
        at_once = asyncio.Semaphore(8)

        async def began_before(id_: str) -> bool:
            async with at_once:
                found = await CallsAs(stub, many).GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))
            return 0 < found.status.start_time.ToNanoseconds() < last

        before = await asyncio.gather(*map(began_before, flood))
    # Without shares a turn of each of the twenty users would come before each of the two.
    assert sum(before) < 20
    await gateway.terminate()


@pytest.fixture
async def told(stack: Stack, tmp_path: Path, receiver: Receiver) -> AsyncIterator[tuple[Tenants, Receiver]]:
    """Tenants whose notifier has endpoints of its operator, and a small limit."""
    keys, queue = Keys(tmp_path), "notifications-of-tenants"
    notifier = stack.add(
        "notifier",
        {
            "NOTIFIER_TASK_QUEUE": queue,
            "NOTIFIER_USERS": json.dumps({"alice": {"url": f"{receiver.url}/alice"}}),
            "NOTIFIER_TENANTS": json.dumps(
                {"acme": {"url": f"{receiver.url}/acme", "users": {"alice": {"url": f"{receiver.url}/acme/alice"}}}}
            ),
            "NOTIFIER_MAX_PER_TENANT": "2",
        },
    )
    gateway = stack.add(
        "gateway",
        {
            "GATEWAY_API_KEYS_FILE": keys.path,
            "GATEWAY_NOTIFY_QUEUE": queue,
            "GATEWAY_NOTIFY_OPERATOR": "true",
        },
    )
    async with running(stack, notifier, gateway) as stub:
        yield Tenants(stub, keys), receiver


async def test_the_notifier_knows_tenants(told: tuple[Tenants, Receiver]) -> None:
    """By the ids of workflows: an endpoint for each tenant and for its users, and room for the others."""
    tenants, receiver = told
    short = {"max_tokens": 2}
    for stub, user, path in (
        (tenants.acme, "alice", "/acme/alice"),
        (tenants.acme, "bob", "/acme"),
        (tenants.nobody, "alice", "/alice"),
    ):
        seen = await run_job(stub, new_job(user_id=user, params=short))
        assert seen.final.status.notifications[0].state == llm_pb2.NOTIFY_STATE_DELIVERED
        (request,) = await receiver.received(path)
        assert request.event["subject"] == seen.final.status.workflow_id
    # A user of the same name elsewhere has no endpoint.
    seen = await run_job(tenants.globex, new_job(user_id="alice", params=short))
    assert {one.state for one in seen.final.status.notifications} <= {llm_pb2.NOTIFY_STATE_SKIPPED}
    async with receiving() as slow:
        target = webhook(slow.on("/slow", hang))
        hanging = [
            run_job(tenants.acme, new_job(user_id=f"invented-{number}", params=short, notify=target))
            for number in range(6)
        ]
        running_jobs = [asyncio.ensure_future(one) for one in hanging]
        await slow.received("/slow", 2)
        good = webhook(receiver.on("/good", status(200)))
        seen = await run_job(tenants.globex, new_job(params=short, notify=good))
        assert seen.final.status.notifications[0].state == llm_pb2.NOTIFY_STATE_DELIVERED
        ended = await asyncio.gather(*running_jobs)
        messages = []
        for one in ended:
            asked = llm_pb2.ListDeliveriesRequest(workflow_id=one.final.status.workflow_id)
            (delivery,) = (await tenants.acme.ListDeliveries(asked)).deliveries
            messages += [attempt.error.message for attempt in delivery.attempts]
        assert any("of the same tenant are under way" in message for message in messages)


async def test_an_installation_whose_namespace_has_no_room_for_tenants_goes_on(stack: Stack, tmp_path: Path) -> None:
    """Temporal takes ten attributes of the kind. A tenant's call, and a job of a class that is not the usual one, is
    refused in a way that may pass, and the log says why."""
    await temporal_cli(stack, "operator", "namespace", "create", "--namespace", "full")
    others = [word for number in range(5) for word in ("--name", f"Own{number}", "--type", "Keyword")]
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await temporal_cli(stack, "operator", "search-attribute", "create", "--namespace", "full", *others)
            except AssertionError:
                # Temporal's servers learn of a namespace a moment later.
                await asyncio.sleep(0.5)
            else:
                break
    keys = Keys(tmp_path)
    gateway = stack.add("gateway", {"GATEWAY_API_KEYS_FILE": keys.path, "TEMPORAL_NAMESPACE": "full"})
    await gateway.start()
    await gateway.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
        full = Tenants(LlmServiceStub(channel), keys)
        request = llm_pb2.SubmitRequest(job=new_job(model="idle"))
        async with asyncio.timeout(3 * PATIENCE):
            while True:
                try:
                    submitted = await full.nobody.Submit(request)
                except grpc.aio.AioRpcError:
                    # Of an attribute, too.
                    await asyncio.sleep(0.5)
                else:
                    break
        listed = await all_listed(full.nobody, 1)
        assert [item.status.workflow_id for item in listed] == [submitted.workflow_id]
        background = llm_pb2.SubmitRequest(job=new_job(model="idle", job_class=common_pb2.JOB_CLASS_BACKGROUND))
        calls = (full.acme.Submit(request), full.acme.List(llm_pb2.ListRequest()), full.nobody.Submit(background))
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    await gateway.terminate()
    assert "an operator has to register the search attributes" in gateway.log
    assert "TenantId" in gateway.log
    assert "JobClass" in gateway.log
