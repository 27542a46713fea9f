"""A job's whole life through the API, on real servers: every outcome, as watchers and webhooks see it."""

import asyncio
from contextlib import suppress
from typing import ClassVar

import grpc
import nats
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.duration_pb2 import Duration
from temporalio import workflow
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowHandle
from temporalio.common import SearchAttributePair, TypedSearchAttributes
from temporalio.worker import Replayer, UnsandboxedWorkflowRunner

from deploy.local.stack import Stack
from jobs import names
from jobs.targets import describe
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from payload_converter import data_converter
from tests.support.jobs import (
    Seen,
    assert_not_tried_again,
    details_of,
    new_job,
    run_job,
    unpack,
    until_answered,
    until_message,
    until_output,
    watch,
    webhook,
)
from tests.support.paths import ROOT
from tests.support.receivers import Receiver, status
from workflows.llm_job import LLMJobWorkflow

LONG = {"max_tokens": 4000}
"""Parameters of a job that runs until it is stopped."""


async def native_status(temporal: Client, workflow_id: str) -> WorkflowExecutionStatus | None:
    return (await temporal.get_workflow_handle(workflow_id).describe()).status


def reason(status: llm_pb2.JobStatus) -> str:
    """Return the reason of the status's error."""
    return unpack(status.error)["ErrorInfo"].reason


async def test_a_job_succeeds(stub: LlmServiceStub, temporal: Client, receiver: Receiver) -> None:
    """Its tokens arrive as they are generated, its result has them all, and its webhook is notified."""
    job = new_job(
        params={"max_tokens": 60},
        notify=webhook(f"{receiver.url}/ok?token=secret"),
        notify_options={"include_output": True},
        project_id="p1",
    )
    seen = await run_job(stub, job)

    assert seen.states[-1] == "SUCCEEDED"
    assert "RUNNING" in seen.states
    result, status = seen.final.result, seen.final.status
    assert seen.output == result.output.encode() != b""
    assert seen.rewinds == 0
    assert seen.next_offset == len(seen.output)
    assert sum(message.HasField("delta") for message in seen.messages) > 5, "output must come as it is generated"
    progress = [m.status.progress for m in seen.messages if m.status.HasField("progress")]
    assert {"decode", "done"} <= {p.stage for p in progress}
    assert [p.percent for p in progress] == sorted(p.percent for p in progress)
    assert result.finish_reason == llm_pb2.FINISH_REASON_LENGTH
    assert result.metadata.output_tokens == 60
    assert result.metadata.attempts == status.attempt >= 1
    assert result.metadata.engine == "simulated"
    times = [status.create_time, status.start_time, status.first_token_time, status.end_time]
    assert [t.ToNanoseconds() for t in times] == sorted(t.ToNanoseconds() for t in times)
    assert not status.HasField("error")
    assert await native_status(temporal, status.workflow_id) == WorkflowExecutionStatus.COMPLETED

    request, *_ = await receiver.received("/ok")
    event = request.event
    assert request.headers["content-type"].startswith("application/cloudevents+json")
    assert event["type"] == "llm.v1.job.succeeded"
    assert event["subject"] == status.workflow_id
    assert event["data"]["result"]["output"] == result.output
    assert event["data"]["userId"] == job.user_id
    (delivered,) = status.notifications
    assert delivered.state == llm_pb2.NOTIFY_STATE_DELIVERED
    assert delivered.target == describe(job.notify[0])


async def test_version_0_1_0_can_read_the_memo_of_a_job(stub: LlmServiceStub, temporal: Client) -> None:
    """During an upgrade its gateways describe jobs of this version. They refuse a field that they do not know."""
    image = descriptor_pb2.FileDescriptorSet.FromString((ROOT / "tests/contract/protos/0.1.0.binpb").read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in image.file:
        pool.Add(file)  # type: ignore[no-untyped-call]
    seen = await run_job(stub, new_job(params={"max_tokens": 5}))
    description = await temporal.get_workflow_handle(seen.final.status.workflow_id).describe()
    for key, name in ((names.MEMO_STATUS, "llm.v1.JobStatus"), (names.MEMO_OPTIONS, "llm.v1.JobOptions")):
        kind = message_factory.GetMessageClass(pool.FindMessageTypeByName(name))
        json_format.ParseDict(await description.memo_value(key), kind())


async def test_a_job_has_one_time_of_each_kind(stub: LlmServiceStub, receiver: Receiver) -> None:
    """Every answer and the event say the same of when the job was accepted and when its attempt started."""
    job = new_job(params={"max_tokens": 300}, notify=webhook(f"{receiver.url}/times"))
    submit = llm_pb2.SubmitRequest(job=job)
    first, second = await asyncio.gather(stub.Submit(submit), stub.Submit(submit))
    seen = Seen()
    statuses = [first.status, second.status]
    look = llm_pb2.GetStatusRequest(workflow_id=first.workflow_id)
    async for message in stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=first.workflow_id), timeout=60):
        seen.add(message)
        if message.HasField("status"):
            statuses += [message.status, (await stub.GetStatus(look)).status]
    statuses += [(await stub.Submit(submit)).status, (await stub.GetStatus(look)).status]
    # Visibility lags behind.
    async with asyncio.timeout(60):
        while not (listed := (await stub.List(llm_pb2.ListRequest(user_id=job.user_id))).jobs):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    statuses += [entry.status for entry in listed]
    (request, *_) = await receiver.received("/times")
    told = request.event["data"]["status"]
    assert {status.create_time.ToJsonString() for status in statuses} == {told["createTime"]}
    if seen.final.status.attempt == 1:
        started = {status.start_time.ToJsonString() for status in statuses if status.HasField("start_time")}
        assert started == {told["startTime"]}
    assert seen.final.result.metadata.start_time.ToJsonString() == told["startTime"]


async def test_the_feed_forgets_a_job_whose_outcome_is_durable(stack: Stack, stub: LlmServiceStub) -> None:
    """No record of it stays on the broker."""
    seen = await run_job(stub, new_job(params={"max_tokens": 60}))
    client = await nats.connect(f"nats://{stack.address('nats')}")
    subject = f"llm.feed.{seen.final.status.run_id}"
    info = await client.jetstream().stream_info("LLM_FEED", subjects_filter=subject)
    assert not info.state.subjects
    await client.close()


async def test_a_finished_job_is_streamed_from_any_offset(stub: LlmServiceStub) -> None:
    """A late watcher gets every byte after its offset once."""
    seen = await run_job(stub, new_job(params={"max_tokens": 60}))
    size = len(seen.output)
    offsets = [0, len(seen.output.decode()[:10].encode()), size]
    for offset in offsets:
        request = llm_pb2.StreamStatusRequest(workflow_id=seen.final.status.workflow_id, output_offset=offset)
        messages = [message async for message in stub.StreamStatus(request)]
        assert b"".join(m.delta.text.encode() for m in messages) == seen.output[offset:]
        assert messages[-1].result == seen.final.result
        assert messages[-1].next_offset == size
        assert messages[0].status == seen.final.status


async def test_two_watchers_and_a_status_look_agree(stub: LlmServiceStub) -> None:
    """A second watcher that joins in the middle misses nothing."""
    response = await stub.Submit(llm_pb2.SubmitRequest(job=new_job(params={"max_tokens": 100})))
    first = asyncio.create_task(watch(stub, response.workflow_id))
    await until_output(stub, response.workflow_id)
    second = await watch(stub, response.workflow_id)
    assert second.output == (await first).output
    look = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=response.workflow_id))
    assert look.result == second.final.result
    assert look.status == second.final.status


async def test_chat_messages_are_a_prompt(stub: LlmServiceStub) -> None:
    """A conversation is answered like a prompt."""
    messages = [llm_pb2.ChatMessage(role=llm_pb2.ROLE_USER, content="Hello!")]
    seen = await run_job(stub, new_job(messages=messages, params={"max_tokens": 10}))
    assert seen.states[-1] == "SUCCEEDED"


async def test_a_quiet_stream_carries_keepalives(stub: LlmServiceStub) -> None:
    """The stream of a queued job without news is not silent."""
    response = await stub.Submit(llm_pb2.SubmitRequest(job=new_job(model="idle")))
    quiet = 0
    async for message in stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=response.workflow_id), timeout=30):
        quiet += not message.HasField("status")
        if quiet == 2:
            break
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=response.workflow_id))


async def test_the_same_key_submitted_at_once_is_one_job(stub: LlmServiceStub) -> None:
    """Two clients submit one key concurrently, 50 times. Each time there is one workflow, and both get its id."""

    async def both() -> None:
        job = new_job(params={"max_tokens": 1})
        request = llm_pb2.SubmitRequest(job=job)
        one, two = await asyncio.gather(*(until_answered(lambda: stub.Submit(request, timeout=60)) for _ in range(2)))
        assert (one.workflow_id, one.run_id) == (two.workflow_id, two.run_id)
        assert one.run_id

    async with asyncio.timeout(120):
        await asyncio.gather(*(both() for _ in range(50)))


async def test_a_key_belongs_to_one_job(stub: LlmServiceStub) -> None:
    """A key with another body is refused, even after the first job's end. With the same body the job is found."""
    job = new_job(params={"max_tokens": 1})
    seen = await run_job(stub, job)
    again = await stub.Submit(llm_pb2.SubmitRequest(job=job))
    assert again.status.state == llm_pb2.JOB_STATE_SUCCEEDED
    assert again.run_id == seen.final.status.run_id
    job.prompt = "Something else."
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Submit(llm_pb2.SubmitRequest(job=job))
    assert refused.value.code() == grpc.StatusCode.ALREADY_EXISTS
    assert details_of(refused.value)["ErrorInfo"].reason == "REQUEST_ID_REUSED"


async def test_a_job_that_is_written_in_another_way_is_the_same_job(stub: LlmServiceStub) -> None:
    """The forms differ by an explicit default or an empty message, and come in either order."""
    bare = new_job(model="idle")
    whole = llm_pb2.JobRequest()
    whole.CopyFrom(bare)
    whole.priority = 3
    for field in (whole.params, whole.timeouts, whole.notify_options):
        field.SetInParent()
    for first, second in ((bare, whole), (whole, bare)):
        first.request_id = second.request_id = f"{bare.request_id}-again"
        one = await stub.Submit(llm_pb2.SubmitRequest(job=first))
        two = await stub.Submit(llm_pb2.SubmitRequest(job=second))
        assert (one.workflow_id, one.run_id) == (two.workflow_id, two.run_id)
        await stub.Cancel(llm_pb2.CancelRequest(workflow_id=one.workflow_id))


async def test_cancel_keeps_the_partial_output(stub: LlmServiceStub, temporal: Client, receiver: Receiver) -> None:
    """A running job stops immediately, keeps its output, notifies its webhook, and closes as Canceled."""
    job = new_job(params=LONG, notify=webhook(f"{receiver.url}/cancelled"))
    id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    watching = asyncio.create_task(watch(stub, id_))
    await until_output(stub, id_)
    response = await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_, reason="not needed"))
    assert response.status.cancel_requested
    seen = await watching
    assert seen.states[-1] == "CANCELLED"
    assert seen.final.status.error.message == "not needed"
    assert reason(seen.final.status) == "CANCELLED"
    assert seen.final.result.finish_reason == llm_pb2.FINISH_REASON_CANCELLED
    assert seen.final.result.output.encode() == seen.output != b""
    assert 0 < seen.final.result.metadata.output_tokens < 4000
    assert await native_status(temporal, id_) == WorkflowExecutionStatus.CANCELED
    request, *_ = await receiver.received("/cancelled")
    assert request.event["type"] == "llm.v1.job.cancelled"
    again = await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_, reason="again"))
    assert again.status == seen.final.status


async def test_a_queued_job_is_cancelled(stub: LlmServiceStub, temporal: Client) -> None:
    """A job that no worker has taken ends immediately."""
    id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=new_job(model="idle")))).workflow_id
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    seen = await watch(stub, id_)
    assert seen.states[-1] == "CANCELLED"
    assert seen.output == b""
    assert await native_status(temporal, id_) == WorkflowExecutionStatus.CANCELED


async def test_watchers_hear_of_a_cancel_that_came_another_way(
    stack: Stack, stub: LlmServiceStub, temporal: Client
) -> None:
    """The feed reports that the job is ending. A gateway would ask about a silent queued job only after minutes."""
    gateway = stack.add("gateway", {"GATEWAY_POLL": "PT600S"})
    await gateway.start()
    await gateway.wait_ready()
    id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=new_job(model="idle")))).workflow_id
    async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
        seen = Seen()
        async for message in LlmServiceStub(channel).StreamStatus(
            llm_pb2.StreamStatusRequest(workflow_id=id_), timeout=30
        ):
            seen.add(message)
            if seen.states == ["QUEUED"]:
                await temporal.get_workflow_handle(id_).cancel()
    assert seen.states[-1] == "CANCELLED"
    await gateway.terminate()


async def test_cancel_changes_nothing_once_the_outcome_is_settled(stub: LlmServiceStub, receiver: Receiver) -> None:
    """A Cancel during the delivery does not change the outcome."""
    job = new_job(params={"max_tokens": 1}, notify=webhook(receiver.on("/settled", status(503))))
    id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    await receiver.received("/settled")
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    assert (await watch(stub, id_)).states[-1] == "SUCCEEDED"


async def test_temporals_own_cancel_is_a_cancel(stub: LlmServiceStub, temporal: Client, receiver: Receiver) -> None:
    """A cancel from the Web UI or the CLI keeps the partial output and notifies the webhook."""
    job = new_job(params=LONG, notify=webhook(f"{receiver.url}/native"))
    id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    await until_output(stub, id_)
    await temporal.get_workflow_handle(id_).cancel()
    seen = await watch(stub, id_)
    assert seen.states[-1] == "CANCELLED"
    assert seen.final.result.output
    assert await native_status(temporal, id_) == WorkflowExecutionStatus.CANCELED
    await receiver.received("/native")


async def listed(stub: LlmServiceStub, user_id: str) -> llm_pb2.JobStatus:
    """Return the status of the user's only job from List, once List shows that it has ended."""
    async with asyncio.timeout(60):
        while True:
            # Temporal's visibility store is updated a moment later, and nothing notifies.
            for job in (await stub.List(llm_pb2.ListRequest(user_id=user_id))).jobs:
                if job.status.HasField("end_time"):
                    return job.status
            await asyncio.sleep(0.1)


def in_a_list(status: llm_pb2.JobStatus) -> llm_pb2.JobStatus:
    """Return the part of the status that List shows."""
    shown = llm_pb2.JobStatus()
    shown.CopyFrom(status)
    shown.ClearField("progress")
    shown.ClearField("notifications")
    return shown


@workflow.defn(name=names.JOB_WORKFLOW_TYPE)
class Replayed(LLMJobWorkflow):
    """Workflow that stores the final status that its query returns."""

    final: ClassVar[dict[str, llm_pb2.JobStatus]] = {}

    @workflow.run
    async def run(self, job: llm_pb2.JobRequest | None = None) -> llm_pb2.JobResult:
        try:
            return await super().run(job)
        finally:
            self.final[workflow.info().workflow_id] = self.get_status().status


async def test_a_job_that_is_cancelled_in_the_queue_has_one_end_time(stub: LlmServiceStub, temporal: Client) -> None:
    """Stream, GetStatus, List and a replay of the workflow all have the same end time."""
    runner = UnsandboxedWorkflowRunner()
    replayer = Replayer(workflows=[Replayed], data_converter=data_converter, workflow_runner=runner)

    async def cancel_one() -> None:
        job = new_job(model="idle")
        id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=job), timeout=60)).workflow_id
        await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_), timeout=60)
        final = (await watch(stub, id_)).final.status
        assert final.state == llm_pb2.JOB_STATE_CANCELLED
        looked_up = (await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_), timeout=60)).status
        assert in_a_list(looked_up) == in_a_list(final)
        assert await listed(stub, job.user_id) == in_a_list(final)
        await replayer.replay_workflow(await temporal.get_workflow_handle(id_).fetch_history())
        assert Replayed.final[id_].end_time == final.end_time

    # On a busy worker the workflow sees the end of a local activity only in the next workflow task.
    await asyncio.gather(*(cancel_one() for _ in range(16)))


async def test_temporals_terminate_is_told_as_it_is(stub: LlmServiceStub, temporal: Client) -> None:
    """Temporal runs no more workflow code, so no webhook is notified. The status has the reason and the progress."""
    job = new_job(params=LONG)
    id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    watching = asyncio.create_task(watch(stub, id_))
    await until_output(stub, id_)
    await temporal.get_workflow_handle(id_).terminate("maintenance")
    seen = await watching
    assert seen.states[-1] == "CANCELLED"
    assert reason(seen.final.status) == "TERMINATED"
    assert seen.final.status.attempt >= 1
    assert seen.final.result.metadata.attempts == seen.final.status.attempt
    assert seen.final.result.finish_reason == llm_pb2.FINISH_REASON_CANCELLED
    assert_kept(seen)
    look = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))
    assert (look.status, look.result) == (seen.final.status, seen.final.result)
    assert await listed(stub, job.user_id) == in_a_list(look.status)
    assert (await watch(stub, id_)).output == seen.output


async def test_a_job_that_ends_before_its_first_step_is_told_as_it_is(stub: LlmServiceStub, temporal: Client) -> None:
    """No worker runs its workflow, which can therefore not answer a query."""
    handle: WorkflowHandle[None, None] = await temporal.start_workflow(
        names.JOB_WORKFLOW_TYPE,
        new_job(),
        id="llmjob-nobody-1",
        task_queue="nobody",
        search_attributes=TypedSearchAttributes([SearchAttributePair(names.USER_ID, "nobody")]),
    )
    watching = asyncio.create_task(watch(stub, handle.id))
    status = (await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=handle.id))).status
    assert status.state == llm_pb2.JOB_STATE_QUEUED
    await handle.terminate()
    final = (await watching).final.status
    assert reason(final) == "TERMINATED"
    assert await listed(stub, "nobody") == in_a_list(final)


async def test_a_fault_of_the_engine_is_tried_again(stub: LlmServiceStub) -> None:
    """The second attempt succeeds. Watchers end with the correct text and see the attempt's number."""
    seen = await run_job(stub, new_job("[[fault:failed@20:once]] go", params={"max_tokens": 40}))
    assert seen.states[-1] == "SUCCEEDED"
    assert seen.final.status.attempt >= 2
    assert seen.output == seen.final.result.output.encode()
    assert seen.final.result.metadata.output_tokens == 40


async def test_a_fault_that_stays_fails_the_job(stub: LlmServiceStub, temporal: Client, receiver: Receiver) -> None:
    """After the last attempt the job is FAILED with the reason and partial output, and its webhook is notified."""
    job = new_job("[[fault:oom@20]]", params={"max_tokens": 40}, notify=webhook(f"{receiver.url}/failed"))
    seen = await run_job(stub, job)
    assert seen.states[-1] == "FAILED"
    assert reason(seen.final.status) == "OUT_OF_MEMORY"
    assert seen.final.status.attempt == 3
    assert seen.final.result.metadata.output_tokens == 20
    assert seen.final.result.output.encode() == seen.output
    assert await native_status(temporal, seen.final.status.workflow_id) == WorkflowExecutionStatus.FAILED
    request, *_ = await receiver.received("/failed")
    assert request.event["type"] == "llm.v1.job.failed"


async def test_a_job_for_another_model_is_not_tried_again(stub: LlmServiceStub) -> None:
    """The worker's refusal is final."""
    seen = await run_job(stub, new_job(model="structured"))
    assert seen.states[-1] == "FAILED"
    assert reason(seen.final.status) == "UNKNOWN_MODEL"
    assert_not_tried_again(seen)


async def test_a_job_that_nobody_takes_times_out(stub: LlmServiceStub, receiver: Receiver) -> None:
    """After the queue timeout the job is TIMED_OUT with the reason, and its webhook is notified."""
    timeouts = llm_pb2.JobTimeouts(queue=Duration(seconds=1))
    job = new_job(model="idle", timeouts=timeouts, notify=webhook(f"{receiver.url}/late"))
    seen = await run_job(stub, job)
    assert seen.states[-1] == "TIMED_OUT"
    assert reason(seen.final.status) == "QUEUE_TIMEOUT"
    request, *_ = await receiver.received("/late")
    assert request.event["type"] == "llm.v1.job.timed_out"


async def test_attempts_that_take_too_long_time_out(stub: LlmServiceStub) -> None:
    """Three attempts reach the run timeout. Each continues after the one before, and the output is kept."""
    timeouts = llm_pb2.JobTimeouts(run=Duration(seconds=1))
    seen = await run_job(stub, new_job(params=LONG, timeouts=timeouts))
    assert seen.states[-1] == "TIMED_OUT"
    assert reason(seen.final.status) == "RUN_TIMEOUT"
    assert seen.final.status.attempt == 3
    assert_kept(seen)


async def test_a_cancel_between_attempts_keeps_the_output(stack: Stack) -> None:
    gateway = stack.add("gateway", {"GATEWAY_RETRY_INTERVAL": "PT60S"})
    await gateway.start()
    await gateway.wait_ready()
    seen = Seen()
    async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
        stub = LlmServiceStub(channel)
        id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=new_job("[[fault:failed@20]]", params=LONG)))).workflow_id
        async for message in stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=id_), timeout=30):
            seen.add(message)
            if message.status.error.message and not message.status.cancel_requested:
                await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    await gateway.terminate()
    assert seen.states[-1] == "CANCELLED"
    assert seen.final.result.metadata.output_tokens == 20
    assert_kept(seen)


def assert_kept(seen: Seen) -> None:
    """Assert that the result has exactly the watcher's output, without a rewind."""
    assert seen.final.result.output.encode() == seen.output != b""
    assert seen.rewinds == 0
    assert seen.final.result.metadata.prompt_tokens > 0
    assert seen.final.result.metadata.start_time == seen.final.status.start_time


async def test_the_total_time_ends_the_workflow_as_timed_out(
    stub: LlmServiceStub, temporal: Client, receiver: Receiver
) -> None:
    """The outcome is notified before Temporal closes the workflow."""
    timeouts = llm_pb2.JobTimeouts(total=Duration(seconds=2))
    job = new_job(params=LONG, timeouts=timeouts, notify=webhook(f"{receiver.url}/total"))
    seen = await run_job(stub, job)
    assert seen.states[-1] == "TIMED_OUT"
    assert reason(seen.final.status) == "TOTAL_TIMEOUT"
    assert_kept(seen)
    assert await native_status(temporal, seen.final.status.workflow_id) == WorkflowExecutionStatus.TIMED_OUT
    await receiver.received("/total")


async def test_the_shortest_total_time_keeps_the_output(stub: LlmServiceStub, temporal: Client) -> None:
    """Temporal's timers can be a second late. Its timeout of the workflow must come after the outcome is settled."""
    timeouts = llm_pb2.JobTimeouts(total=Duration(seconds=1))
    outcomes = await asyncio.gather(*(run_job(stub, new_job(params=LONG, timeouts=timeouts)) for _ in range(5)))
    for seen in outcomes:
        assert seen.states[-1] == "TIMED_OUT"
        assert reason(seen.final.status) == "TOTAL_TIMEOUT"
        assert seen.final.result.output.encode() == seen.output
        assert seen.rewinds == 0
        id_ = seen.final.status.workflow_id
        assert await native_status(temporal, id_) == WorkflowExecutionStatus.TIMED_OUT
        again = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))
        assert (again.status, again.result) == (seen.final.status, seen.final.result)
    # On a busy machine a job may end before a worker has taken it.
    assert any(seen.output for seen in outcomes)


async def test_the_limit_that_ran_out_is_named(stub: LlmServiceStub) -> None:
    """A total time below the other limits is what ended the job, whichever of them Temporal reports."""
    total = Duration(nanos=1_000_000)
    outcomes = await asyncio.gather(
        *(
            run_job(stub, new_job(model=model, params=LONG, timeouts=llm_pb2.JobTimeouts(total=total)))
            for model in ("idle", "docstrings")
            for _ in range(10)
        )
    )
    assert [reason(seen.final.status) for seen in outcomes] == ["TOTAL_TIMEOUT"] * 20


async def test_list_finds_jobs_by_what_they_are(stub: LlmServiceStub) -> None:
    """Filters combine, pages continue, and an open job shows its state."""
    user = "lister"
    jobs = [new_job(user_id=user, params={"max_tokens": 1}, project_id=f"p{n % 2}") for n in range(3)]
    for job in jobs:
        await run_job(stub, job)
    waiting = await stub.Submit(llm_pb2.SubmitRequest(job=new_job(user_id=user, model="idle")))

    async def found(**filters: object) -> list[str]:
        return [job.request_id for job in (await stub.List(llm_pb2.ListRequest(user_id=user, **filters))).jobs]

    async with asyncio.timeout(60):
        # Temporal's visibility store is updated a moment later, and nothing notifies.
        while len(await found()) < 4 or len(await found(states=[llm_pb2.JOB_STATE_SUCCEEDED])) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    everything = await stub.List(llm_pb2.ListRequest(user_id=user))
    assert everything.jobs[0].status.workflow_id == waiting.workflow_id, "open jobs must come first"
    assert everything.jobs[0].status.state == llm_pb2.JOB_STATE_QUEUED
    assert await found(project_id="p1") == [jobs[1].request_id]
    assert await found(model="idle") == await found(states=[llm_pb2.JOB_STATE_QUEUED])
    assert await found(states=[llm_pb2.JOB_STATE_FAILED, llm_pb2.JOB_STATE_CANCELLED]) == []

    async def page(size: int, token: str = "") -> llm_pb2.ListResponse:
        answer = await stub.List(llm_pb2.ListRequest(user_id=user, page_size=size, page_token=token))
        for job in answer.jobs:
            # Other tests' jobs wait in the same queue, so it changes from call to call.
            job.status.ClearField("queue")
        return answer

    async def in_pages() -> list[llm_pb2.JobSummary]:
        first = await page(3)
        return [*first.jobs, *(await page(3, first.next_page_token)).jobs]

    pages, everything = await in_pages(), await page(20)
    with suppress(TimeoutError):
        async with asyncio.timeout(60):
            # Temporal may still write a job's closing record, which moves it from one page to another.
            while pages != [*everything.jobs]:
                pages, everything = await in_pages(), await page(20)
    assert pages == [*everything.jobs], f"{pages}\n\n{[*everything.jobs]}"
    (ended,) = [job.status for job in everything.jobs if job.request_id == jobs[0].request_id]
    assert (ended.attempt >= 1, ended.HasField("first_token_time"), ended.HasField("progress")) == (True, True, False)
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=waiting.workflow_id))


async def test_models_say_whether_they_are_served(stub: LlmServiceStub) -> None:
    """A worker polls for one model, and none for the other."""
    models = {model.name: model for model in (await stub.ListModels(llm_pb2.ListModelsRequest())).models}
    assert models["docstrings"].available
    assert not models["idle"].available
    assert models["structured"].structured_output


async def test_a_job_near_temporals_payload_limit_runs(stub: LlmServiceStub) -> None:
    """A prompt of almost 2 MiB passes every hop. The job fails on the worker, whose context is smaller."""
    job = new_job("x " * 980_000, model="structured")
    seen = await run_job(stub, job)
    assert reason(seen.final.status) == "UNKNOWN_MODEL"


async def test_a_cancel_between_two_attempts_is_what_ends_the_output(stack: Stack) -> None:
    """The last attempt failed by itself, but the job was cancelled, and its result has that finish reason, too."""
    patient = stack.add("gateway", {"GATEWAY_RETRY_INTERVAL": "PT60S"})
    await patient.start()
    await patient.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(patient.name)) as channel:
        client = LlmServiceStub(channel)
        job = new_job("[[fault:failed@5]]", params={"max_tokens": 50})
        id_ = (await client.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id

        def waits_for_another_attempt(message: llm_pb2.StreamStatusResponse) -> bool:
            return message.status.state == llm_pb2.JOB_STATE_QUEUED and message.status.HasField("error")

        await until_message(client, id_, waits_for_another_attempt)
        await client.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
        seen = await watch(client, id_)
    await patient.terminate()
    assert seen.states[-1] == "CANCELLED"
    assert seen.final.result.finish_reason == llm_pb2.FINISH_REASON_CANCELLED
    assert seen.final.result.metadata.output_tokens == 5
