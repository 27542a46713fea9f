"""Deliveries from the job to the receiver, on real servers: events, retries and the delivery log."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given, settings
from hypothesis import strategies as st
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import DeleteWorkflowExecutionRequest
from temporalio.client import Client, WorkflowExecutionStatus

from deploy.local.stack import Stack
from jobs import names
from jobs.ids import delivery_workflow_id
from jobs.options import DEFAULTS
from jobs.targets import describe
from llm_pb import internal_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.deliveries import QUICK, deliveries, exists, settled, until
from tests.support.jobs import details_of, new_job, run_job, unpack, until_output, watch, webhook
from tests.support.receivers import (
    Receiver,
    Reply,
    close_early,
    endless_body,
    endless_headers,
    hang,
    receiving,
    status,
)
from workflows.deliveries import next_attempt


@pytest.fixture(scope="module")
async def sink() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


async def test_an_event_is_small_by_default(stub: LlmServiceStub, sink: Receiver) -> None:
    """It has ids, state and usage, and the output only on request. The event reports what it omits."""
    url = sink.on("/small", status(200))
    job = new_job("Tell me.", params={"max_tokens": 500}, notify=webhook(url))
    seen = await run_job(stub, job)
    (request,) = await sink.received("/small")
    data = request.event["data"]
    assert len(request.body) < 2048
    assert "output" not in data["result"]
    assert data["outputOmitted"]
    assert data["result"]["metadata"]["outputTokens"] == "500"
    assert (data["userId"], data["requestId"], data["model"]) == (job.user_id, job.request_id, "docstrings")
    assert data["status"]["workflowId"] == seen.final.status.workflow_id

    whole = new_job(
        params=QUICK, notify=webhook(sink.on("/whole", status(200))), notify_options={"include_output": True}
    )
    seen = await run_job(stub, whole)
    (request,) = await sink.received("/whole")
    assert request.event["data"]["result"]["output"] == seen.final.result.output
    assert "outputOmitted" not in request.event["data"]


async def test_an_event_carries_a_result_up_to_a_limit(stub: LlmServiceStub, sink: Receiver) -> None:
    """The limit is 256 KiB. A larger result omits output and logprobs, the event reports it, and GetStatus has them."""

    async def delivered(path: str, tokens: int) -> tuple[llm_pb2.JobResult, dict[str, Any]]:
        job = new_job(
            params={"max_tokens": tokens, "logprobs": 20},
            notify=webhook(sink.on(path, status(200))),
            notify_options={"include_output": True},
        )
        seen = await run_job(stub, job)
        (request,) = await sink.received(path)
        look = llm_pb2.GetStatusRequest(workflow_id=seen.final.status.workflow_id)
        return (await stub.GetStatus(look)).result, request.event["data"]

    (below, whole), (above, cut) = await asyncio.gather(delivered("/below", 700), delivered("/above", 1400))
    assert below.ByteSize() < 256 * 1024 < above.ByteSize()
    assert "outputOmitted" not in whole
    assert whole["result"]["output"] == below.output
    assert len(whole["result"]["logprobs"]) == 700
    assert cut["outputOmitted"]
    assert cut["result"].keys() == {"finishReason", "metadata", "attempts"}
    assert cut["result"]["metadata"]["outputTokens"] == "1400"
    look = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=cut["status"]["workflowId"]))
    assert look.result == above
    assert len(above.logprobs) == 1400


@pytest.mark.parametrize(
    ("name", "reply", "times", "says"),
    [
        ("fails", status(503), 3, "503"),
        ("redirects", status(302, location="/elsewhere"), 3, "302"),
        ("hangs", hang, 2, "within"),
        ("closes-early", close_early, 3, "closed the connection"),
        ("endless-headers", endless_headers, 3, "not valid HTTP"),
    ],
)
async def test_a_delivery_is_tried_until_its_receiver_takes_it(
    stub: LlmServiceStub, temporal: Client, sink: Receiver, name: str, reply: Reply, times: int, says: str
) -> None:
    """The job ends meanwhile. Every attempt has the same id, and the log has them all."""
    path = f"/later/{name}"
    url = sink.on(path, *[reply] * times, status(200))
    sink.on("/elsewhere", status(200))
    job = new_job(params=QUICK, notify=webhook(f"{url}?token=secret"))
    final = (await run_job(stub, job)).final.status
    assert final.state == llm_pb2.JOB_STATE_SUCCEEDED
    (shown,) = final.notifications
    assert shown.state == llm_pb2.NOTIFY_STATE_PENDING, "the job waited for the delivery"
    assert says in shown.error.message
    assert shown.HasField("next_attempt_time")
    (entry,) = await until(stub, final.workflow_id, settled)
    assert entry.state == llm_pb2.NOTIFY_STATE_DELIVERED
    assert not entry.attempts[-1].HasField("error")
    assert entry.attempts[-1].http_status == 200
    assert any(says in attempt.error.message for attempt in entry.attempts[:-1])
    assert entry.target == describe(job.notify[0])
    began = [attempt.time.ToNanoseconds() for attempt in entry.attempts]
    assert began == sorted(began)
    requests = await sink.received(path, times + 1)
    assert {request.headers["webhook-id"] for request in requests} == {entry.id} == {requests[0].event["id"]}
    # On a busy machine an attempt may count as lost and be repeated, whether or not it reached the receiver.
    assert len(requests) > times
    assert len(entry.attempts) > times
    assert len({request.body for request in requests}) == 1
    assert not sink.so_far("/elsewhere"), "the notifier followed a redirect"
    look = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=final.workflow_id))
    (shown,) = look.status.notifications
    assert shown.state == llm_pb2.NOTIFY_STATE_DELIVERED
    assert not shown.HasField("error")


async def test_a_clients_tracestate_goes_no_further(stub: LlmServiceStub, temporal: Client, sink: Receiver) -> None:
    """It is neither in the job's history nor in requests to receivers. Receivers do get the traceparent."""
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    metadata = (("traceparent", f"00-{trace_id}-00f067aa0ba902b7-01"), ("tracestate", "vendor=ofthecaller"))
    job = new_job(params=QUICK, notify=webhook(sink.on("/traced", status(200))))
    id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=job), metadata=metadata)).workflow_id
    (request,) = await sink.received("/traced")
    assert request.headers["traceparent"].split("-")[1] == trace_id
    assert "tracestate" not in request.headers
    history = await temporal.get_workflow_handle(id_).fetch_history()
    assert trace_id in str(history.events)
    assert "ofthecaller" not in str(history.events)


async def test_an_endless_body_is_not_read(stub: LlmServiceStub, sink: Receiver) -> None:
    """The status alone decides."""
    seen = await run_job(stub, new_job(params=QUICK, notify=webhook(sink.on("/endless", endless_body))))
    (shown,) = seen.final.status.notifications
    assert shown.state == llm_pb2.NOTIFY_STATE_DELIVERED


async def test_gone_stops_a_delivery_for_good(stub: LlmServiceStub, temporal: Client, sink: Receiver) -> None:
    """After 410 there is no further attempt and no delivery workflow."""
    seen = await run_job(stub, new_job(params=QUICK, notify=webhook(sink.on("/gone", status(410)))))
    (shown,) = seen.final.status.notifications
    assert shown.state == llm_pb2.NOTIFY_STATE_FAILED
    assert unpack(shown.error)["ErrorInfo"].reason == "DELIVERY_REFUSED"
    (entry,) = await deliveries(stub, seen.final.status.workflow_id)
    assert entry.attempts[-1].http_status == 410
    with pytest.raises(Exception, match="not found"):
        await temporal.get_workflow_handle(delivery_workflow_id(seen.final.status.workflow_id)).describe()


async def test_a_delivery_is_given_up_in_the_end(stub: LlmServiceStub, temporal: Client, sink: Receiver) -> None:
    """Its last attempt comes at the end of the time that the operator allows."""
    seen = await run_job(stub, new_job(params=QUICK, notify=webhook(sink.on("/never", status(503)))))
    id_ = seen.final.status.workflow_id
    (entry,) = await until(stub, id_, settled)
    assert entry.state == llm_pb2.NOTIFY_STATE_FAILED
    # The attempt itself took a moment.
    assert entry.attempts[-1].time.ToDatetime() >= entry.give_up_time.ToDatetime() - timedelta(seconds=1)
    assert not entry.HasField("next_attempt_time")
    ended = await temporal.get_workflow_handle(delivery_workflow_id(id_)).describe()
    assert ended.status == WorkflowExecutionStatus.COMPLETED
    look = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))
    assert look.status.notifications[0].state == llm_pb2.NOTIFY_STATE_FAILED
    assert "503" in look.status.notifications[0].error.message


@pytest.mark.parametrize(("code", "form"), [(429, "seconds"), (429, "date"), (503, "seconds")])
async def test_a_receiver_says_when_to_come_back(stub: LlmServiceStub, sink: Receiver, code: int, form: str) -> None:
    """Retry-After of 429 and 503 is respected, even far above the schedule's own interval."""
    until_then = datetime.now(UTC) + timedelta(seconds=3)
    value = "2" if form == "seconds" else format_datetime(until_then, usegmt=True)
    url = sink.on(f"/busy/{code}/{form}", status(code, retry_after=value), status(200))
    seen = await run_job(stub, new_job(params=QUICK, notify=webhook(url)))
    (entry,) = await until(stub, seen.final.status.workflow_id, settled)
    first, *_, second = entry.attempts
    assert (first.http_status, second.http_status) == (code, 200)
    if form == "seconds":
        assert second.time.ToDatetime() - first.time.ToDatetime() >= timedelta(seconds=2)
    else:
        assert second.time.ToDatetime(UTC) >= until_then.replace(microsecond=0)


async def test_a_failing_target_delays_no_other(stub: LlmServiceStub, sink: Receiver) -> None:
    """A job's good target is notified immediately while the other one hangs."""
    good, bad = sink.on("/beside/good", status(200)), sink.on("/beside/bad", hang)
    response = await stub.Submit(
        llm_pb2.SubmitRequest(job=new_job(params=QUICK, notify=[*webhook(bad), *webhook(good)]))
    )
    await sink.received("/beside/good")
    look = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=response.workflow_id))
    assert look.status.state == llm_pb2.JOB_STATE_NOTIFYING
    states = [shown.state for shown in (await watch(stub, response.workflow_id)).final.status.notifications]
    assert states == [llm_pb2.NOTIFY_STATE_PENDING, llm_pb2.NOTIFY_STATE_DELIVERED]


async def test_a_delivery_is_sent_again(stub: LlmServiceStub, sink: Receiver) -> None:
    """After the job's end a delivery is sent again to the named targets, under the same id and in the same log."""
    one, two = sink.on("/again/one", status(410), status(200)), sink.on("/again/two", status(200))
    seen = await run_job(stub, new_job(params=QUICK, notify=[*webhook(one), *webhook(two)]))
    id_ = seen.final.status.workflow_id
    first, _ = await deliveries(stub, id_)
    assert first.state == llm_pb2.NOTIFY_STATE_FAILED
    again = await stub.Redeliver(llm_pb2.RedeliverRequest(workflow_id=id_, delivery_ids=[first.id]))
    assert [item.id for item in again.deliveries] == [first.id]
    first, second = await until(stub, id_, lambda log: settled(log) and len(log[0].attempts) >= 2)
    assert [attempt.http_status for attempt in first.attempts if attempt.http_status] == [410, 200]
    sent = len(second.attempts)
    before = len(first.attempts)
    await stub.Redeliver(llm_pb2.RedeliverRequest(workflow_id=id_))
    first, second = await until(stub, id_, lambda log: settled(log) and len(log[0].attempts) > before)
    assert len(second.attempts) > sent
    requests = await sink.received("/again/one", 3)
    assert {request.headers["webhook-id"] for request in requests} == {first.id}
    look = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))
    assert {shown.state for shown in look.status.notifications} == {llm_pb2.NOTIFY_STATE_DELIVERED}


async def test_sending_again_does_not_wait_for_the_next_attempt(stub: LlmServiceStub, sink: Receiver) -> None:
    """A delivery that waits for its next attempt is attempted immediately."""
    url = sink.on("/at-once", status(429, retry_after="3600"), status(200))
    seen = await run_job(stub, new_job(params=QUICK, notify=webhook(url)))
    id_ = seen.final.status.workflow_id
    await stub.Redeliver(llm_pb2.RedeliverRequest(workflow_id=id_))
    (entry,) = await until(stub, id_, settled)
    assert [entry.attempts[0].http_status, entry.attempts[-1].http_status] == [429, 200]


async def refused(call: grpc.aio.UnaryUnaryCall[object, object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code(), details_of(error.value)["ErrorInfo"].reason


async def test_what_cannot_be_sent_again_is_refused(stub: LlmServiceStub, temporal: Client, sink: Receiver) -> None:
    """The error has the reason."""
    nobody = llm_pb2.RedeliverRequest(workflow_id="llmjob-nobody-nothing")
    assert await refused(stub.Redeliver(nobody)) == (grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND")
    listed = llm_pb2.ListDeliveriesRequest(workflow_id="llmjob-nobody-nothing")
    assert await refused(stub.ListDeliveries(listed)) == (grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND")
    running = await stub.Submit(llm_pb2.SubmitRequest(job=new_job(model="idle")))
    early = llm_pb2.RedeliverRequest(workflow_id=running.workflow_id)
    assert await refused(stub.Redeliver(early)) == (grpc.StatusCode.FAILED_PRECONDITION, "JOB_NOT_ENDED")
    assert await deliveries(stub, running.workflow_id) == []
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=running.workflow_id))
    ended = await run_job(stub, new_job(params=QUICK, notify=webhook(sink.on("/ended", status(200)))))
    unknown = llm_pb2.RedeliverRequest(workflow_id=ended.final.status.workflow_id, delivery_ids=["other"])
    assert await refused(stub.Redeliver(unknown)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


async def listed_and_redelivered(stub: LlmServiceStub, workflow_id: str) -> list[tuple[grpc.StatusCode, str]]:
    """Return the codes and reasons with which ListDeliveries and Redeliver refuse the id."""
    return [
        await refused(stub.ListDeliveries(llm_pb2.ListDeliveriesRequest(workflow_id=workflow_id))),
        await refused(stub.Redeliver(llm_pb2.RedeliverRequest(workflow_id=workflow_id))),
    ]


NO_JOB = [(grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND")] * 2


async def test_a_workflow_that_is_no_job_has_no_deliveries(
    stub: LlmServiceStub, temporal: Client, sink: Receiver
) -> None:
    """The workflow of a job's deliveries has none either, although it could answer the query."""
    url = sink.on("/no-job", status(429, retry_after="3600"))
    seen = await run_job(stub, new_job(params=QUICK, notify=webhook(url)))
    delivering = delivery_workflow_id(seen.final.status.workflow_id)
    assert await exists(temporal, delivering)
    assert await listed_and_redelivered(stub, delivering) == NO_JOB
    assert not await exists(temporal, delivery_workflow_id(delivering))
    assert len(sink.so_far("/no-job")) == 1


async def test_a_workflow_in_the_place_of_a_jobs_deliveries_is_not_believed(
    stub: LlmServiceStub, temporal: Client, sink: Receiver
) -> None:
    """It counts only if it has the right type and belongs to this run of the job."""
    job = new_job(params=QUICK, notify=webhook(sink.on("/in-place", status(200))))
    seen = await run_job(stub, job)
    true = await deliveries(stub, seen.final.status.workflow_id)
    in_place = await temporal.start_workflow(
        names.JOB_WORKFLOW_TYPE,
        new_job(params=QUICK, notify=webhook(sink.on("/impostor", status(200)))),
        id=delivery_workflow_id("no-job-1"),
        task_queue=names.WORKFLOW_QUEUE,
    )
    await in_place.result()
    assert await listed_and_redelivered(stub, "no-job-1") == NO_JOB
    state = internal_pb2.DeliveryState(options=DEFAULTS)
    state.event.status.workflow_id = seen.final.status.workflow_id
    state.event.status.run_id = "another"
    for id_ in ("no-job-2", seen.final.status.workflow_id):
        handle = await temporal.start_workflow(
            names.DELIVERY_WORKFLOW_TYPE, state, id=delivery_workflow_id(id_), task_queue=names.WORKFLOW_QUEUE
        )
        await handle.result()
    assert await listed_and_redelivered(stub, "no-job-2") == NO_JOB
    assert await deliveries(stub, seen.final.status.workflow_id) == true


async def test_deliveries_outlive_the_record_of_their_job(
    stub: LlmServiceStub, temporal: Client, sink: Receiver
) -> None:
    """After the job's retention, imitated by deletion, the delivery workflow answers and sends again."""
    url = sink.on("/outlived", status(410), status(200))
    seen = await run_job(stub, new_job(params=QUICK, notify=webhook(url)))
    job = seen.final.status
    await stub.Redeliver(llm_pb2.RedeliverRequest(workflow_id=job.workflow_id))
    log = await until(stub, job.workflow_id, lambda log: settled(log) and len(log[0].attempts) == 2)
    execution = WorkflowExecution(workflow_id=job.workflow_id, run_id=job.run_id)
    await temporal.workflow_service.delete_workflow_execution(
        DeleteWorkflowExecutionRequest(namespace=temporal.namespace, workflow_execution=execution)
    )
    async with asyncio.timeout(120):
        while await exists(temporal, job.workflow_id):  # noqa: ASYNC110  # nothing notifies
            await asyncio.sleep(0.1)
    status_ = llm_pb2.GetStatusRequest(workflow_id=job.workflow_id)
    assert await refused(stub.GetStatus(status_)) == NO_JOB[0]
    assert await deliveries(stub, job.workflow_id) == log
    await stub.Redeliver(llm_pb2.RedeliverRequest(workflow_id=job.workflow_id))
    (entry,) = await until(stub, job.workflow_id, lambda log: settled(log) and len(log[0].attempts) == 3)
    assert [attempt.http_status for attempt in entry.attempts] == [410, 200, 200]


@pytest.fixture(scope="module")
async def limited(stack: Stack) -> AsyncIterator[list[LlmServiceStub]]:
    """Run two gateways with the default limit of Redeliver, and yield their clients."""
    gateways = [stack.add("gateway", {"GATEWAY_ROLE": "api", "GATEWAY_REDELIVER_INTERVAL": "PT1M"}) for _ in range(2)]
    async with AsyncExitStack() as running_:
        stubs = []
        for gateway in gateways:
            await gateway.start()
            await gateway.wait_ready()
            running_.push_async_callback(gateway.terminate)
            channel = await running_.enter_async_context(grpc.aio.insecure_channel(stack.address(gateway.name)))
            stubs.append(LlmServiceStub(channel))
        yield stubs


async def test_a_job_is_sent_again_once_a_minute(
    stub: LlmServiceStub, limited: list[LlmServiceStub], sink: Receiver
) -> None:
    """This holds at any gateway and for concurrent calls. A refused call gets RetryInfo."""
    url = sink.on("/once-a-minute", status(410), status(200))
    seen = await run_job(stub, new_job(params=QUICK, notify=webhook(url)))
    again = llm_pb2.RedeliverRequest(workflow_id=seen.final.status.workflow_id)
    unknown = llm_pb2.RedeliverRequest(workflow_id=again.workflow_id, delivery_ids=["other"])
    assert await refused(limited[0].Redeliver(unknown)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    answers = await asyncio.gather(*(limited[0].Redeliver(again) for _ in range(20)), return_exceptions=True)
    errors = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert len(errors) == 19
    (entry,) = await until(stub, again.workflow_id, settled)
    # On a busy machine an attempt may count as lost and be repeated.
    assert [attempt.http_status for attempt in entry.attempts if attempt.http_status] == [410, 200]
    for gateway in limited:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await gateway.Redeliver(again)
        errors.append(refusal.value)
        wait = details_of(refusal.value)["RetryInfo"].retry_delay.ToTimedelta()
        assert timedelta(seconds=10) < wait <= timedelta(minutes=1)
    assert {error.code() for error in errors} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert all(details_of(error)["ErrorInfo"].reason == "LIMIT_REACHED" for error in errors)
    assert len(sink.so_far("/once-a-minute")) == 2


async def test_two_gateways_send_a_job_again_once(
    stub: LlmServiceStub, limited: list[LlmServiceStub], sink: Receiver
) -> None:
    """One of the calls that both get in the same moment is accepted. The log has every attempt."""

    async def sent_again(index: int) -> None:
        path = f"/two-gateways/{index}"
        seen = await run_job(stub, new_job(params=QUICK, notify=webhook(sink.on(path, status(410), status(200)))))
        again = llm_pb2.RedeliverRequest(workflow_id=seen.final.status.workflow_id)
        calls = (limited[number % 2].Redeliver(again, timeout=60) for number in range(40))
        answers = await asyncio.gather(*calls, return_exceptions=True)
        codes = [answer.code() for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
        assert codes == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 39
        (entry,) = await until(stub, again.workflow_id, lambda log: settled(log) and len(log[0].attempts) >= 2)
        answered = [attempt.http_status for attempt in entry.attempts if attempt.http_status]
        assert answered == [410, 200]

    await asyncio.gather(*map(sent_again, range(5)))


async def test_an_operator_can_stop_deliveries(stub: LlmServiceStub, temporal: Client, sink: Receiver) -> None:
    """Cancelling the delivery workflow stops them, and the status reports it."""
    url = sink.on("/stopped", status(429, retry_after="3600"))
    seen = await run_job(stub, new_job(params=QUICK, notify=webhook(url)))
    id_ = seen.final.status.workflow_id
    await temporal.get_workflow_handle(delivery_workflow_id(id_)).cancel()
    (entry,) = await until(stub, id_, settled)
    assert entry.state == llm_pb2.NOTIFY_STATE_FAILED
    assert unpack(entry.attempts[-1].error)["ErrorInfo"].reason == "CANCELLED"


async def test_a_job_can_ask_to_be_told_nothing_of_its_end(stub: LlmServiceStub, sink: Receiver) -> None:
    """A job that asks for the start event alone ends without notifications."""
    options = llm_pb2.NotifyOptions(events=[llm_pb2.NOTIFY_EVENT_STARTED])
    job = new_job(params={"max_tokens": 400}, notify=webhook(sink.on("/start", status(200))), notify_options=options)
    seen = await run_job(stub, job)
    assert not seen.final.status.notifications
    (request,) = sink.so_far("/start")
    assert request.event["type"] == "llm.v1.job.started"


async def test_progress_is_told_as_a_job_runs(stub: LlmServiceStub, temporal: Client, sink: Receiver) -> None:
    """Start, progress and end are notified in this order, progress at the requested interval. The log has them."""
    options = llm_pb2.NotifyOptions(
        events=[llm_pb2.NOTIFY_EVENT_STARTED, llm_pb2.NOTIFY_EVENT_PROGRESS, llm_pb2.NOTIFY_EVENT_FINISHED],
        progress_interval=Duration(seconds=1),
    )
    job = new_job(params={"max_tokens": 1000}, notify=webhook(sink.on("/told", status(200))), notify_options=options)
    seen = await run_job(stub, job)
    requests = await sink.received("/told", 4)
    kinds = [request.event["type"].rpartition(".")[2] for request in requests]
    assert kinds[0] == "started"
    assert kinds[-1] == "succeeded"
    running = [request.event for request, kind in zip(requests, kinds, strict=True) if kind == "progress"]
    assert len(running) >= 2
    percents = [event["data"]["status"]["progress"].get("percent", 0) for event in running]
    assert percents == sorted(set(percents))
    assert len({event["id"] for event in running}) == len(running)
    times = [datetime.fromisoformat(event["time"]) for event in running]
    assert all(later - earlier >= timedelta(seconds=0.8) for earlier, later in itertools.pairwise(times))
    first = requests[0].event
    assert first["data"]["status"]["state"] == "JOB_STATE_RUNNING"
    log = await deliveries(stub, seen.final.status.workflow_id)
    assert [entry.type.rpartition(".")[2] for entry in log] == ["succeeded", "started", "progress"]
    ids = [event["id"] for event in running]
    assert len(log[-1].attempts) == ids.count(log[-1].id) == 1, "the entry is of one event"
    history = await temporal.get_workflow_handle(seen.final.status.workflow_id).fetch_history()
    kinds = [event.activity_task_scheduled_event_attributes.activity_type.name for event in history.events]
    assert kinds.count(names.ACTIVITY_NOTIFY_PROGRESS) == 1, "the history must not grow with progress"


@pytest.mark.parametrize(("targets", "events", "calls"), [(0, 14, []), (1, 20, [names.ACTIVITY_NOTIFY])])
async def test_a_job_pays_for_what_it_asks_for(
    stub: LlmServiceStub, temporal: Client, sink: Receiver, targets: int, events: int, calls: list[str]
) -> None:
    """A job without progress runs no activity for it. One without any target, even the operator's, runs no NotifyUI.

    docs/streams.md states the number of events.
    """
    notify = webhook(sink.on("/free", status(200))) * targets
    seen = await run_job(stub, new_job(params={"max_tokens": 20}, notify=notify))
    assert seen.states[-1] == "SUCCEEDED"
    assert len(seen.final.status.notifications) == targets
    history = await temporal.get_workflow_handle(seen.final.status.workflow_id).fetch_history()
    assert len(history.events) == events
    scheduled = [event.activity_task_scheduled_event_attributes.activity_type.name for event in history.events]
    assert [name for name in scheduled if name] == [names.ACTIVITY_RUN, *calls]


async def test_a_receiver_that_hangs_does_not_slow_the_job(stub: LlmServiceStub, sink: Receiver) -> None:
    """A hanging receiver of progress does not slow the job, and delays its end only briefly."""
    options = llm_pb2.NotifyOptions(events=[llm_pb2.NOTIFY_EVENT_STARTED, llm_pb2.NOTIFY_EVENT_PROGRESS])
    job = new_job(params={"max_tokens": 300}, notify=webhook(sink.on("/stuck", hang)), notify_options=options)
    response = await stub.Submit(llm_pb2.SubmitRequest(job=job))
    await until_output(stub, response.workflow_id)
    seen = await watch(stub, response.workflow_id)
    status_ = seen.final.status
    assert status_.state == llm_pb2.JOB_STATE_SUCCEEDED
    assert status_.end_time.ToDatetime() - status_.start_time.ToDatetime() < timedelta(seconds=60)


async def test_a_long_history_goes_on_in_a_new_run(stub: LlmServiceStub, temporal: Client, sink: Receiver) -> None:
    """Each attempt adds the event to the history, and large events would exceed Temporal's 50 MiB for one run."""
    options = internal_pb2.JobOptions()
    options.CopyFrom(DEFAULTS)
    options.notify_retry.initial_interval.FromMilliseconds(10)
    options.notify_retry.backoff_coefficient = 1
    event = internal_pb2.NotifyRequest(
        event=llm_pb2.NOTIFY_EVENT_FINISHED, result=llm_pb2.JobResult(output="x" * 250_000)
    )
    event.status.workflow_id = "long"
    state = internal_pb2.DeliveryState(event=event, options=options)
    for place in range(4):
        (target,) = webhook(sink.on(f"/long/{place}", *[status(503)] * 7, status(200)))
        state.targets.append(target)
        delivery = state.deliveries.add(id=f"long-{place}", state=llm_pb2.NOTIFY_STATE_PENDING)
        delivery.give_up_time.FromDatetime(datetime.now(UTC) + timedelta(hours=1))
    id_ = delivery_workflow_id("long")
    handle = await temporal.start_workflow(names.DELIVERY_WORKFLOW_TYPE, state, id=id_, task_queue=names.WORKFLOW_QUEUE)
    await handle.result()
    described = await temporal.get_workflow_handle(id_).describe()
    assert described.run_id != handle.first_execution_run_id, "the workflow must continue as new"
    for entry in await deliveries(stub, "long"):
        assert entry.state == llm_pb2.NOTIFY_STATE_DELIVERED
        assert entry.attempts[-1].http_status == 200
        assert [attempt.http_status for attempt in entry.attempts].count(503) == 7


@settings(max_examples=300)
@given(
    tries=st.integers(1, 60),
    asked=st.timedeltas(timedelta(0), timedelta(days=1000)),
    chance=st.floats(0, 1),
    spent=st.timedeltas(timedelta(0), timedelta(hours=80)),
    took=st.timedeltas(timedelta(0), timedelta(hours=10)),
)
def test_the_schedule_is_bounded(
    tries: int, asked: timedelta, chance: float, spent: timedelta, took: timedelta
) -> None:
    """Whatever a receiver asks for, no attempt comes before the interval is over or the time ends, and none later."""
    retry, start = DEFAULTS.notify_retry, datetime(2026, 1, 1, tzinfo=UTC)
    end, began, now = start + timedelta(hours=72), start + spent, start + spent + took
    due = next_attempt(retry, tries, began, now, end, asked, chance)
    if began >= end or tries >= 50:
        assert due is None
    elif now >= end:
        assert due == now
    else:
        assert due is not None
        wait = timedelta(seconds=min(5 * 3.0 ** (tries - 1), 12 * 3600))
        assert now < due <= end
        assert due == end or due - now >= max(wait * 0.8 - timedelta(microseconds=1), min(asked, timedelta(hours=12)))
        assert due - now <= max(wait * 1.2 + timedelta(microseconds=1), min(asked, timedelta(hours=12)))


def test_the_default_schedule_takes_three_days() -> None:
    """It has about as many attempts as Standard Webhooks recommends, the last one at the end of the time."""
    now = start = datetime(2026, 1, 1, tzinfo=UTC)
    retry, end = DEFAULTS.notify_retry, start + timedelta(hours=72)
    waits: list[float] = []
    while due := next_attempt(retry, len(waits) + 1, now, now, end, timedelta(0), 0.5):
        waits.append((due - now).total_seconds())
        now = due
    assert waits[:9] == [5, 15, 45, 135, 405, 1215, 3645, 10935, 32805]
    assert set(waits[9:-1]) == {12 * 3600}
    assert now - start == timedelta(hours=72)
    assert len(waits) == 14
