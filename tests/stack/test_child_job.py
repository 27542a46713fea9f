"""A workflow that is not a job starts a job as its child with `job_start`, as the gateway does."""

from temporalio import workflow
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from jobs import names
from jobs.start import job_start
from llm_pb import internal_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.jobs import new_job, watch

QUEUE = "parents"


@workflow.defn
class Parent:
    """Workflow that runs one job without notifications, whatever the operator's default."""

    @workflow.run
    async def run(self, job: llm_pb2.JobRequest) -> llm_pb2.JobResult:
        chosen = internal_pb2.JobOptions(notify_operator=False)
        start = job_start(job, chosen, id_=f"{workflow.info().workflow_id}/step")
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
