"""Jobs whose ids have the maximum length, on a server that accepts 255 characters, as PostgreSQL does."""

import asyncio
from datetime import timedelta
from functools import partial
from pathlib import Path

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import DeleteWorkflowExecutionRequest
from temporalio.client import Client
from temporalio.service import RPCError

from deploy.local.stack import Stack
from jobs import names
from jobs.ids import (
    MAX_JOB_ID,
    MAX_PIPELINE_ID,
    MAX_TEMPORAL_ID,
    delivery_workflow_id,
    job_digest,
    unshortened_delivery_workflow_id,
    unshortened_workflow_id,
)
from jobs.options import DEFAULTS
from jobs.pipelines import MAX_PATH
from llm_pb import internal_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from payload_converter import data_converter
from tests.support.deliveries import QUICK, exists, settled, until
from tests.support.jobs import details_of, new_job, run_job, watch, webhook
from tests.support.pipelines import follow, new_pipeline, submit
from tests.support.receivers import receiving, status
from tests.support.stacks import FAST, stack_settings

USER = "u" + "-" * 127
"""User id that gives the longest workflow id, because its hyphens are doubled."""


async def test_the_stacks_temporal_takes_no_longer_ids_than_postgresql(temporal: Client) -> None:
    """The tests below rely on this limit."""
    start = partial(temporal.start_workflow, "None", task_queue="nobody", execution_timeout=timedelta(seconds=1))
    with pytest.raises(RPCError, match="exceeds"):
        await start(id="x" * (MAX_TEMPORAL_ID + 1))
    await start(id="x" * MAX_TEMPORAL_ID)


async def test_a_job_of_the_longest_user_and_request_lives_like_any_other(stub: LlmServiceStub) -> None:
    """It is submitted, delivered after its end and redelivered. A repeat finds it, and List shows its key."""
    async with receiving() as sink:
        url = sink.on("/long", status(429, retry_after="3600"), status(200))
        job = new_job(user_id=USER, request_id="r" * 128, params=QUICK, notify=webhook(url))
        id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=job), timeout=20)).workflow_id
        final = (await watch(stub, id_)).final.status
        assert final.workflow_id == id_
        assert final.state == llm_pb2.JOB_STATE_SUCCEEDED
        assert final.notifications[0].state == llm_pb2.NOTIFY_STATE_PENDING, "the delivery must outlive the job"
        repeat = await stub.Submit(llm_pb2.SubmitRequest(job=job))
        assert (repeat.workflow_id, repeat.run_id) == (id_, final.run_id)
        await stub.Redeliver(llm_pb2.RedeliverRequest(workflow_id=id_))
        (entry,) = await until(stub, id_, settled)
        assert entry.state == llm_pb2.NOTIFY_STATE_DELIVERED
        (request, _) = await sink.received("/long", 2)
        assert request.event["subject"] == id_
    assert (await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))).status.run_id == final.run_id
    (listed,) = (await stub.List(llm_pb2.ListRequest(user_id=USER))).jobs
    assert (listed.status.workflow_id, listed.user_id, listed.request_id) == (id_, USER, "r" * 128)


async def test_a_repeat_finds_a_job_that_an_earlier_version_started(stub: LlmServiceStub, temporal: Client) -> None:
    """Its id is not shortened. The repeat starts no second run."""
    job = new_job(user_id=USER, request_id="earlier", model="idle")
    job.user_id = job.user_id[:118]
    id_ = unshortened_workflow_id(job.user_id, job.request_id)
    assert MAX_JOB_ID < len(id_) < MAX_TEMPORAL_ID
    memo = {names.MEMO_DIGEST: job_digest(job), names.MEMO_OPTIONS: internal_pb2.JobOptions(gpu_task_queue="nobody")}
    handle = await temporal.start_workflow(
        names.JOB_WORKFLOW_TYPE, job, id=id_, task_queue=names.WORKFLOW_QUEUE, memo=memo
    )
    found = await stub.Submit(llm_pb2.SubmitRequest(job=job))
    assert (found.workflow_id, found.run_id) == (id_, handle.first_execution_run_id)
    job.prompt = "Something else."
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.Submit(llm_pb2.SubmitRequest(job=job))
    assert error.value.code() == grpc.StatusCode.ALREADY_EXISTS
    await handle.terminate()


async def test_two_long_requests_that_end_differently_are_two_jobs(stub: LlmServiceStub) -> None:
    jobs = [new_job(user_id=USER, request_id="q" * 127 + end, params=QUICK) for end in "ab"]
    first, second = [(await run_job(stub, job)).final.status for job in jobs]
    assert (first.workflow_id, first.run_id) != (second.workflow_id, second.run_id)


async def test_the_longest_path_of_the_longest_pipeline_is_a_job_like_any_other(
    stack: Stack, stub: LlmServiceStub
) -> None:
    path = "/".join(["p" * 32] * 3)
    path += "/" + "q" * (MAX_PATH - len(path) - 1)
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        pipelines = PipelineServiceStub(channel)
        pipeline = new_pipeline("deep", StringValue(value=path), user_id=USER, request_id="r" * 128)
        id_ = (await submit(pipelines, pipeline)).pipeline_id
        assert len(id_) == MAX_PIPELINE_ID
        seen = await follow(pipelines, id_)
    assert seen.result is not None
    step = seen.steps[path].workflow_id
    assert len(step) == MAX_PIPELINE_ID + 1 + MAX_PATH < MAX_JOB_ID
    answer = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=step))
    assert answer.status.state == llm_pb2.JOB_STATE_SUCCEEDED


async def test_a_long_job_can_be_cancelled(stub: LlmServiceStub) -> None:
    job = new_job(user_id=USER, request_id="c" * 128, model="idle")
    id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    assert (await watch(stub, id_)).final.status.state == llm_pb2.JOB_STATE_CANCELLED


async def test_the_deliveries_of_a_job_with_the_longest_id_chosen_by_hand_go_on(
    stub: LlmServiceStub, temporal: Client
) -> None:
    """Such an id leaves no room for the prefix of a delivery workflow."""
    options = internal_pb2.JobOptions()
    options.CopyFrom(DEFAULTS)
    options.notify_hold.FromSeconds(1)
    async with receiving() as sink:
        url = sink.on("/by-hand", status(429, retry_after="3600"), status(200))
        handle = await temporal.start_workflow(
            names.JOB_WORKFLOW_TYPE,
            new_job(params=QUICK, notify=webhook(url)),
            id="by-hand-".ljust(MAX_TEMPORAL_ID, "x"),
            task_queue=names.WORKFLOW_QUEUE,
            memo={names.MEMO_OPTIONS: options},
        )
        await handle.result()
        going_on = await temporal.get_workflow_handle(delivery_workflow_id(handle.id)).describe()
        assert going_on.workflow_type == names.DELIVERY_WORKFLOW_TYPE
        await stub.Redeliver(llm_pb2.RedeliverRequest(workflow_id=handle.id))
        (entry,) = await until(stub, handle.id, settled)
        assert [attempt.http_status for attempt in entry.attempts] == [429, 200]


async def test_an_id_that_no_server_takes_is_not_found(stub: LlmServiceStub) -> None:
    """An earlier version's longer id is an example: the pattern accepts it, and Temporal cannot have it."""
    for call, request in (
        (stub.GetStatus, llm_pb2.GetStatusRequest),
        (stub.GetJob, llm_pb2.GetJobRequest),
        (stub.Cancel, llm_pb2.CancelRequest),
        (stub.ListDeliveries, llm_pb2.ListDeliveriesRequest),
        (stub.Redeliver, llm_pb2.RedeliverRequest),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(request(workflow_id="llmjob-".ljust(400, "x")))
        assert error.value.code() == grpc.StatusCode.NOT_FOUND
        assert details_of(error.value)["ErrorInfo"].reason == "JOB_NOT_FOUND"


async def test_the_deliveries_of_a_job_that_an_earlier_version_started_go_on(tmp_path: Path) -> None:
    """They keep the id that is not shortened, on a server that accepts it, and run neither twice nor under two ids."""
    stack = Stack(
        stack_settings(tmp_path / "stack"),
        only=("temporal", "nats", "gateway", "gpu-worker", "notifier"),
        environment=FAST,
    )
    server, limit = stack.processes["temporal"], f"limit.maxIDLength={MAX_TEMPORAL_ID}"
    assert limit in server.command
    server.command = tuple("limit.maxIDLength=1000" if word == limit else word for word in server.command)
    async with stack, receiving() as sink, grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        stub = LlmServiceStub(channel)
        temporal = await Client.connect(stack.address("temporal"), data_converter=data_converter)
        url = sink.on("/earlier", status(429, retry_after="3600"), status(200))
        job = new_job(user_id=USER, request_id="r" * 128, params=QUICK, notify=webhook(url))
        id_ = unshortened_workflow_id(job.user_id, job.request_id)
        options = internal_pb2.JobOptions()
        options.CopyFrom(DEFAULTS)
        options.notify_hold.FromSeconds(1)
        memo = {names.MEMO_DIGEST: job_digest(job), names.MEMO_OPTIONS: options}
        handle = await temporal.start_workflow(
            names.JOB_WORKFLOW_TYPE, job, id=id_, task_queue=names.WORKFLOW_QUEUE, memo=memo
        )
        await handle.result()
        earlier = await _as_an_earlier_version_left_it(temporal, id_)

        async def sent(times: int) -> None:
            await stub.Redeliver(llm_pb2.RedeliverRequest(workflow_id=id_))
            (entry,) = await until(stub, id_, lambda log: settled(log) and len(log[0].attempts) == times)
            assert [attempt.http_status for attempt in entry.attempts] == [429, *[200] * (times - 1)]
            shown = (await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))).status.notifications
            assert [one.state for one in shown] == [llm_pb2.NOTIFY_STATE_DELIVERED]
            assert not await exists(temporal, delivery_workflow_id(id_))

        await sent(2)
        await temporal.get_workflow_handle(earlier).result()
        await sent(3)


async def _as_an_earlier_version_left_it(temporal: Client, job_id: str) -> str:
    """Move the deliveries of a job to the workflow id that earlier versions used, and return that id."""
    current = temporal.get_workflow_handle(delivery_workflow_id(job_id))
    state = await current.query(names.QUERY_GET_DELIVERIES, result_type=internal_pb2.DeliveryState)
    await current.terminate()
    await temporal.workflow_service.delete_workflow_execution(
        DeleteWorkflowExecutionRequest(
            namespace=temporal.namespace, workflow_execution=WorkflowExecution(workflow_id=current.id)
        )
    )
    async with asyncio.timeout(120):
        while await exists(temporal, current.id):  # noqa: ASYNC110  # nothing notifies
            await asyncio.sleep(0.1)
    earlier = unshortened_delivery_workflow_id(job_id)
    await temporal.start_workflow(names.DELIVERY_WORKFLOW_TYPE, state, id=earlier, task_queue=names.WORKFLOW_QUEUE)
    return earlier
