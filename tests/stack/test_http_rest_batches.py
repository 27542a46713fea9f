"""Batches and schedules by plain HTTP, through the real stack. Every answer is as /openapi.json describes it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import json_format
from temporalio.client import Client

from deploy.local.stack import Stack
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from tests.support.batches import Stubs, lines_of, new_batch, running
from tests.support.files import PATIENCE
from tests.support.http_events import Event, events_of
from tests.support.openapi import checked_client, description_of
from tests.support.schedules import new_schedule

pytestmark = pytest.mark.timeout(400)
LINES = 40


@pytest.fixture(scope="module")
async def http(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    base = f"http://{stack.address('http')}"
    async with checked_client(base, await description_of(base)) as client:
        yield client


@pytest.fixture(scope="module")
async def stubs(stack: Stack) -> AsyncIterator[Stubs]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield Stubs(FileServiceStub(channel), BatchServiceStub(channel))


def body_of(message: Any, **changes: Any) -> dict[str, Any]:
    return {**json_format.MessageToDict(message, preserving_proto_field_name=True), **changes}


async def stream(http: httpx.AsyncClient, path: str, last_event_id: str = "") -> list[Event]:
    headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
    async with http.stream("GET", path, headers=headers) as answer:
        assert answer.status_code == 200
        return [event async for event in events_of(answer)]


def indexes(events: list[Event]) -> list[int]:
    return [int(item["index"]) for event in events for item in event.json.get("items", [])]


async def test_a_batch_from_its_creation_to_its_results(
    http: httpx.AsyncClient, stubs: Stubs, temporal: Client, stack: Stack
) -> None:
    body = body_of(await new_batch(stubs, lines_of(LINES), labels={"team": "red"}))
    answer = await http.post("/batches", json=body)
    assert answer.status_code == 202, answer.text
    id_ = answer.json()["status"]["batch_id"]
    assert answer.headers["location"] == f"/batches/{id_}"
    assert (await http.post("/batches", json=body)).json()["status"]["batch_id"] == id_, "a repeat finds it"
    async with running(temporal, stack.state_dir):
        events = await stream(http, f"/batches/{id_}/stream")
    assert {event.name for event in events[:-1]} <= {"update"}
    assert events[-1].name == "end"
    ended = events[-1].json["status"]
    assert (ended["state"], ended["counts"]["succeeded"]) == ("BATCH_STATE_SUCCEEDED", str(LINES))
    assert (await http.get(f"/batches/{id_}")).json()["status"]["output"]["file_id"] == ended["output"]["file_id"]

    results = await stream(http, f"/batches/{id_}/results")
    assert sorted(indexes(results)) == list(range(LINES))
    assert results[-1].name == "end"
    assert indexes(await stream(http, f"/batches/{id_}/results", results[0].id)) == indexes(results[1:])
    for path in ("stream", "results"):
        assert (await http.get(f"/batches/{id_}/{path}", headers={"Last-Event-ID": "end"})).status_code == 204
        head = await http.head(f"/batches/{id_}/{path}")
        assert head.headers["content-type"].startswith("text/event-stream")

    query = {"user_id": body["user_id"], "state": "BATCH_STATE_SUCCEEDED", "page_size": "5"}
    async with asyncio.timeout(PATIENCE):
        while not (found := (await http.get("/batches", params=query)).json()["batches"]):  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    assert [(one["batch_id"], one["labels"]) for one in found] == [(id_, {"team": "red"})]
    # A cancel changes nothing now.
    assert (await http.post(f"/batches/{id_}/cancel")).json()["status"]["state"] == "BATCH_STATE_SUCCEEDED"


async def test_a_batch_is_cancelled_with_a_reason(http: httpx.AsyncClient, stubs: Stubs) -> None:
    body = body_of(await new_batch(stubs, lines_of(1)))
    id_ = (await http.post("/batches", json=body)).json()["status"]["batch_id"]
    answer = await http.post(f"/batches/{id_}/cancel", json={"reason": "enough"})
    assert answer.status_code == 200
    ended = (await stream(http, f"/batches/{id_}/stream"))[-1].json["status"]
    assert ended["state"] == "BATCH_STATE_CANCELLED"
    assert "enough" in ended["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "errors"),
    [
        ("/batches", {}, {"user_id", "request_id", "input.file_id"}),
        ("/batches", {"batch": {}}, {"batch"}),
        ("/batches", {"user_id": 1, "window": 5, "x": 2}, {"user_id", "window", "x"}),
        ("/schedules", {}, {"user_id", "request_id", "job", "times"}),
        ("/schedules", {"schedule": {}}, {"schedule"}),
        ("/schedules?paused=maybe", {}, {"paused"}),
        ("/schedules/llmschedule-no-one/pause", {"schedule_id": "x"}, {"schedule_id"}),
        ("/schedules/llmschedule-no-one/trigger", {"overlap": "SOMETIMES"}, {"overlap"}),
    ],
)
async def test_every_bad_field_is_named_as_in_the_body(
    http: httpx.AsyncClient, path: str, body: Any, errors: set[str]
) -> None:
    answer = await http.post(path, json=body)
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/problem+json")
    assert {error["field"] for error in answer.json()["errors"]} == errors


async def test_what_does_not_exist_is_not_found(http: httpx.AsyncClient) -> None:
    for path, reason in (
        ("/batches/llmbatch-no-one", "BATCH_NOT_FOUND"),
        ("/batches/llmbatch-no-one/stream", "BATCH_NOT_FOUND"),
        ("/batches/llmbatch-no-one/results", "BATCH_NOT_FOUND"),
        ("/schedules/llmschedule-no-one", "SCHEDULE_NOT_FOUND"),
    ):
        answer = await http.get(path)
        assert (answer.status_code, answer.json()["reason"]) == (404, reason), path
    assert (await http.get("/batches?state=DONE")).json()["errors"][0]["field"] == "state[0]"


async def test_a_schedule_from_its_creation_to_its_deletion(http: httpx.AsyncClient) -> None:
    body = body_of(new_schedule(user_id="http-schedules"))
    answer = await http.post("/schedules?paused=true", json=body)
    assert answer.status_code == 201, answer.text
    id_ = answer.json()["status"]["schedule_id"]
    path = f"/schedules/{id_}"
    assert answer.headers["location"] == path
    found = (await http.get(path)).json()
    assert (found["status"]["paused"], found["schedule"]["job"]["prompt"]) == (True, body["job"]["prompt"])

    assert (await http.post(f"{path}/unpause")).json() == {}
    assert (await http.post(f"{path}/pause", json={"note": "for the night"})).status_code == 200
    assert (await http.get(path)).json()["status"]["note"] == "for the night"
    changed = {**body, "job": {**body["job"], "prompt": "Another one."}}
    assert (await http.put(path, json=changed)).status_code == 200
    assert (await http.get(path)).json()["schedule"]["job"]["prompt"] == "Another one."
    assert (await http.put(path, json={**changed, "user_id": "somebody"})).status_code == 400

    assert (await http.post(f"{path}/trigger", json={"overlap": "OVERLAP_POLICY_ALLOW_ALL"})).status_code == 200
    async with asyncio.timeout(PATIENCE):
        while not (runs := (await http.get(path)).json()["status"]["recent_runs"]) or not runs[0]["workflow_id"]:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    job = (await http.get(f"/jobs/{runs[0]['workflow_id']}")).json()["job"]
    assert (job["user_id"], job["prompt"]) == ("http-schedules", "Another one.")
    filled = await http.post(
        f"{path}/backfill", json={"start_time": "2026-01-01T00:00:00Z", "end_time": "2026-01-02T00:00:00Z"}
    )
    assert filled.json() == {"times": 1}

    async with asyncio.timeout(PATIENCE):
        while not (found := (await http.get("/schedules?user_id=http-schedules")).json()["schedules"]):  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    assert [one["schedule_id"] for one in found] == [id_]
    assert (await http.delete(path)).json() == {}
    assert (await http.get(path)).status_code == 404
