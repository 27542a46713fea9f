"""GetJob: the job as it was submitted, with what GetStatus says of it."""

import asyncio
from typing import Any, Final

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import DeleteWorkflowExecutionRequest
from temporalio.client import Client

from jobs import limits, names
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from payload_converter import data_converter
from services.gateway.errors import JobNotFound
from services.gateway.job_inputs import JobInputs
from tests.support.deliveries import exists
from tests.support.jobs import Seen, details_of, new_job, run_job, watch
from tests.support.outcomes import run_all

PATIENCE: Final = 60
NOBODYS_QUEUE: Final = "nobody-polls-it"


async def get_job(stub: LlmServiceStub, workflow_id: str) -> llm_pb2.GetJobResponse:
    return await stub.GetJob(llm_pb2.GetJobRequest(workflow_id=workflow_id), timeout=PATIENCE)


async def submit(stub: LlmServiceStub, job: llm_pb2.JobRequest) -> str:
    return (await stub.Submit(llm_pb2.SubmitRequest(job=job), timeout=PATIENCE)).workflow_id


def full_job(**changes: Any) -> llm_pb2.JobRequest:
    """Return a job that sets a field of every kind."""
    return new_job(
        params={"max_tokens": 5, "temperature": 0, "stop": ["never", "ever"]},
        project_id="project",
        priority=3,
        notify=[{"webhook": {"url": "http://127.0.0.1:9/hook?token=secret"}}],
        notify_options={"events": [llm_pb2.NOTIFY_EVENT_FINISHED], "include_output": True},
        timeouts={"total": Duration(seconds=600)},
        labels={"team": "red", "ticket": ""},
        **changes,
    )


async def test_a_job_is_returned_as_it_was_submitted(stub: LlmServiceStub) -> None:
    """What the caller has set to a default stays set, what it has left out is unset. Before the run and after it."""
    for job in (new_job(model="idle"), full_job(model="idle"), new_job(messages=[{"role": 2, "content": "Hi."}])):
        id_ = await submit(stub, job)
        found = await get_job(stub, id_)
        assert found.job == job
        assert found.status.workflow_id == id_
        assert not found.HasField("result")
        await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
        await watch(stub, id_)
        assert (await get_job(stub, id_)).job == job


async def test_every_job_is_returned_whatever_its_outcome(stub: LlmServiceStub, temporal: Client) -> None:
    """With status and result as GetStatus returns them. Jobs that were started by hand are among them."""
    for outcome, id_ in (await run_all(stub, temporal)).items():
        found = await get_job(stub, id_)
        status = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))
        assert (found.status, found.result) == (status.status, status.result), outcome
        history = await temporal.get_workflow_handle(id_).fetch_history()
        payloads = history.events[0].workflow_execution_started_event_attributes.input.payloads
        (submitted,) = await data_converter.decode(payloads, [llm_pb2.JobRequest])
        assert found.job == submitted, outcome
        assert submitted.user_id, outcome


@pytest.mark.parametrize(
    "inputs",
    [[], [llm_pb2.JobRequest(user_id="a"), llm_pb2.JobRequest(user_id="b")], ["a text"], [None], [{"no": "field"}]],
    ids=["none", "two", "a text", "null", "of another form"],
)
async def test_a_workflow_by_hand_without_a_job_has_none(
    stub: LlmServiceStub, temporal: Client, inputs: list[Any]
) -> None:
    id_ = f"no-job-{new_job().request_id}"
    await temporal.start_workflow(names.JOB_WORKFLOW_TYPE, args=inputs, id=id_, task_queue=names.WORKFLOW_QUEUE)
    final = (await watch(stub, id_)).final.status
    found = await get_job(stub, id_)
    assert not found.HasField("job")
    assert found.status == final


async def test_a_job_by_hand_in_json_is_returned(stub: LlmServiceStub, temporal: Client) -> None:
    """As a person writes it in the Temporal CLI."""
    id_ = f"json-{new_job().request_id}"
    job = {"user_id": "u", "request_id": "r", "model": "docstrings", "prompt": "p", "params": {"max_tokens": "2"}}
    await temporal.start_workflow(names.JOB_WORKFLOW_TYPE, job, id=id_, task_queue=names.WORKFLOW_QUEUE)
    await watch(stub, id_)
    assert (await get_job(stub, id_)).job == llm_pb2.JobRequest(
        user_id="u", request_id="r", model="docstrings", prompt="p", params={"max_tokens": 2}
    )


async def test_a_job_of_the_maximum_size_is_returned(stub: LlmServiceStub) -> None:
    job = new_job("", model="idle")
    job.prompt = "x" * (limits.MAX_JOB_BYTES - job.ByteSize() - 4)
    assert job.ByteSize() == limits.MAX_JOB_BYTES
    id_ = await submit(stub, job)
    found = await asyncio.gather(*(get_job(stub, id_) for _ in range(8)))
    assert all(item.job == job for item in found)
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))


async def test_other_workflows_and_ids_are_not_found(stub: LlmServiceStub, temporal: Client) -> None:
    other = await temporal.start_workflow("Another", id=f"other-{new_job().request_id}", task_queue=NOBODYS_QUEUE)
    for id_ in (other.id, "llmjob-no-body"):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await get_job(stub, id_)
        assert error.value.code() == grpc.StatusCode.NOT_FOUND
        assert details_of(error.value)["ErrorInfo"].reason == "JOB_NOT_FOUND"
    await other.terminate()


async def test_a_job_that_is_deleted_meanwhile_is_not_found(stub: LlmServiceStub, temporal: Client) -> None:
    """Between the description of its workflow and the reading of its input."""
    seen = await run_job(stub, new_job(params={"max_tokens": 2}))
    handle = temporal.get_workflow_handle(_id(seen))
    description = await handle.describe()
    execution = WorkflowExecution(workflow_id=handle.id, run_id=description.run_id)
    await temporal.workflow_service.delete_workflow_execution(
        DeleteWorkflowExecutionRequest(namespace=temporal.namespace, workflow_execution=execution)
    )
    async with asyncio.timeout(PATIENCE):
        # Temporal deletes it a moment later, and nothing notifies.
        while await exists(temporal, handle.id):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    with pytest.raises(JobNotFound):
        await JobInputs(temporal).get(description)


async def listed(stub: LlmServiceStub, user_id: str, count: int) -> dict[str, llm_pb2.JobSummary]:
    """Return the jobs of a user by id once there are `count`; visibility learns of a job a moment later."""
    async with asyncio.timeout(PATIENCE):
        while True:
            page = await stub.List(llm_pb2.ListRequest(user_id=user_id, page_size=100), timeout=PATIENCE)
            if len(page.jobs) >= count:
                return {item.status.workflow_id: item for item in page.jobs}
            await asyncio.sleep(0.1)


async def test_list_shows_labels(stub: LlmServiceStub, temporal: Client) -> None:
    """Those of open jobs and of closed ones, but not of one that was started by hand."""
    user = new_job().user_id
    labels = {"team": "red", "ticket": "", "\u00e9": "two\nlines"}
    ended = _id(await run_job(stub, new_job(user_id=user, params={"max_tokens": 2}, labels=labels)))
    open_ = await submit(stub, new_job(user_id=user, model="idle", labels={"a": "b"}))
    bare = await submit(stub, new_job(user_id=user, model="idle"))
    hand = f"labels-by-hand-{user}"
    job = new_job(user_id=user, model="docstrings", params={"max_tokens": 2}, labels=labels)
    await temporal.start_workflow(
        names.JOB_WORKFLOW_TYPE, job, id=hand, task_queue=names.WORKFLOW_QUEUE, memo={names.MEMO_LABELS: "nonsense"}
    )
    await watch(stub, hand)
    found = await listed(stub, user, 4)
    assert {id_: dict(item.labels) for id_, item in found.items()} == {
        ended: labels,
        open_: {"a": "b"},
        bare: {},
        hand: {},
    }
    assert (await get_job(stub, hand)).job.labels == labels
    for id_ in (open_, bare):
        await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))


async def test_a_page_of_the_largest_labels_is_listed(stub: LlmServiceStub) -> None:
    labels = {chr(0x1F600 + number) * 64: chr(0x1F600) * 512 for number in range(16)}
    jobs = [new_job(user_id="large-labels", model="idle", labels=labels) for _ in range(100)]
    ids = [await submit(stub, job) for job in jobs]
    found = await listed(stub, "large-labels", 100)
    assert found.keys() == {*ids}
    assert all(item.labels == labels for item in found.values())
    for id_ in ids:
        await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))


async def test_other_labels_make_another_job(stub: LlmServiceStub) -> None:
    job = new_job(model="idle", labels={"a": "1", "b": "2"})
    id_ = await submit(stub, job)
    assert await submit(stub, job) == id_
    for labels in ({}, {"a": "1"}, {"a": "1", "b": "3"}):
        other = llm_pb2.JobRequest()
        other.CopyFrom(job)
        other.ClearField("labels")
        other.labels.update(labels)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await submit(stub, other)
        assert details_of(error.value)["ErrorInfo"].reason == "REQUEST_ID_REUSED"
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))


def _id(seen: Seen) -> str:
    return seen.final.status.workflow_id
