"""Pipelines by plain HTTP and in the console, through the real stack. JSON is as /openapi.json describes it."""

import html
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from deploy.local.stack import Stack
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from tests.stack.test_console import post, text_in, until
from tests.support.http_events import Event, events_of
from tests.support.openapi import checked_client, description_of
from tests.support.pipelines import follow, get, new_pipeline, submit

pytestmark = pytest.mark.timeout(400)
HOSTILE = "<b>rain</b>"


@pytest.fixture(scope="module")
async def rest(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    base = f"http://{stack.address('http')}"
    async with checked_client(base, await description_of(base)) as client:
        yield client


@pytest.fixture(scope="module")
async def pipelines(stack: Stack) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield PipelineServiceStub(channel)


def body_of(message: Any) -> dict[str, Any]:
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


async def stream(rest: httpx.AsyncClient, path: str, last_event_id: str = "", most: int = 0) -> list[Event]:
    """Return the events of a stream to its end, or so many."""
    headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
    found = []
    async with rest.stream("GET", path, headers=headers) as answer:
        assert answer.status_code == 200
        async for event in events_of(answer):
            found.append(event)
            if len(found) == most:
                break
    return found


async def test_a_pipeline_from_its_start_to_its_result(rest: httpx.AsyncClient, pipelines: Any) -> None:
    body = body_of(new_pipeline("essay", StringValue(value="rain"), user_id="http-pipelines", project_id="weather"))
    answer = await rest.post("/pipelines", json=body)
    assert answer.status_code == 202, answer.text
    id_ = answer.json()["status"]["pipeline_id"]
    path = f"/pipelines/{id_}"
    assert answer.headers["location"] == path
    assert (await rest.post("/pipelines", json=body)).json()["status"]["pipeline_id"] == id_, "a repeat finds it"
    # A stream that breaks continues after its last event.
    place = f"{path}/stream?follow=outline&follow=parts/*/write"
    events = await stream(rest, place, most=3)
    events += await stream(rest, place, events[-1].id)
    assert {event.name for event in events[:-1]} == {"update"}
    assert events[-1].name == "end"
    outputs: dict[str, str] = {}
    for event in events:
        if delta := event.json.get("delta"):
            assert int(delta["delta"]["offset"]) == len(outputs.get(delta["path"], "").encode())
            outputs[delta["path"]] = outputs.get(delta["path"], "") + delta["delta"]["text"]
    assert outputs.keys() == {"outline", *(f"parts/{number}/write" for number in range(3))}
    last = events[-1].json
    value = {"@type": "type.googleapis.com/google.protobuf.StringValue", "value": last["result"]["value"]["value"]}
    assert last["status"]["state"] == "JOB_STATE_SUCCEEDED"
    assert last["result"]["value"] == value
    assert value["value"] == "\n\n".join(outputs[f"parts/{number}/write"] for number in range(3))
    assert (await rest.get(f"{path}/stream", headers={"Last-Event-ID": "end"})).status_code == 204
    assert (await rest.head(f"{path}/stream")).headers["content-type"].startswith("text/event-stream")
    found = (await rest.get(path)).json()
    assert found["result"]["value"] == value
    assert len(found["steps"]) == 8
    below = (await rest.get(f"{path}?path=parts/1")).json()["steps"]
    assert [step["path"] for step in below] == ["parts/1", "parts/1/write"]
    assert (await rest.get(f"/jobs/{below[1]['workflow_id']}/output")).text == outputs["parts/1/write"]
    await until(rest, "/pipelines?user_id=http-pipelines&project_id=weather", lambda page: id_ in page)
    assert (await rest.post(f"{path}/cancel")).json()["status"]["state"] == "JOB_STATE_SUCCEEDED"


async def test_a_step_is_answered_and_a_pipeline_is_cancelled(rest: httpx.AsyncClient, pipelines: Any) -> None:
    id_ = (await submit(pipelines, new_pipeline("careful", StringValue(value="rain")))).pipeline_id
    await follow(pipelines, id_, until=lambda seen: "review/approve" in seen.steps)
    reply = {"path": "review/approve", "answer_id": "1", "approved": False}
    for _ in range(2):
        answer = await rest.post(f"/pipelines/{id_}/answer", json=reply)
        assert (answer.status_code, answer.json()["step"]["path"]) == (200, "review/approve")
    other = await rest.post(f"/pipelines/{id_}/answer", json={**reply, "answer_id": "2", "approved": True})
    assert (other.status_code, other.json()["reason"]) == (409, "STEP_ANSWERED")
    long = (await submit(pipelines, new_pipeline("fan", Int32Value(value=2)))).pipeline_id
    assert (await rest.post(f"/pipelines/{long}/cancel", json={"reason": "enough"})).status_code == 200
    ended = (await stream(rest, f"/pipelines/{long}/stream"))[-1].json["status"]
    assert ended["state"] == "JOB_STATE_CANCELLED"
    assert "enough" in ended["root"]["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "errors"),
    [
        ("/pipelines", {}, {"user_id", "request_id", "spec"}),
        ("/pipelines", {"pipeline": {}}, {"pipeline"}),
        ("/pipelines", {"custom": {"name": "essay", "input": {"@type": "x.y/acme.Own"}}}, {"custom.input"}),
        ("/pipelines/llmpipe-no-one/answer", {"pipeline_id": "x"}, {"pipeline_id"}),
    ],
)
async def test_every_bad_field_is_named_as_in_the_body(
    rest: httpx.AsyncClient, path: str, body: Any, errors: set[str]
) -> None:
    answer = await rest.post(path, json=body)
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/problem+json")
    assert {error["field"] for error in answer.json()["errors"]} == errors


async def test_what_does_not_exist_is_not_found(rest: httpx.AsyncClient, http: httpx.AsyncClient) -> None:
    for path in ("/pipelines/llmpipe-no-one", "/pipelines/llmpipe-no-one/stream"):
        answer = await rest.get(path)
        assert (answer.status_code, answer.json()["reason"]) == (404, "PIPELINE_NOT_FOUND"), path
    assert (await http.get("/console/pipelines/llmpipe-no-one")).status_code == 404


async def test_the_console_shows_the_tree_and_answers_a_step(http: httpx.AsyncClient, pipelines: Any) -> None:
    pipeline = new_pipeline("careful", StringValue(value=HOSTILE), user_id="console-pipelines", project_id="weather")
    id_ = (await submit(pipelines, pipeline)).pipeline_id
    path = f"/console/pipelines/{id_}"
    page = await until(http, path, lambda page: f'action="{path}/answer"' in page)
    assert f"May I generate from {HOSTILE!r}?" in html.unescape(page)
    assert HOSTILE not in page
    assert (await post(http, f"{path}/answer", step="review/approve", approved="maybe")).status_code == 400
    other = await http.post(f"{path}/answer", data={"step": "review/approve", "approved": "yes"})
    assert other.status_code == 403, "it comes from no page of the console"
    answered = await post(http, f"{path}/answer", step="review/approve", approved="yes")
    assert (answered.status_code, answered.headers["location"]) == (303, path)
    async with http.stream("GET", f"{path}/events") as answer:
        events = [event async for event in events_of(answer)]
    assert events[-1].json["status"]["state"] == "JOB_STATE_FAILED"
    page = (await http.get(path)).text
    assert f'href="/console/jobs/{id_}%2Ffirst"' in page
    assert "<bdi>asked</bdi> <bdi>true</bdi>" in page
    assert "<code>ENGINE_FAILED</code>" in page
    assert f'action="{path}/answer"' not in page
    assert (await http.get(f"/console/jobs/{id_}%2Ffirst")).status_code == 200
    late = await post(http, f"{path}/answer", step="review/approve", approved="no")
    assert late.status_code == 409
    assert 'role="alert"' in late.text
    listed = await until(http, "/console/pipelines?project_id=weather", lambda page: id_ in page)
    assert "state-failed" in listed
    assert "No pipeline matches" in (await http.get("/console/pipelines?user_id=nobody-here")).text


async def test_the_console_shows_a_result_and_cancels(http: httpx.AsyncClient, pipelines: Any) -> None:
    spec = Struct()
    done = (await submit(pipelines, new_pipeline("essay", StringValue(value="fog")))).pipeline_id
    long = (await submit(pipelines, new_pipeline("fan", Int32Value(value=2)))).pipeline_id
    broken = (await submit(pipelines, new_pipeline("broken", spec))).pipeline_id
    path = f"/console/pipelines/{long}"
    page = await until(http, path, lambda page: f"{long}%2Fparts%2F1%2Fwrite" in page)
    assert "0 of 2" in page
    answer = await post(http, f"{path}/cancel", reason="<b>enough")
    assert (answer.status_code, answer.headers["location"]) == (303, path)
    page = await until(http, path, lambda page: "state-cancelled" in page and f'action="{path}/cancel"' not in page)
    assert "&lt;b&gt;enough" in page
    await follow(pipelines, done)
    value = StringValue()
    (await get(pipelines, done)).result.value.Unpack(value)
    assert text_in((await http.get(f"/console/pipelines/{done}")).text, "result-text") == value.value
    spent = (await submit(pipelines, new_pipeline("spending", Int32Value(value=1)))).pipeline_id
    await follow(pipelines, spent)
    assert "1 of 1 · 8 tokens · " in (await http.get(f"/console/pipelines/{spent}")).text
    page = await until(http, f"/console/pipelines/{broken}", lambda page: "state-failed" in page)
    assert "<code>PROGRAM_ERROR</code>" in page
