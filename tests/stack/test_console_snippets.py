"""The calls that a job's page shows, each run as it stands there."""

import asyncio
import html
import json
import re
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.local.stack import Stack
from llm_pb import llm_pb2, llm_pb2_grpc
from openai_api.asked import NOTE_LABEL
from runtime.scopes import SCOPES
from tests.support.certificates import Authority
from tests.support.commands import run
from tests.support.credentials import KeyFile
from tests.support.form_browser import browsing
from tests.support.http_fronts import running_front
from tests.support.jobs import new_job, run_job
from tests.support.receivers import Receiver, status
from tests.support.stacks import tool

NAMES = ("curl", "grpcurl", "Python", "OpenAI")
SAMPLING = {
    "temperature": 0.1234567,
    "top_p": 0.9,
    "top_k": 7,
    "min_p": 0.01,
    "max_tokens": 6,
    "min_tokens": 2,
    "seed": 2**40 + 1,
    "stop": ["</stop>", 'it\'s "$HOME"\n`x`'],
    "presence_penalty": 0.5,
    "frequency_penalty": -0.25,
    "repetition_penalty": 1.1,
    "logprobs": 2,
}
MESSAGES = [
    {"role": "ROLE_SYSTEM", "content": "Be brief."},
    {"role": "ROLE_USER", "content": "First $HOME 'question'"},
    {"role": "ROLE_ASSISTANT", "content": "An answer."},
    {"role": "ROLE_USER", "content": 'Second "question"\nand more'},
]


def calls_in(page: str) -> dict[str, str]:
    """Return the calls by the name of their client, as a browser reads them."""
    found = re.findall(
        r'<summary>([^<]*)</summary><div class="code"><pre id="call-\d"[^>]*>(.*?)</pre>', page, re.DOTALL
    )
    return {name: html.unescape(text.removeprefix("\n")) for name, text in found}


async def run_call(name: str, text: str, **environment: Any) -> str:
    """Run a call and return what it prints."""
    if name in ("curl", "grpcurl"):
        # A shell finds the environment's own programs.
        path = f"{Path(tool('grpcurl')).parent}:/usr/bin:/bin"
        ended = await run("bash", "-c", text, PATH=path, **environment)
    else:
        ended = await run(sys.executable, "-c", text, **environment)
    assert ended.status == 0, ended.errors
    return ended.output


async def jobs_of(stub: llm_pb2_grpc.LlmServiceStub, user_id: str, count: int) -> dict[str, llm_pb2.JobRequest]:
    """Return the jobs of a user, by their id, once there are so many."""
    async with asyncio.timeout(90):
        while len(found := (await stub.List(llm_pb2.ListRequest(user_id=user_id))).jobs) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    ids = [summary.status.workflow_id for summary in found]
    return {id_: (await stub.GetJob(llm_pb2.GetJobRequest(workflow_id=id_))).job for id_ in ids}


@pytest.mark.parametrize("form", ["prompt", "messages", "bare"])
async def test_every_call_submits_the_job(
    http: httpx.AsyncClient, stub: llm_pb2_grpc.LlmServiceStub, receiver: Receiver, form: str
) -> None:
    """All but OpenAI's client find the job itself by its request id: they send the same job. OpenAI's starts a new one
    with everything that its API can say.
    """
    notify = [{"webhook": {"url": receiver.on(f"/console-call-{form}", status(200))}}]
    more: dict[str, Any] = {
        "prompt": {"prompt": "Return $HOME 'the' \"item\"\n`x`\\"},
        "messages": {"messages": MESSAGES, "cancel_if_unwatched": {"seconds": 3600}},
        "bare": {"prompt": "Return the"},
    }[form]
    rich: dict[str, Any] = {
        "params": SAMPLING,
        "priority": 5,
        "job_class": "JOB_CLASS_HIGH",
        "labels": {"team": 'it\'s "red"'},
        "notify": notify,
        "project_id": "calls",
        "timeouts": {"total": {"seconds": 600, "nanos": 500_000_000}, "queue": {"seconds": 60}},
        "notify_options": {"events": ["NOTIFY_EVENT_STARTED", "NOTIFY_EVENT_FINISHED"]},
    }
    job = new_job(user_id=f"console-call-{form}", **more, **(rich if form != "bare" else {"params": {"max_tokens": 3}}))
    seen = await run_job(stub, job)
    workflow_id = seen.final.status.workflow_id
    calls = calls_in((await http.get(f"/console/jobs/{workflow_id}")).text)
    assert tuple(calls) == NAMES
    assert json.loads(await run_call("curl", calls["curl"]))["workflow_id"] == workflow_id
    assert json.loads(await run_call("grpcurl", calls["grpcurl"]))["workflowId"] == workflow_id
    assert await run_call("Python", calls["Python"]) == seen.final.result.output
    assert set(await jobs_of(stub, job.user_id, 1)) == {workflow_id}

    await run_call("OpenAI", calls["OpenAI"])
    (made,) = [made for id_, made in (await jobs_of(stub, job.user_id, 2)).items() if id_ != workflow_id]
    labels = {name: value for name, value in made.labels.items() if name != NOTE_LABEL}
    assert (made.prompt, list(made.messages), made.params) == (job.prompt, list(job.messages), job.params)
    assert (labels, made.job_class, list(made.notify)) == (dict(job.labels), job.job_class, list(job.notify))
    if form != "bare":
        for name in ("project_id", "priority", "timeouts", "notify_options"):
            assert name in calls["OpenAI"], "the call names what it leaves out"


async def test_every_call_carries_a_credential_where_one_is_needed(stack: Stack, tmp_path: Path) -> None:
    """And connects to the gateway by TLS where the gateway has it."""
    keys, ca = KeyFile(tmp_path / "keys.json"), Authority(tmp_path)
    key = keys.add(SCOPES)
    settings = {"GATEWAY_ROLE": "api", "GATEWAY_API_KEYS_FILE": str(keys.path), "GATEWAY_REFLECTION": "true"}
    gateway = stack.add("gateway", {**settings, **ca.issue("server").environment("GATEWAY_TLS_")})
    await gateway.start()
    await gateway.wait_ready()
    address = stack.address(gateway.name)
    async with (
        running_front(stack, HTTP_GATEWAY=address, HTTP_GATEWAY_TLS_CA=str(ca.path)) as front,
        browsing(front.address) as browser,
    ):
        await browser.sign_in(key)
        await browser.get("/console/playground")
        form = {"user_id": "console-key", "model": "docstrings", "max_tokens": "3", "text": "Return the"}
        place = (await browser.post("/console/playground", **form)).headers["location"]
        page = (await browser.get(place)).text
        assert key not in page
        for name, text in calls_in(page).items():
            answer = await run_call(name, text, LLM_CREDENTIAL=key, LLM_CA=str(ca.path))
            assert answer, name
            if name in ("curl", "grpcurl"):
                assert place.rpartition("/")[2] in answer
    await gateway.terminate()
