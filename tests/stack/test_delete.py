"""Deletion: nothing is left of a job, its id stays taken, and what cannot be reached is named."""

import asyncio
import uuid
from pathlib import Path

import grpc
import pytest
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import DeleteWorkflowExecutionRequest
from temporalio.client import Client
from temporalio.common import SearchAttributePair, TypedSearchAttributes
from temporalio.exceptions import ApplicationError

from deploy.local.stack import Stack
from durable_llm import AsyncClient
from durable_llm.errors import JobDeleted
from feed.memory import MemoryAnswers, MemoryFeed
from jobs import names
from jobs.ids import deletion_workflow_id, delivery_workflow_id, workflow_id
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from payload_converter import data_converter
from runtime.scopes import SCOPES
from services.gateway.deletion.steps import DeletionSteps
from services.gateway.delivery_reader import DeliveryReader
from services.gateway.job_reader import JobReader
from services.gateway.models.catalogue import Models
from services.gateway.settings import GatewaySettings
from services.gateway.told import Telling
from tests.support.credentials import CallsAs, KeyFile, bearer
from tests.support.deletions import (
    PATIENCE,
    delete,
    feed_holds,
    feed_messages,
    rows_with,
    run_exists,
    until_ended,
    until_no_rows,
)
from tests.support.jobs import details_of, new_job, run_job, until_output, watch, webhook
from tests.support.receivers import Receiver
from tests.support.temporal_proxy import temporal_proxy

pytestmark = pytest.mark.timeout(900)
ALL_PARTS = {
    llm_pb2.JOB_PART_FEED,
    llm_pb2.JOB_PART_DELIVERIES,
    llm_pb2.JOB_PART_OUTPUT,
    llm_pb2.JOB_PART_WORKFLOW,
}
OPERATORS = {"logs", "traces", "backups"}


def marker_of() -> str:
    return f"marker{uuid.uuid4().hex}"


async def submit(stub: LlmServiceStub, job: llm_pb2.JobRequest) -> llm_pb2.SubmitResponse:
    return await stub.Submit(llm_pb2.SubmitRequest(job=job), timeout=PATIENCE)


def reason_of(error: grpc.aio.AioRpcError) -> tuple[str, str]:
    return error.code().name, details_of(error)["ErrorInfo"].reason


async def assert_unknown(stub: LlmServiceStub, workflow_id: str) -> None:
    """No call knows the job, in the same bytes as for one that never was."""
    never = f"{workflow_id[:-1]}~"
    for method, kind in (
        ("GetStatus", llm_pb2.GetStatusRequest),
        ("GetJob", llm_pb2.GetJobRequest),
        ("Cancel", llm_pb2.CancelRequest),
        ("ListDeliveries", llm_pb2.ListDeliveriesRequest),
        ("Redeliver", llm_pb2.RedeliverRequest),
    ):
        answers = []
        for id_ in (workflow_id, never):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await getattr(stub, method)(kind(workflow_id=id_), timeout=PATIENCE)
            assert reason_of(error.value) == ("NOT_FOUND", "JOB_NOT_FOUND"), method
            trailers = [*(error.value.trailing_metadata() or ())]
            answers.append(str((error.value.details(), trailers)).replace(id_, "ID"))
        assert answers[0] == answers[1]
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=workflow_id), timeout=PATIENCE).read()
    assert reason_of(error.value) == ("NOT_FOUND", "JOB_NOT_FOUND")


async def assert_not_run_again(stub: LlmServiceStub, job: llm_pb2.JobRequest) -> None:
    """A late retry of the Submit, and another job under the key, are told that the job was deleted."""
    other = llm_pb2.JobRequest()
    other.CopyFrom(job)
    other.project_id = "another"
    for again in (job, other):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await submit(stub, again)
        assert reason_of(error.value) == ("ALREADY_EXISTS", "JOB_DELETED")
        assert "another request_id" in (error.value.details() or "")


STATES = ["queued", "running", "succeeded", "cancelled", "failed"]


@pytest.mark.parametrize("state", STATES)
async def test_nothing_is_left_of_a_job(stack: Stack, stub: LlmServiceStub, temporal: Client, state: str) -> None:
    """Whatever its state was: no run in Temporal, no row in its database, no message on the feed. Its key stays."""
    marker = marker_of()
    model = "idle" if state in ("queued", "cancelled") else "docstrings"
    fault = "[[fault:failed@1]] " if state == "failed" else ""
    tokens = 8000 if state == "running" else 5
    job = new_job(f"{fault}{marker}", model=model, params={"max_tokens": tokens})
    accepted = await submit(stub, job)
    id_, run_id = accepted.workflow_id, accepted.run_id
    if state == "running":
        await until_output(stub, id_)
    elif state == "cancelled":
        await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    if state not in ("queued", "running"):
        await watch(stub, id_)
    assert rows_with(stack, marker)
    watching = asyncio.create_task(watch(stub, id_))

    deletion = await delete(stub, id_)

    assert deletion.state == llm_pb2.DELETION_STATE_DONE
    assert deletion.workflow_id == id_
    assert set(deletion.removed) == ALL_PARTS
    assert deletion.deleted_jobs == 1
    assert {copy.place for copy in deletion.unreached} >= OPERATORS
    assert deletion.create_time.ToDatetime() <= deletion.end_time.ToDatetime()
    assert not await run_exists(temporal, id_, run_id)
    assert await feed_messages(stack, run_id) == 0
    # A stream of the job ends: with its outcome, or as for an unknown job.
    (ended,) = await asyncio.gather(watching, return_exceptions=True)
    if isinstance(ended, BaseException):
        assert isinstance(ended, grpc.aio.AioRpcError)
        assert reason_of(ended) == ("NOT_FOUND", "JOB_NOT_FOUND")
    await until_no_rows(stack, marker)
    assert not await feed_holds(stack, marker)
    await assert_unknown(stub, id_)
    await assert_not_run_again(stub, job)
    assert (await delete(stub, id_)) == deletion
    async with asyncio.timeout(PATIENCE):
        while (await stub.List(llm_pb2.ListRequest(user_id=job.user_id))).jobs:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    # What keeps the id, and the deletion, hold nothing of the job but its id.
    tombstone = await temporal.get_workflow_handle(id_).describe()
    assert tombstone.workflow_type == names.TOMBSTONE_WORKFLOW_TYPE
    assert not await tombstone.memo()


async def test_deliveries_are_given_up_and_named(
    stack: Stack, stub: LlmServiceStub, temporal: Client, receiver: Receiver
) -> None:
    """The workflow that delivers a job's outcome for days is deleted, and who has got something is in the answer."""
    marker = marker_of()
    good, bad = f"{receiver.url}/{marker}", "http://127.0.0.1:9/hook"
    job = new_job(marker, params={"max_tokens": 2}, notify=[*webhook(good), *webhook(bad)])
    id_ = (await submit(stub, job)).workflow_id
    await watch(stub, id_)
    delivery = delivery_workflow_id(id_)
    assert await run_exists(temporal, delivery)

    deletion = await delete(stub, id_)

    assert deletion.state == llm_pb2.DELETION_STATE_DONE
    assert not await run_exists(temporal, delivery)
    sent = [copy for copy in deletion.unreached if copy.place not in OPERATORS]
    assert {copy.type for copy in sent} == {"llm.v1.job.succeeded"}
    # The path of a webhook is a secret at many services, and not in the answer.
    assert all(copy.place.startswith("http://127.0.0.1:") and marker not in copy.place for copy in sent)
    assert len({copy.place for copy in sent}) == 2
    assert all(copy.HasField("time") for copy in sent)
    await assert_unknown(stub, id_)
    await until_no_rows(stack, marker)


async def test_deliveries_of_a_job_past_its_retention_are_deleted(
    stub: LlmServiceStub, temporal: Client, receiver: Receiver
) -> None:
    job = new_job(params={"max_tokens": 2}, notify=webhook("http://127.0.0.1:9/hook"))
    accepted = await submit(stub, job)
    id_ = accepted.workflow_id
    await watch(stub, id_)
    assert await run_exists(temporal, delivery_workflow_id(id_))
    await temporal.workflow_service.delete_workflow_execution(
        DeleteWorkflowExecutionRequest(
            namespace=temporal.namespace,
            workflow_execution=WorkflowExecution(workflow_id=id_, run_id=accepted.run_id),
        )
    )
    async with asyncio.timeout(PATIENCE):
        while await run_exists(temporal, id_):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    deletion = await delete(stub, id_)
    assert deletion.state == llm_pb2.DELETION_STATE_DONE
    assert not await run_exists(temporal, delivery_workflow_id(id_))
    assert [copy for copy in deletion.unreached if copy.type == "llm.v1.job.succeeded"]
    # The key was free before the deletion and is not taken by it.
    assert not await run_exists(temporal, id_)


async def test_many_deletions_at_once_are_one(stub: LlmServiceStub, temporal: Client) -> None:
    id_ = (await submit(stub, new_job(params={"max_tokens": 3000}))).workflow_id
    await until_output(stub, id_)
    request = llm_pb2.DeleteJobRequest(workflow_id=id_)
    answers = await asyncio.gather(*(stub.DeleteJob(request, timeout=PATIENCE) for _ in range(10)))
    (deletion_id,) = {answer.deletion.deletion_id for answer in answers}
    assert (await until_ended(stub, deletion_id)).state == llm_pb2.DELETION_STATE_DONE
    again = (await stub.DeleteJob(request)).deletion
    assert again.deletion_id == deletion_id
    assert again.state == llm_pb2.DELETION_STATE_DONE


async def test_a_job_that_never_was_is_not_found(stub: LlmServiceStub, temporal: Client) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.DeleteJob(llm_pb2.DeleteJobRequest(workflow_id="llmjob-no-body"))
    assert reason_of(error.value) == ("NOT_FOUND", "JOB_NOT_FOUND")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.GetDeletion(llm_pb2.GetDeletionRequest(deletion_id="llmdelete-llmjob-no-body"))
    assert reason_of(error.value) == ("NOT_FOUND", "DELETION_NOT_FOUND")
    # Not by the id of another workflow either.
    job = (await submit(stub, new_job(model="idle"))).workflow_id
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.GetDeletion(llm_pb2.GetDeletionRequest(deletion_id=job))
    assert reason_of(error.value) == ("NOT_FOUND", "DELETION_NOT_FOUND")


async def test_a_job_that_does_not_stop_is_terminated(stack: Stack, temporal: Client) -> None:
    """Nobody runs its workflow, so nobody hears the cancel."""
    gateway = stack.add("gateway", {"GATEWAY_DELETE_GRACE": "PT1S"})
    await gateway.start()
    await gateway.wait_ready()
    job = new_job()
    handle = await temporal.start_workflow(
        names.JOB_WORKFLOW_TYPE, job, id=f"by-hand-{uuid.uuid4().hex}", task_queue="nowhere"
    )
    async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
        deletion = await delete(LlmServiceStub(channel), handle.id)
    assert deletion.state == llm_pb2.DELETION_STATE_DONE
    assert not await run_exists(temporal, handle.id, handle.first_execution_run_id)
    await gateway.terminate()


async def test_an_operators_end_of_a_deletion_is_seen_and_mended(stub: LlmServiceStub, temporal: Client) -> None:
    """A deletion that was terminated has failed; the next DeleteJob does the rest."""
    handle = await temporal.start_workflow(
        names.JOB_WORKFLOW_TYPE, new_job(), id=f"by-hand-{uuid.uuid4().hex}", task_queue="nowhere"
    )
    deletion_id = (await stub.DeleteJob(llm_pb2.DeleteJobRequest(workflow_id=handle.id))).deletion.deletion_id
    await temporal.get_workflow_handle(deletion_id).terminate()
    assert (await until_ended(stub, deletion_id)).state == llm_pb2.DELETION_STATE_FAILED
    await handle.terminate()
    assert (await delete(stub, handle.id)).state == llm_pb2.DELETION_STATE_DONE


async def test_a_failed_deletion_fails_that_of_many(stack: Stack, stub: LlmServiceStub, temporal: Client) -> None:
    """It is not tried for ever, and the other jobs are deleted."""
    user = f"stuck-{uuid.uuid4().hex[:8]}"
    stuck = await temporal.start_workflow(
        names.JOB_WORKFLOW_TYPE,
        new_job(),
        id=f"by-hand-{uuid.uuid4().hex}",
        task_queue="nowhere",
        search_attributes=TypedSearchAttributes([SearchAttributePair(names.USER_ID, user)]),
    )
    other = (await submit(stub, new_job(user_id=user, model="idle"))).workflow_id
    started = (await stub.DeleteJobs(llm_pb2.DeleteJobsRequest(user_id=user), timeout=PATIENCE)).deletion
    async with asyncio.timeout(PATIENCE):
        while not await run_exists(temporal, deletion_workflow_id(stuck.id)):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    await temporal.get_workflow_handle(deletion_workflow_id(stuck.id)).terminate()
    ended = await until_ended(stub, started.deletion_id)
    assert (ended.state, ended.deleted_jobs) == (llm_pb2.DELETION_STATE_FAILED, 1)
    assert (await delete(stub, other)).state == llm_pb2.DELETION_STATE_DONE
    assert await run_exists(temporal, stuck.id, stuck.first_execution_run_id)
    await stuck.terminate()


async def test_a_wrong_not_found_of_temporals_frees_no_id(stack: Stack, stub: LlmServiceStub, temporal: Client) -> None:
    """Neither the step that notes what there is believes it, nor the one that keeps the id."""
    id_ = (await run_job(stub, new_job(params={"max_tokens": 1}))).final.status.workflow_id
    async with asyncio.timeout(PATIENCE):
        while not [item async for item in temporal.list_workflows(f"WorkflowId = '{id_}'")]:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    async with temporal_proxy(stack.address("temporal")) as (proxy, address):
        client = await Client.connect(address, data_converter=data_converter)
        deliveries, feed = DeliveryReader(client, Telling(client)), MemoryFeed()
        reader = JobReader(client, Models([]), deliveries, feed)
        steps = DeletionSteps(client, feed, MemoryAnswers(), reader, deliveries, GatewaySettings(), None, None)
        for step in (steps.inspect_job, steps.keep_job_id):
            proxy.unknown["DescribeWorkflowExecution"] = 2
            # Tried again, as any error of a step.
            with pytest.raises(ApplicationError, match="lists a run"):
                await step(id_)
        proxy.unknown["DescribeWorkflowExecution"] = 1
        assert (await steps.inspect_job(id_)).runs
        proxy.unknown["DescribeWorkflowExecution"] = 1
        assert await steps.keep_job_id(id_)
    tombstone = await temporal.get_workflow_handle(id_).describe()
    assert tombstone.workflow_type == names.TOMBSTONE_WORKFLOW_TYPE


async def test_an_id_that_is_too_long_is_shortened(stub: LlmServiceStub, temporal: Client) -> None:
    job = new_job(user_id="u" * 120, request_id=uuid.uuid4().hex.ljust(120, "r"), params={"max_tokens": 1})
    id_ = (await submit(stub, job)).workflow_id
    deletion = await delete(stub, id_)
    assert deletion.state == llm_pb2.DELETION_STATE_DONE
    assert deletion.workflow_id == id_
    assert len(deletion.deletion_id) <= 255
    await assert_not_run_again(stub, job)


async def test_all_jobs_of_a_user_are_deleted(stack: Stack, stub: LlmServiceStub, temporal: Client) -> None:
    """Also those that were submitted a moment ago, which List does not show yet. Those of others stay."""
    marker = marker_of()
    user = f"leaver-{uuid.uuid4().hex[:8]}"
    models = ("idle", "docstrings")
    jobs = [new_job(marker, user_id=user, model=models[n % 2], params={"max_tokens": 3}) for n in range(25)]
    other = await submit(stub, new_job(model="idle"))
    ids = [answer.workflow_id for answer in await asyncio.gather(*(submit(stub, job) for job in jobs))]
    started = (await stub.DeleteJobs(llm_pb2.DeleteJobsRequest(user_id=user), timeout=PATIENCE)).deletion
    later = await submit(stub, new_job(user_id=user, model="idle"))

    deletion = await until_ended(stub, started.deletion_id)

    assert deletion.state == llm_pb2.DELETION_STATE_DONE
    assert deletion.deleted_jobs == len(ids)
    assert {copy.place for copy in deletion.unreached} >= OPERATORS
    for id_ in ids:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))
        assert reason_of(error.value) == ("NOT_FOUND", "JOB_NOT_FOUND")
    await until_no_rows(stack, marker)
    # Jobs of others, and those that were submitted after the call, are not deleted.
    for kept in (other, later):
        assert (await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=kept.workflow_id))).status.workflow_id


async def test_only_jobs_that_match_every_filter_are_deleted(stub: LlmServiceStub) -> None:
    user = f"chooser-{uuid.uuid4().hex[:8]}"
    ended = new_job(user_id=user, project_id="a", params={"max_tokens": 1})
    labelled = new_job(user_id=user, project_id="b", params={"max_tokens": 1})
    queued = new_job(user_id=user, project_id="a", model="idle")
    ids = {}
    for job in (ended, labelled, queued):
        ids[job.request_id] = (await submit(stub, job)).workflow_id
    for job in (ended, labelled):
        await watch(stub, ids[job.request_id])
    request = llm_pb2.DeleteJobsRequest(
        user_id=user, project_id="a", model="docstrings", states=[llm_pb2.JOB_STATE_SUCCEEDED]
    )
    deletion = await until_ended(stub, (await stub.DeleteJobs(request)).deletion.deletion_id)
    assert deletion.deleted_jobs == 1
    for job in (labelled, queued):
        await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=ids[job.request_id]))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=ids[ended.request_id]))
    assert reason_of(error.value) == ("NOT_FOUND", "JOB_NOT_FOUND")


async def test_a_key_of_one_user_deletes_this_users_jobs(stack: Stack, stub: LlmServiceStub, tmp_path: Path) -> None:
    """Of others it learns nothing, neither of their jobs nor of the deletions of these."""
    file = KeyFile(tmp_path / "keys.json")
    mine, others = new_job(model="idle"), new_job(model="idle")
    metadata = bearer(file.add(SCOPES, user_id=mine.user_id))
    gateway = stack.add("gateway", {"GATEWAY_API_KEYS_FILE": str(file.path)})
    await gateway.start()
    await gateway.wait_ready()
    own_id, foreign_id = (await submit(stub, mine)).workflow_id, (await submit(stub, others)).workflow_id
    async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
        bound = LlmServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await bound.DeleteJobs(llm_pb2.DeleteJobsRequest(user_id=others.user_id), metadata=metadata)
        assert reason_of(error.value) == ("PERMISSION_DENIED", "USER_NOT_ALLOWED")
        await delete(stub, foreign_id)
        for id_ in (foreign_id, "llmjob-no-body"):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await bound.DeleteJob(llm_pb2.DeleteJobRequest(workflow_id=id_), metadata=metadata)
            assert reason_of(error.value) == ("NOT_FOUND", "JOB_NOT_FOUND")
            request = llm_pb2.GetDeletionRequest(deletion_id=deletion_workflow_id(id_))
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await bound.GetDeletion(request, metadata=metadata)
            assert reason_of(error.value) == ("NOT_FOUND", "DELETION_NOT_FOUND")
        answer = await bound.DeleteJob(llm_pb2.DeleteJobRequest(workflow_id=own_id), metadata=metadata)
        assert (await until_ended(stub, answer.deletion.deletion_id)).state == llm_pb2.DELETION_STATE_DONE
        request = llm_pb2.GetDeletionRequest(deletion_id=answer.deletion.deletion_id)
        assert (await bound.GetDeletion(request, metadata=metadata)).deletion.workflow_id == own_id
    await gateway.terminate()


async def test_deletions_of_many_are_bounded_for_each_tenant(stack: Stack, temporal: Client, tmp_path: Path) -> None:
    """Further ones are accepted when some have ended. Their steps take turns by the tenant, whatever user they name."""
    file = KeyFile(tmp_path / "keys.json")
    keys = [file.add(SCOPES, tenant=f"tenant-{name}") for name in "ab"]
    gateway = stack.add("gateway", {"GATEWAY_API_KEYS_FILE": str(file.path), "GATEWAY_DELETE_MAX_OPEN": "3"})
    await gateway.start()
    await gateway.wait_ready()
    stuck = await temporal.start_workflow(
        names.JOB_WORKFLOW_TYPE,
        new_job(),
        id=workflow_id("many", uuid.uuid4().hex, "tenant-a"),
        task_queue="nowhere",
        search_attributes=TypedSearchAttributes(
            [SearchAttributePair(names.USER_ID, "many"), SearchAttributePair(names.TENANT_ID, "tenant-a")]
        ),
    )
    async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
        one, other = (CallsAs(LlmServiceStub(channel), key) for key in keys)
        request = llm_pb2.DeleteJobsRequest(user_id="many")
        first = (await one.DeleteJobs(request, timeout=PATIENCE)).deletion.deletion_id
        asked = (one.DeleteJobs(request, timeout=PATIENCE) for _ in range(30))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
        assert len(refused) == 28
        for error in refused:
            assert reason_of(error) == ("RESOURCE_EXHAUSTED", "LIMIT_REACHED")
            assert details_of(error)["RetryInfo"].retry_delay.seconds == 10
        await other.DeleteJobs(request, timeout=PATIENCE)
        async with asyncio.timeout(PATIENCE):
            while not await run_exists(temporal, deletion_workflow_id(stuck.id)):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        for id_ in (first, deletion_workflow_id(stuck.id)):
            described = await temporal.get_workflow_handle(id_).describe()
            priority = described.raw_description.workflow_execution_info.priority
            assert priority.fairness_key == "tenant-a/"
        await stuck.terminate()
        assert (await until_ended(one, first)).state == llm_pb2.DELETION_STATE_DONE
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    await one.DeleteJobs(request, timeout=PATIENCE)
                except grpc.aio.AioRpcError as error:
                    assert reason_of(error) == ("RESOURCE_EXHAUSTED", "LIMIT_REACHED")  # noqa: PT017
                    await asyncio.sleep(0.5)
                else:
                    break
    await gateway.terminate()


async def test_from_python(stack: Stack) -> None:
    async with AsyncClient(stack.address("gateway")) as client:
        fields = {
            "user_id": f"python-{uuid.uuid4().hex[:8]}",
            "request_id": "1",
            "model": "docstrings",
            "prompt": "Hi.",
        }
        job = await client.submit(**fields)
        deletion = await job.delete()
        assert deletion.state == llm_pb2.DELETION_STATE_DONE
        with pytest.raises(JobDeleted):
            await client.submit(**fields)
        await client.submit(**{**fields, "request_id": "2"})
        deletion = await client.delete_jobs(fields["user_id"])
        assert deletion.deleted_jobs == 1
