"""JobResult lists the attempts of a job: which worker ran each, when, and why it ended."""

import asyncio
from datetime import timedelta

import pytest
from google.protobuf.duration_pb2 import Duration
from temporalio.client import Client

from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.jobs import PATIENCE_SECONDS, new_job, run_job, unpack, until_output, watch


def ends_of(result: llm_pb2.JobResult) -> list[str]:
    return [llm_pb2.AttemptEnd.Name(attempt.end).removeprefix("ATTEMPT_END_") for attempt in result.attempts]


def reasons_of(result: llm_pb2.JobResult) -> list[str]:
    """Return the reason of each attempt's error, empty without one."""
    details = [unpack(attempt.error) for attempt in result.attempts]
    return [detail["ErrorInfo"].reason if detail else "" for detail in details]


async def test_an_attempt_that_failed_is_followed_by_one_that_finished(stub: LlmServiceStub) -> None:
    seen = await run_job(stub, new_job("[[fault:failed@5:once]]", params={"max_tokens": 10}))
    result = seen.final.result
    assert (ends_of(result), reasons_of(result)) == (["FAILED", "FINISHED"], ["ENGINE_FAILED", ""])
    assert [attempt.attempt for attempt in result.attempts] == [1, 2]
    assert {attempt.worker for attempt in result.attempts} == {result.metadata.worker}
    first, second = result.attempts
    times = [first.start_time, first.end_time, second.start_time, second.end_time]
    assert [time.ToNanoseconds() for time in times] == sorted(time.ToNanoseconds() for time in times)
    assert second.start_time == result.metadata.start_time
    answer = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=seen.final.status.workflow_id))
    assert answer.result.attempts == result.attempts


async def test_a_job_that_failed_lists_each_failure(stub: LlmServiceStub) -> None:
    seen = await run_job(stub, new_job("[[fault:oom@5]]", params={"max_tokens": 10}))
    result = seen.final.result
    assert ends_of(result) == ["FAILED"] * result.metadata.attempts
    assert reasons_of(result) == ["OUT_OF_MEMORY"] * result.metadata.attempts


async def test_an_open_job_lists_the_attempts_so_far(stub: LlmServiceStub) -> None:
    """The present one has no end. The result has the same ones."""
    job = new_job("[[fault:failed@5:once]]", params={"max_tokens": 8000})
    id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            found = await stub.GetJob(llm_pb2.GetJobRequest(workflow_id=id_))
            assert not found.HasField("result")
            if len(found.attempts) == 2:
                break
            await asyncio.sleep(0.2)
    first, second = found.attempts
    assert (first.end, unpack(first.error)["ErrorInfo"].reason) == (llm_pb2.ATTEMPT_END_FAILED, "ENGINE_FAILED")
    assert (second.end, second.HasField("end_time")) == (llm_pb2.ATTEMPT_END_UNSPECIFIED, False)
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    result = (await watch(stub, id_)).final.result
    assert result.attempts[0] == first
    assert result.attempts[1].start_time == second.start_time
    closed = await stub.GetJob(llm_pb2.GetJobRequest(workflow_id=id_))
    assert (list(closed.attempts), closed.result.attempts) == ([], result.attempts)


async def test_a_cancelled_attempt(stub: LlmServiceStub) -> None:
    job = new_job(params={"max_tokens": 8000})
    id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    await until_output(stub, id_)
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    result = (await watch(stub, id_)).final.result
    assert (ends_of(result), reasons_of(result)) == (["CANCELLED"], [""])
    assert result.attempts[0].HasField("end_time")


@pytest.mark.parametrize("limit", ["run", "total"])
async def test_attempts_that_exceed_a_limit(stub: LlmServiceStub, limit: str) -> None:
    """The worker does not know why Temporal gives an attempt up, so the workflow says it of the last one."""
    timeouts = llm_pb2.JobTimeouts(**{limit: Duration(seconds=2)})
    job = new_job("[[fault:hang@3]]", params={"max_tokens": 10}, timeouts=timeouts)
    seen = await run_job(stub, job)
    assert seen.states[-1] == "TIMED_OUT"
    result = seen.final.result
    assert ends_of(result)[-1] == "TIMED_OUT"
    assert len(result.attempts) == result.metadata.attempts
    first = result.attempts[0]
    # On a busy machine its heartbeats may have stopped before.
    assert (
        first.end == llm_pb2.ATTEMPT_END_WORKER_LOST
        or first.end_time.ToDatetime() - first.start_time.ToDatetime() > timedelta(seconds=1)
    )


async def test_a_terminated_job_does_not_say_how_its_attempt_ended(stub: LlmServiceStub, temporal: Client) -> None:
    job = new_job(params={"max_tokens": 8000})
    id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    await until_output(stub, id_)
    await temporal.get_workflow_handle(id_).terminate()
    result = (await watch(stub, id_)).final.result
    assert len(result.attempts) == 1
    assert result.attempts[0].worker == result.metadata.worker


async def test_a_job_that_no_worker_has_taken_has_no_attempts(stub: LlmServiceStub) -> None:
    id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=new_job(model="idle")))).workflow_id
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    assert not (await watch(stub, id_)).final.result.attempts
