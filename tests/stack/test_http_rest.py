"""The REST API of the HTTP front: jobs by plain HTTP, through the real stack."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from google.protobuf import json_format
from temporalio.client import Client, WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError

from deploy.local.stack import Stack
from jobs import names
from jobs.ids import models_workflow_id
from jobs.response_ids import response_id
from jobs.training import MAX_REGISTRY_BYTES, find_model
from llm_pb import internal_pb2, llm_pb2, llm_pb2_grpc
from tests.support.http_events import Event, events_of, text_of
from tests.support.jobs import new_job, until_output, watch
from tests.support.openapi import Description, checked_client, description_of
from tests.support.receivers import Receiver
from tests.support.trained import register

ENDED = {"JOB_STATE_SUCCEEDED", "JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_TIMED_OUT"}


def body_of(job: llm_pb2.JobRequest, **names: bool) -> dict[str, Any]:
    value: dict[str, Any] = json_format.MessageToDict(job, **names)
    return value


@pytest.fixture(scope="module")
async def described(stack: Stack) -> Description | None:
    return await description_of(f"http://{stack.address('http')}")


@pytest.fixture(scope="module")
async def http(stack: Stack, described: Description | None) -> AsyncIterator[httpx.AsyncClient]:
    async with checked_client(f"http://{stack.address('http')}", described) as client:
        yield client


async def submit(http: httpx.AsyncClient, job: llm_pb2.JobRequest) -> str:
    answer = await http.post("/jobs", json=body_of(job))
    assert answer.status_code == 202, answer.text
    workflow_id: str = answer.json()["workflow_id"]
    return workflow_id


async def stream(http: httpx.AsyncClient, workflow_id: str, **arguments: Any) -> list[Event]:
    async with http.stream("GET", f"/jobs/{workflow_id}/stream", **arguments) as answer:
        assert answer.status_code == 200
        return [event async for event in events_of(answer)]


async def test_a_job_from_submit_to_its_result(http: httpx.AsyncClient, stub: llm_pb2_grpc.LlmServiceStub) -> None:
    answer = await http.post("/jobs", json=body_of(new_job(params=llm_pb2.SamplingParams(max_tokens=20))))
    assert answer.status_code == 202
    workflow_id = answer.json()["workflow_id"]
    assert answer.headers["location"] == f"/jobs/{workflow_id}"

    events = await stream(http, workflow_id)
    assert [event.name for event in events if event.name != "update"] == ["end"]
    ended = events[-1].json
    assert ended["status"]["state"] == "JOB_STATE_SUCCEEDED"
    assert text_of(events) == ended["result"]["output"]
    assert text_of(events).encode() == (await watch(stub, workflow_id)).output

    for path in (answer.headers["location"], f"/jobs/{workflow_id}/status"):
        found = (await http.get(path)).json()
        assert found["result"]["output"] == ended["result"]["output"]
        assert found["status"]["workflow_id"] == workflow_id


async def test_names_may_be_those_of_the_proto_or_camel_case_and_numbers_may_be_texts(http: httpx.AsyncClient) -> None:
    """The original's JSON is {"user_id": ..., "params": {"temperature": "0.1"}}. A repeated job is found."""
    job = new_job(params=llm_pb2.SamplingParams(max_tokens=3, temperature=0.5))
    value = body_of(job, preserving_proto_field_name=True)
    value["params"] = {"max_tokens": "3", "temperature": "0.5"}
    ids = set()
    for body in (value, body_of(job)):
        answer = await http.post("/jobs", json=body)
        assert answer.status_code == 202, answer.text
        ids.add((answer.json()["workflow_id"], answer.json()["run_id"]))
    assert len(ids) == 1


async def test_a_job_is_returned_as_it_was_accepted(http: httpx.AsyncClient) -> None:
    """With its labels, which are an object."""
    job = new_job(params=llm_pb2.SamplingParams(max_tokens=1), labels={"team": "a", "run/1": "\u00fc"})
    found = (await http.get(f"/jobs/{await submit(http, job)}")).json()
    assert json_format.ParseDict(found["job"], llm_pb2.JobRequest()) == job
    assert found["status"]["workflow_id"]


async def test_jobs_are_listed_and_filtered(http: httpx.AsyncClient) -> None:
    job = new_job(params=llm_pb2.SamplingParams(max_tokens=1))
    await stream(http, await submit(http, job))
    for state in ([], ["JOB_STATE_SUCCEEDED", "JOB_STATE_FAILED"]):
        query = [("user_id", job.user_id), ("page_size", "5"), *(("state", name) for name in state)]
        found: list[Any] = []
        # Temporal shows a new job after about a second.
        while not (found and found[0]["status"]["state"] == "JOB_STATE_SUCCEEDED"):
            await asyncio.sleep(0.2)
            found = (await http.get("/jobs", params=query)).json()["jobs"]
        assert [one["request_id"] for one in found] == [job.request_id]
    others = await http.get("/jobs", params={"user_id": job.user_id, "state": "JOB_STATE_FAILED"})
    assert others.json() == {"jobs": [], "next_page_token": ""}
    for job_class, number in (("JOB_CLASS_STANDARD", 1), ("JOB_CLASS_HIGH", 0)):
        query = [("user_id", job.user_id), ("class", job_class), ("class", "JOB_CLASS_SCHEDULED")]
        found = (await http.get("/jobs", params=query)).json()["jobs"]
        assert [one["job_class"] for one in found] == ["JOB_CLASS_STANDARD"] * number


async def test_a_job_is_cancelled_with_a_reason(http: httpx.AsyncClient, stub: llm_pb2_grpc.LlmServiceStub) -> None:
    workflow_id = await submit(http, new_job(params=llm_pb2.SamplingParams(max_tokens=8000)))
    await until_output(stub, workflow_id)
    answer = await http.post(f"/jobs/{workflow_id}/cancel", json={"reason": "too long"})
    assert answer.status_code == 200
    status = answer.json()["status"]
    assert status["cancel_requested"] or status["state"] in ENDED
    ended = (await stream(http, workflow_id))[-1].json["status"]
    assert ended["state"] == "JOB_STATE_CANCELLED"
    assert "too long" in ended["error"]["message"]
    # A second cancel changes nothing, and needs no body.
    assert (await http.post(f"/jobs/{workflow_id}/cancel")).json()["status"]["state"] == "JOB_STATE_CANCELLED"


async def test_a_job_is_deleted(http: httpx.AsyncClient) -> None:
    workflow_id = await submit(http, new_job(params=llm_pb2.SamplingParams(max_tokens=1)))
    await stream(http, workflow_id)
    answer = await http.delete(f"/jobs/{workflow_id}")
    assert answer.status_code == 202
    state = answer.json()["deletion"]["state"]
    while state == "DELETION_STATE_IN_PROGRESS":
        await asyncio.sleep(0.2)
        state = (await http.get(answer.headers["location"])).json()["deletion"]["state"]
    assert state == "DELETION_STATE_DONE"
    assert (await http.get(f"/jobs/{workflow_id}")).status_code == 404


async def test_the_outcome_is_delivered_again(http: httpx.AsyncClient, receiver: Receiver) -> None:
    job = new_job(params=llm_pb2.SamplingParams(max_tokens=1))
    job.notify.add(webhook=llm_pb2.Webhook(url=f"{receiver.url}/http"))
    workflow_id = await submit(http, job)
    early = await http.post(f"/jobs/{workflow_id}/redeliver")
    assert early.status_code in (202, 409)
    await stream(http, workflow_id)
    answer = await http.post(f"/jobs/{workflow_id}/redeliver", json={})
    assert answer.status_code == 202, answer.text
    (again,) = answer.json()["deliveries"]
    (delivery,) = (await http.get(f"/jobs/{workflow_id}/deliveries")).json()["deliveries"]
    assert delivery["id"] == again["id"]


async def test_workers(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(120):
        while not (found := (await http.get("/workers?model=docstrings")).json()["workers"]):  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    assert (found[0]["model"], found[0]["seats"], found[0]["gpu"]["name"]) == ("docstrings", 64, "simulated")
    assert (await http.get("/workers?model=other")).json() == {"workers": []}
    assert (await http.get("/workers?model=../x")).status_code == 400


async def test_models_and_quota(http: httpx.AsyncClient) -> None:
    assert "docstrings" in {model["name"] for model in (await http.get("/models")).json()["models"]}
    assert (await http.get("/quota")).json() == {"tenant": "", "user_id": ""}


async def test_a_trained_models_aliases_and_versions(
    http: httpx.AsyncClient, temporal: Client, stub: llm_pb2_grpc.LlmServiceStub
) -> None:
    """A model goes with its last version. One of its name that comes later has other numbers."""
    first, second = [await register(temporal, "rest") for _ in range(2)]
    answer = await http.put("/models/rest/aliases/stable", json={"version": first})
    assert (answer.status_code, answer.json()["model"]["aliases"]) == (200, {"latest": second, "stable": first})
    for method, path, body, status, wrong in (
        ("PUT", "/models/rest/aliases/stable", {"version": 0}, 400, "version"),
        ("PUT", "/models/rest/aliases/stable", {"version": 1, "alias": "other"}, 400, "alias"),
        ("PUT", "/models/rest/aliases/latest", {"version": first}, 400, "alias"),
        ("PUT", "/models/rest%2Fa/aliases/stable", {"version": first}, 400, "model"),
        ("PUT", "/models/rest/aliases/stable", {"version": 9999}, 404, names.MODEL_NOT_FOUND),
        ("DELETE", "/models/none/aliases/stable", None, 404, names.MODEL_NOT_FOUND),
        ("DELETE", "/models/rest/versions/many", None, 400, "version"),
        ("DELETE", "/models/rest/versions/0", None, 400, "version"),
        ("DELETE", f"/models/rest/versions/{first}", None, 409, names.MODEL_VERSION_IN_USE),
    ):
        answer = await http.request(method, path, json=body)
        found = answer.json()
        assert (answer.status_code, wrong in json.dumps(found)) == (status, True), (path, found)
    answer = await http.delete("/models/rest/aliases/stable")
    assert answer.json()["model"]["aliases"] == {"latest": second}
    for version, left in ((first, {"latest": second}), (second, {})):
        answer = await http.delete(f"/models/rest/versions/{version}")
        assert (answer.status_code, answer.json()["model"]["aliases"]) == (200, left), answer.text
    registry = await temporal.get_workflow_handle(models_workflow_id("")).query(
        names.QUERY_GET_RECORD, result_type=internal_pb2.ModelRegistry
    )
    assert find_model(registry, "rest") is None, "it is there without a version"
    assert (await http.delete("/models/rest/aliases/stable")).status_code == 404
    assert await register(temporal, "rest") > second
    listed = await stub.ListModels(llm_pb2.ListModelsRequest())
    assert "rest" in {model.name for model in listed.trained}


async def test_a_repeat_of_a_registration_needs_no_room(temporal: Client) -> None:
    """Its trainer may have died before the answer came. The training failed, although its model was there."""
    version = llm_pb2.ModelVersion(version=1, pipeline_id="llmpipe-a-1", sha256=b"1" * 32)
    registered = internal_pb2.RegisteredVersion(version=version)
    full = internal_pb2.RegisteredVersion(version=version, files=[{"path": "x" * MAX_REGISTRY_BYTES}])
    handle = await temporal.start_workflow(
        names.MODELS_WORKFLOW_TYPE,
        internal_pb2.ModelRegistry(models=[{"name": "full", "versions": [full], "last_version": 1}]),
        id=models_workflow_id("full"),
        task_queue=names.WORKFLOW_QUEUE,
    )

    async def again() -> internal_pb2.RegisterModelResponse:
        request = internal_pb2.RegisterModelRequest(model="full", version=registered)
        response: internal_pb2.RegisterModelResponse = await handle.execute_update(
            names.UPDATE_REGISTER_MODEL, request, result_type=internal_pb2.RegisterModelResponse
        )
        return response

    assert (await again()).version == 1
    registered.version.pipeline_id = "llmpipe-a-2"
    with pytest.raises(WorkflowUpdateFailedError) as refused:
        await again()
    assert isinstance(refused.value.cause, ApplicationError)
    assert refused.value.cause.type == names.TOO_MANY_MODELS
    await handle.terminate()


# Errors


@pytest.mark.parametrize(
    ("body", "errors"),
    [
        ({}, {"user_id", "request_id", "model", "prompt"}),
        ({"job": {"user_id": "u"}}, {"job"}),
        (
            {"user_id": 1, "x": 2, "params": {"max_tokens": "many", "y": []}},
            {"user_id", "x", "params.max_tokens", "params.y"},
        ),
        ({"user_id": "u", "userId": "u"}, {"user_id"}),
        ({"messages": [{"role": "nobody"}, 7]}, {"messages[0].role", "messages[1]"}),
        ({"labels": {"team": 1, "ok": "yes"}}, {'labels["team"]'}),
        ({"labels": ["team"]}, {"labels"}),
        ({"params": {"stop": "end"}, "timeouts": {"total": 5}}, {"params.stop", "timeouts.total"}),
        ({"params": {"regex": "a", "json_schema": "{}"}}, {"params.json_schema"}),
        ({"notify": [{"nats": {"subject": "a"}, "webhook": {"url": "https://a.example"}}]}, {"notify[0].webhook"}),
        ({"prompt_file": {"sha256": 1, "size_bytes": "x"}}, {"prompt_file.sha256", "prompt_file.size_bytes"}),
        ({"labels": {"team": None}, "messages": [None]}, {'labels["team"]', "messages[0]"}),
    ],
)
async def test_every_bad_field_is_named(http: httpx.AsyncClient, body: Any, errors: set[str]) -> None:
    """Those that the gateway finds have the same names as those that are no JSON of a JobRequest."""
    answer = await http.post("/jobs", json=body)
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/problem+json")
    problem = answer.json()
    assert {error["field"] for error in problem["errors"]} >= errors
    assert all(error["message"] for error in problem["errors"])
    assert problem["status"] == 400
    assert not any(error["field"].startswith("job.") for error in problem["errors"])


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"user_id": NaN}', "application/json", 400),
        (b'{"user_id": "a", "user_id": "b"}', "application/json", 400),
        (b'{"\\ud800": 1}', "application/json", 400),
        (b'{"user_id": "\\ud800"}', "application/json", 400),
        (b"\xff", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"messages": [' + b"{}," * 30_000 + b"{}]}", "application/json", 400),
        (b"", "application/json", 400),
        (b"{}", "application/json; charset=utf-8", 400),
        (b"user_id=u", "application/x-www-form-urlencoded", 415),
        (b"{}", "text/plain", 415),
        (b"{}", "application/json; charset=iso-8859-1", 415),
        (b"{}", 'application/json; charset="UTF-16"', 415),
        (b"{}", 'application/json; charset="utf-8"', 400),
        (b'"' + b"x" * (4 * 1024 * 1024) + b'"', "application/json", 413),
    ],
)
async def test_a_body_that_is_no_job_is_refused(http: httpx.AsyncClient, body: bytes, kind: str, status: int) -> None:
    answer = await http.post("/jobs", content=body, headers={"Content-Type": kind})
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert answer.json()["status"] == status


async def test_what_is_not_there_says_so(http: httpx.AsyncClient) -> None:
    for method, path, status in (
        ("GET", "/jobs/llmjob-no-one", 404),
        ("GET", "/jobs/llmjob-no-one/stream", 404),
        ("POST", "/jobs/llmjob-no-one/cancel", 404),
        ("GET", "/jobs/", 404),
        ("GET", "/nothing", 404),
        ("GET", "/jobs/%ff", 400),
        ("PUT", "/jobs", 405),
        ("DELETE", "/jobs/x/status", 405),
        ("GET", "/jobs/x/cancel", 405),
        ("GET", "/jobs?page_size=many", 400),
        ("GET", "/jobs?state=busy", 400),
        ("GET", "/jobs?class=busy", 400),
        ("GET", "/jobs?class=JOB_CLASS_UNSPECIFIED", 400),
        ("GET", "/jobs?users=u", 400),
        ("GET", "/jobs?user_id=a&user_id=b", 400),
        ("GET", "/jobs?page_size=1000", 400),
        ("GET", "/models?x", 400),
        ("GET", "/models?x=1", 400),
    ):
        answer = await http.request(method, path)
        assert answer.status_code == status, (path, answer.text)
        assert answer.headers["content-type"] == "application/problem+json"
    assert (await http.put("/jobs")).headers["allow"] == "GET, HEAD, POST"
    (error,) = (await http.get("/jobs?state=busy")).json()["errors"]
    assert error["field"] == "state[0]"
    (error,) = (await http.get("/jobs?class=JOB_CLASS_UNSPECIFIED")).json()["errors"]
    assert error["field"] == "class[0]"


async def test_another_job_under_the_same_key_is_a_conflict(http: httpx.AsyncClient) -> None:
    job = new_job(params=llm_pb2.SamplingParams(max_tokens=1))
    await submit(http, job)
    answer = await http.post("/jobs", json={**body_of(job), "prompt": "something else"})
    assert (answer.status_code, answer.json()["reason"]) == (409, "REQUEST_ID_REUSED")


async def test_an_id_may_hold_what_looks_like_a_path(http: httpx.AsyncClient) -> None:
    """The suffix of a path is what follows its last `/` that is sent as such."""
    for sent, meant in (
        ("llmjob-a-b/x", "llmjob-a-b/x"),
        ("llmjob-a-b/x/status", "llmjob-a-b/x"),
        ("llmjob-a-b%2Fx%2Fstatus", "llmjob-a-b/x/status"),
        (f"{quote('llmjob-a-b/x/status', safe='')}/status", "llmjob-a-b/x/status"),
        ("llmjob-%C3%A9-b/status", "llmjob-\u00e9-b"),
    ):
        answer = await http.get(f"/jobs/{sent}")
        assert (answer.status_code, answer.json()["reason"]) in {(404, "JOB_NOT_FOUND"), (400, "INVALID_REQUEST")}
        if answer.status_code == 404:
            assert f"no job {meant}," in answer.json()["detail"]


async def test_head_is_get_without_a_body(http: httpx.AsyncClient) -> None:
    workflow_id = await submit(http, new_job(params=llm_pb2.SamplingParams(max_tokens=1)))
    response = f"/v1/responses/{response_id(workflow_id)}"
    described = (await http.get("/openapi.json")).json()["paths"]
    of_jobs = [
        path.replace("{id}", workflow_id) for path in described if path.startswith("/jobs") and "get" in described[path]
    ]
    further = [
        "/models",
        "/quota",
        "/openapi.json",
        "/v1/models",
        "/v1/models/docstrings",
        response,
        f"{response}/input_items",
    ]
    for path in (*of_jobs, *further):
        answer = await http.head(path)
        assert (path, answer.status_code, answer.content) == (path, 200, b"")
    running = await submit(http, new_job(model="idle"))
    # Not the end of the stream is waited for.
    for path in (f"/jobs/{running}/stream", f"/v1/responses/{response_id(running)}?stream=true"):
        assert (await http.head(path)).headers["content-type"].startswith("text/event-stream")
    await http.post(f"/jobs/{running}/cancel")
    assert (await http.head("/jobs/llmjob-no-one/stream")).status_code == 404


# The stream


async def test_a_stream_continues_after_the_last_event_that_the_client_holds(http: httpx.AsyncClient) -> None:
    workflow_id = await submit(http, new_job(params=llm_pb2.SamplingParams(max_tokens=40)))
    whole = await stream(http, workflow_id)
    deltas = [index for index, event in enumerate(whole) if event.json.get("delta")]
    cut = deltas[len(deltas) // 2]
    assert whole[cut].id == whole[cut].json["resume_token"]
    for arguments in (
        {"headers": {"Last-Event-ID": whole[cut].id}},
        {"params": {"last_event_id": whole[cut].id}},
        {"headers": {"Last-Event-ID": whole[cut].id}, "params": {"last_event_id": "begin"}},
    ):
        rest = await stream(http, workflow_id, **arguments)
        assert text_of([*whole[: cut + 1], *rest]) == whole[-1].json["result"]["output"]


async def test_a_client_that_comes_back_after_the_end_is_told_to_stop(http: httpx.AsyncClient) -> None:
    """A browser opens a stream that has ended again, until it gets 204."""
    workflow_id = await submit(http, new_job(params=llm_pb2.SamplingParams(max_tokens=1)))
    last = (await stream(http, workflow_id))[-1]
    assert (last.name, last.id) == ("end", "end")
    answer = await http.get(f"/jobs/{workflow_id}/stream", headers={"Last-Event-ID": last.id})
    assert (answer.status_code, answer.content) == (204, b"")
    assert (await http.get("/jobs/llmjob-no-one/stream", headers={"Last-Event-ID": last.id})).status_code == 404


async def test_an_id_of_no_event_is_refused(http: httpx.AsyncClient) -> None:
    workflow_id = await submit(http, new_job(params=llm_pb2.SamplingParams(max_tokens=1)))
    for wrong in ("nonsense", "\u00e9"):
        answer = await http.get(f"/jobs/{workflow_id}/stream", params={"last_event_id": wrong})
        assert answer.status_code == 400, answer.text


# The description


async def test_the_description_is_that_of_the_api(described: Description | None, stack: Stack) -> None:
    """It is valid, and it has every operation that the front answers, and no other."""
    validator = pytest.importorskip("openapi_spec_validator")
    assert described is not None
    validator.validate(described.described)
    assert described.described["openapi"].startswith("3.1")
    operations = {
        (path, method.upper()) for path, methods in described.described["paths"].items() for method in methods
    }
    async with httpx.AsyncClient(base_url=f"http://{stack.address('http')}", trust_env=False) as client:
        for path in {path for path, _ in operations}:
            # The front says which methods a path has.
            answer = await client.request("BREW", path.replace("{id}", "x"))
            assert answer.status_code == 405
            allowed = set(answer.headers["allow"].split(", ")) - {"HEAD"}
            assert {(path, method) for method in allowed} == {found for found in operations if found[0] == path}


async def test_events_are_as_described(described: Description | None, http: httpx.AsyncClient) -> None:
    if described is None:
        pytest.skip("openapi-spec-validator is not installed")
    for event in await stream(http, await submit(http, new_job(params=llm_pb2.SamplingParams(max_tokens=9)))):
        described.check_message("StreamStatusResponse", event.json)
