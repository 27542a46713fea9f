"""A workflow that is not a job starts a job as its child with `job_start`, as the gateway does."""

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from temporalio import workflow
from temporalio.client import Client, WorkflowExecutionDescription, WorkflowHandle
from temporalio.common import Priority
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from deploy.local.stack import Stack
from jobs import names
from jobs.start import job_start
from llm_pb import internal_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from payload_converter.encryption import encrypting
from tests.support.encryption import Keys
from tests.support.jobs import new_job, watch

QUEUE = "parents"


@workflow.defn
class Parent:
    """Workflow that runs one job without notifications, whatever the operator's default."""

    @workflow.run
    async def run(self, job: llm_pb2.JobRequest) -> llm_pb2.JobResult:
        chosen = internal_pb2.JobOptions(notify_operator=False)
        info = workflow.info()
        start = job_start(job, chosen, id_=f"{info.workflow_id}/step", priority=info.priority)
        result: llm_pb2.JobResult = await workflow.execute_child_workflow(
            names.JOB_WORKFLOW_TYPE,
            job,
            id=start.id,
            memo=start.memo,
            search_attributes=start.search_attributes,
            priority=start.priority,
            execution_timeout=start.execution_timeout,
            task_queue=names.WORKFLOW_QUEUE,
            result_type=llm_pb2.JobResult,
        )
        return result


async def test_a_child_is_a_job_like_any_other(temporal: Client, stub: LlmServiceStub) -> None:
    """The API watches and finds it, and its parent gets its result."""
    job = new_job(params={"max_tokens": 5})
    parent = Worker(temporal, task_queue=QUEUE, workflows=[Parent], workflow_runner=UnsandboxedWorkflowRunner())
    async with parent:
        handle = await temporal.start_workflow(Parent.run, job, id=f"parent-{job.request_id}", task_queue=QUEUE)
        result = await handle.result()
    id_ = f"{handle.id}/step"
    seen = await watch(stub, id_)
    assert seen.states[-1] == "SUCCEEDED"
    assert seen.output == result.output.encode() != b""
    status = (await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))).status
    assert not status.notifications
    history = await temporal.get_workflow_handle(id_).fetch_history()
    scheduled = [event.activity_task_scheduled_event_attributes.activity_type.name for event in history.events]
    assert [name for name in scheduled if name] == [names.ACTIVITY_RUN]
    found = await temporal.get_workflow_handle(id_).describe()
    assert found.typed_search_attributes[names.USER_ID] == job.user_id
    assert names.TENANT_ID not in found.typed_search_attributes
    assert found.raw_description.workflow_execution_info.priority.fairness_key == job.user_id


@pytest.mark.parametrize("weight", [None, 0.25])
async def test_a_child_of_a_tenants_workflow_is_the_tenants_and_takes_its_parents_turns(
    temporal: Client, weight: float | None
) -> None:
    job = new_job(params={"max_tokens": 8000})
    own = Priority(fairness_key="acme/of-the-parent", fairness_weight=weight) if weight else Priority()
    parent = Worker(temporal, task_queue=QUEUE, workflows=[Parent], workflow_runner=UnsandboxedWorkflowRunner())
    async with parent:
        id_ = f"llmpipeline--acme-u-{job.request_id}"
        handle = await temporal.start_workflow(Parent.run, job, id=id_, task_queue=QUEUE, priority=own)
        step = temporal.get_workflow_handle(f"{id_}/step")
        async with asyncio.timeout(60):
            while not (found := await described(step)) or not found.raw_description.pending_activities:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        assert found.typed_search_attributes[names.TENANT_ID] == "acme"
        (waiting,) = found.raw_description.pending_activities
        for given in (found.raw_description.workflow_execution_info.priority, waiting.priority):
            assert given.fairness_key == (own.fairness_key or f"acme/{job.user_id}")
            assert given.fairness_weight == (weight or 0)
        await handle.terminate()


async def described(handle: WorkflowHandle[Any, Any]) -> WorkflowExecutionDescription | None:
    """Return the description of a workflow; None before there is one."""
    try:
        return await handle.describe()
    except RPCError as error:
        if error.status == RPCStatusCode.NOT_FOUND:
            return None
        raise


@workflow.defn
class Child:
    """Workflow of a tenant."""

    @workflow.run
    async def run(self, text: str) -> str:
        return f"{text}, back"


@workflow.defn
class ParentOfTenants:
    """Workflow without a tenant whose child has one."""

    @workflow.run
    async def run(self, id_: str) -> str:
        return await workflow.execute_child_workflow(Child.run, "there", id=id_)


async def test_a_tenants_child_brings_its_encrypted_result_to_a_parent_without_a_tenant(
    stack: Stack, tmp_path: Path
) -> None:
    """What the child returns is encrypted for its tenant. What the parent does with it is the parent's."""
    converter = encrypting(Keys(tmp_path).encryption())
    client = await Client.connect(stack.address("temporal"), data_converter=converter)
    runner = UnsandboxedWorkflowRunner()
    async with Worker(client, task_queue=QUEUE, workflows=[ParentOfTenants, Child], workflow_runner=runner):
        id_ = new_job().request_id
        limits = {"task_queue": QUEUE, "execution_timeout": timedelta(minutes=2)}
        handle = await client.start_workflow(ParentOfTenants.run, f"one/{id_}", id=f"parent-{id_}", **limits)
        assert await handle.result() == "there, back"
