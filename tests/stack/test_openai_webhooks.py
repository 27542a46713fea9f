"""Webhooks in OpenAI's form: OpenAI's own client verifies and parses them."""

import json
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
import openai
import pytest
from google.protobuf.duration_pb2 import Duration
from temporalio.client import Client

from jobs import names
from jobs.response_ids import workflow_id_of
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.deliveries import deliveries
from tests.support.jobs import details_of, new_job, run_job, until_output, watch, webhook
from tests.support.receivers import Receiver, Request, receiving, status
from tests.support.stacks import FAST

SECRETS: Final = json.loads(FAST["notifier"]["NOTIFIER_WEBHOOK_SECRETS"])
ALL_EVENTS: Final = llm_pb2.NotifyEvent.values()[1:]
OPENAI: Final = llm_pb2.WEBHOOK_FORMAT_OPENAI


@pytest.fixture(scope="module")
async def sink() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


def to_openai(url: str) -> llm_pb2.NotifyTarget:
    return llm_pb2.NotifyTarget(webhook=llm_pb2.Webhook(url=url, format=OPENAI))


def unwrapped(request: Request, secret: str) -> Any:
    """Return the event as OpenAI's client does; raise its error for a signature that is not the secret's."""
    client = openai.OpenAI(api_key="none", webhook_secret=secret)
    return client.webhooks.unwrap(request.body, request.headers)


@pytest.mark.parametrize(
    ("job", "event"),
    [
        (new_job(params={"max_tokens": 5}), "response.incomplete"),
        (new_job(params={"max_tokens": 50, "stop": ["a", "e", "i", "o", "u"]}), "response.completed"),
        (new_job("[[fault:oom@3]]", params={"max_tokens": 5}), "response.failed"),
        (new_job(model="idle", timeouts={"queue": Duration(seconds=1)}), "response.failed"),
    ],
    ids=["up to max_tokens", "succeeded", "failed", "timed out"],
)
async def test_openais_client_takes_the_outcome(
    stub: LlmServiceStub, sink: Receiver, job: llm_pb2.JobRequest, event: str
) -> None:
    job.notify.append(to_openai(sink.on(f"/{job.request_id}", status(503), status(200))))
    job.notify_options.include_output = True
    final = (await run_job(stub, job)).final
    first, again = await sink.received(f"/{job.request_id}", 2)
    assert first.body == again.body
    (delivery,) = await deliveries(stub, final.status.workflow_id)
    assert again.headers["webhook-id"] == first.headers["webhook-id"] == delivery.id
    assert again.headers["content-type"] == "application/json"
    for secret in SECRETS:
        parsed = unwrapped(again, secret)
        assert type(parsed).__module__.startswith("openai.types.webhooks.response_"), "it is of a known type"
        assert parsed.type == event
        assert workflow_id_of(parsed.data.id) == final.status.workflow_id
        assert parsed.created_at == final.status.end_time.seconds
    assert json.loads(again.body) == {
        "id": f"evt_{delivery.id}",
        "object": "event",
        "type": event,
        "created_at": final.status.end_time.seconds,
        "data": {"id": parsed.data.id},
    }
    with pytest.raises(openai.InvalidWebhookSignatureError):
        unwrapped(again, "whsec_b3RoZXIgMDEyMzQ1Njc4OTAxMjM0NTY3")


async def test_a_cancelled_job_is_cancelled(stub: LlmServiceStub, sink: Receiver) -> None:
    job = new_job(params={"max_tokens": 8000}, notify=[to_openai(sink.on("/cancelled", status(200)))])
    id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    await until_output(stub, id_)
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    await watch(stub, id_)
    (request,) = await sink.received("/cancelled")
    assert unwrapped(request, SECRETS[0]).type == "response.cancelled"


async def test_a_target_in_openais_form_gets_the_outcome_alone(stub: LlmServiceStub, sink: Receiver) -> None:
    """Another target of the same job gets every event, and each delivery knows its target."""
    notify = [to_openai(sink.on("/outcome", status(200))), *webhook(sink.on("/all", status(200)))]
    job = new_job(params={"max_tokens": 400}, notify=notify, notify_options={"events": ALL_EVENTS})
    final = (await run_job(stub, job)).final
    kinds = [request.event["type"] for request in await sink.received("/all", 3)]
    assert {kinds[0], kinds[-1]} == {"llm.v1.job.started", "llm.v1.job.succeeded"}
    assert [request.event["type"] for request in await sink.received("/outcome")] == ["response.incomplete"]
    log = [(entry.type.rpartition(".")[2], entry.target_index) for entry in await deliveries(stub, _id(final))]
    assert log[:2] == [("succeeded", 0), ("succeeded", 1)]
    assert {index for _, index in log[2:]} == {1}


async def test_a_job_without_another_target_runs_no_activity_for_progress(
    stub: LlmServiceStub, temporal: Client, sink: Receiver
) -> None:
    notify = [to_openai(sink.on("/only", status(200)))]
    final = (
        await run_job(stub, new_job(params={"max_tokens": 5}, notify=notify, notify_options={"events": ALL_EVENTS}))
    ).final
    history = await temporal.get_workflow_handle(_id(final)).fetch_history()
    scheduled = [event.activity_task_scheduled_event_attributes.activity_type.name for event in history.events]
    assert [name for name in scheduled if name] == [names.ACTIVITY_RUN, names.ACTIVITY_NOTIFY]


async def test_a_job_that_would_notify_of_nothing_is_refused(stub: LlmServiceStub, sink: Receiver) -> None:
    job = new_job(notify=[to_openai(f"{sink.url}/never")], notify_options={"events": [llm_pb2.NOTIFY_EVENT_PROGRESS]})
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.Submit(llm_pb2.SubmitRequest(job=job))
    (violation,) = details_of(error.value)["BadRequest"].field_violations
    assert violation.field == "job.notify[0].webhook.format"
    assert "NOTIFY_EVENT_FINISHED" in violation.description


def _id(final: llm_pb2.StreamStatusResponse) -> str:
    return final.status.workflow_id
