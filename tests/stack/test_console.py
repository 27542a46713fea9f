"""The console's pages, as they come from a front of the stack."""

import asyncio
import html
import re
from collections.abc import Callable

import httpx
import pytest

from deploy.local.stack import Stack
from llm_pb import llm_pb2, llm_pb2_grpc
from tests.support.form_browser import TOKEN
from tests.support.http_events import events_of, text_of
from tests.support.http_fronts import running_front
from tests.support.jobs import new_job, run_job
from tests.support.receivers import Receiver, status

HOSTILE = "\n<script>alert(1)</script> </pre> & <b>bold</b> \u202eevil \x07 'quoted' \"too\"\r\nend"


async def until(http: httpx.AsyncClient, path: str, holds: Callable[[str], bool]) -> str:
    """Return a page once the condition holds. It polls, as the page itself does."""
    async with asyncio.timeout(90):
        while not holds(page := (await http.get(path)).text):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    return page


async def post(http: httpx.AsyncClient, path: str, origin: str = "", **fields: str) -> httpx.Response:
    """Send a form as a page of the console does."""
    own = f"{http.base_url.scheme}://{http.base_url.netloc.decode()}"
    headers = {"Origin": origin or own, "Content-Type": "application/x-www-form-urlencoded"}
    token = TOKEN.search((await http.get("/console/playground")).text)
    assert token is not None
    return await http.post(path, data={"csrf_token": token[1], **fields}, headers=headers)


def text_in(page: str, id_: str) -> str:
    """Return the text of an element as a browser reads it."""
    found = re.search(rf'<pre[^>]* id="{id_}"[^>]*>(.*?)</pre>', page, re.DOTALL)
    assert found is not None
    return html.unescape(found[1].removeprefix("\n"))


async def test_the_list_shows_the_jobs_that_the_url_asks_for(
    http: httpx.AsyncClient, stub: llm_pb2_grpc.LlmServiceStub
) -> None:
    job = new_job(project_id="console-list", labels={"<b>team": "<script>"})
    workflow_id = (await run_job(stub, job)).final.status.workflow_id
    answer = await http.get("/", follow_redirects=True)
    assert (answer.status_code, answer.url.path) == (200, "/console/")
    page = await until(http, f"/console/?user_id={job.user_id}", lambda page: "state-succeeded" in page)
    assert "&lt;b&gt;team" in page
    assert "<b>team" not in page
    for query, shown in (
        ("project_id=console-list&model=docstrings&state=JOB_STATE_SUCCEEDED", True),
        (f"user_id={job.user_id}&state=JOB_STATE_FAILED", False),
        (f"user_id={job.user_id}&model=idle", False),
        ("user_id=nobody-here", False),
    ):
        assert (workflow_id in (await http.get(f"/console/?{query}")).text) == shown, query


async def test_the_list_refuses_a_state_that_does_not_exist(http: httpx.AsyncClient) -> None:
    answer = await http.get("/console/?state=RUNNING")
    assert answer.status_code == 400
    assert "<code>state</code>" in answer.text


async def test_the_list_has_pages(http: httpx.AsyncClient, stub: llm_pb2_grpc.LlmServiceStub) -> None:
    jobs = [new_job(user_id="console-pages", params={"max_tokens": 1}) for _ in range(27)]
    await asyncio.gather(*(run_job(stub, job) for job in jobs))
    page = await until(http, "/console/?user_id=console-pages", lambda page: page.count("state-succeeded") == 25)
    following = html.unescape(re.search(r'href="([^"]*page_token[^"]*)"', page)[1])  # type: ignore[index]
    await until(http, following, lambda page: page.count("<tr data-key") == 2 and "First page" in page)


async def test_every_answer_keeps_foreign_content_out(http: httpx.AsyncClient) -> None:
    for path, code in (("/console/", 200), ("/console/there-is-no-page", 404), ("/console/jobs/llmjob-nobody", 404)):
        answer = await http.get(path)
        assert answer.status_code == code
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
        assert "unsafe" not in policy
        assert " style=" not in answer.text
        files = re.findall(r'(?:src|href)="(/console/static/[^"]+)"', answer.text)
        for file in files:
            assert "immutable" in (await http.get(file)).headers["cache-control"], file
    assert (await http.get("/console/static/an-older-version/console.css")).headers["cache-control"] == "no-store"
    assert (await http.get("/console/static/x/..%2Fpages.py")).status_code == 404


async def test_what_a_job_says_is_text(http: httpx.AsyncClient, stub: llm_pb2_grpc.LlmServiceStub) -> None:
    job = new_job(HOSTILE, labels={"<i>": "</dl><script>"}, params={"max_tokens": 40, "stop": ["</script>"]})
    seen = await run_job(stub, job)
    page = (await http.get(f"/console/jobs/{seen.final.status.workflow_id}")).text
    assert text_in(page, "prompt") == HOSTILE
    assert text_in(page, "output") == seen.final.result.output
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page


async def test_a_long_prompt_is_cut_and_can_be_shown(
    http: httpx.AsyncClient, stub: llm_pb2_grpc.LlmServiceStub
) -> None:
    prompt = "word " * 1000 + "the end"
    seen = await run_job(stub, new_job(prompt, params={"max_tokens": 1}))
    page = (await http.get(f"/console/jobs/{seen.final.status.workflow_id}")).text
    assert "Show all 5\u202f007 characters" in page
    assert text_in(page, "prompt") == prompt
    assert page.count("the end") == 1, "the calls leave it out"


async def test_an_error_says_why_and_the_timeline_who(
    http: httpx.AsyncClient, stub: llm_pb2_grpc.LlmServiceStub
) -> None:
    seen = await run_job(stub, new_job("[[fault:failed@2]]", params={"max_tokens": 3}))
    page = (await http.get(f"/console/jobs/{seen.final.status.workflow_id}")).text
    assert "<code>ENGINE_FAILED</code>: The engine failed on this job and can continue with others." in page
    assert page.count("<strong>Attempt ") == len(seen.final.result.attempts)
    assert seen.final.result.attempts[0].worker in page


async def test_the_consoles_stream_continues_after_the_last_event(
    http: httpx.AsyncClient, stub: llm_pb2_grpc.LlmServiceStub
) -> None:
    seen = await run_job(stub, new_job(params={"max_tokens": 30}))
    path = f"/console/jobs/{seen.final.status.workflow_id}/events"
    async with http.stream("GET", path) as answer:
        events = [event async for event in events_of(answer)]
    assert text_of(events) == seen.final.result.output
    async with http.stream("GET", path, headers={"Last-Event-ID": events[-2].id}) as answer:
        assert text_of([event async for event in events_of(answer)]) == ""
    assert (await http.get(path, headers={"Last-Event-ID": "end"})).status_code == 204
    assert (await http.get("/console/jobs/llmjob-nobody/events")).status_code == 404


async def test_cancel_leads_back_to_the_job(http: httpx.AsyncClient, stub: llm_pb2_grpc.LlmServiceStub) -> None:
    job = new_job(params={"max_tokens": 8000})
    workflow_id = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    path = f"/console/jobs/{workflow_id}"
    refused = await post(http, f"{path}/cancel", reason="\x07")
    assert refused.status_code == 400
    assert 'role="alert">reason' in refused.text
    answer = await post(http, f"{path}/cancel", reason="<b>enough")
    assert (answer.status_code, answer.headers["location"]) == (303, path)
    page = await until(http, path, lambda page: 'data-state="JOB_STATE_CANCELLED"' in page)
    assert "&lt;b&gt;enough" in page
    assert f'action="{path}/cancel"' not in page


async def test_redeliver_sends_the_outcome_again(
    http: httpx.AsyncClient, stub: llm_pb2_grpc.LlmServiceStub, receiver: Receiver
) -> None:
    target = llm_pb2.NotifyTarget(webhook=llm_pb2.Webhook(url=receiver.on("/console-again", status(200))))
    seen = await run_job(stub, new_job(notify=[target], params={"max_tokens": 1}))
    path = f"/console/jobs/{seen.final.status.workflow_id}"
    await until(http, path, lambda page: "state-delivered" in page)
    assert (await post(http, f"{path}/redeliver")).status_code == 303
    first, again = await receiver.received("/console-again", 2)
    assert first.headers["webhook-id"] == again.headers["webhook-id"]


async def test_delete_asks_first(http: httpx.AsyncClient, stub: llm_pb2_grpc.LlmServiceStub) -> None:
    workflow_id = (await run_job(stub, new_job(params={"max_tokens": 1}))).final.status.workflow_id
    path = f"/console/jobs/{workflow_id}/delete"
    assert "Delete this job?" in (await http.get(path)).text
    assert workflow_id in (await http.get(f"/console/jobs/{workflow_id}")).text
    deletion = (await post(http, path)).headers["location"]
    await until(http, deletion, lambda page: "state-done" in page)
    assert (await http.get(f"/console/jobs/{workflow_id}")).status_code == 404


async def test_a_form_of_the_playground_that_is_sent_twice_makes_one_job(http: httpx.AsyncClient) -> None:
    page = (await http.get("/console/playground")).text
    nonce = re.search(r'name="nonce" value="([^"]+)"', page)[1]  # type: ignore[index]
    form = {"nonce": nonce, "user_id": "console-twice", "model": "docstrings", "max_tokens": "3", "text": "Say\r\nit"}
    one, two = await asyncio.gather(*(post(http, "/console/playground", **form) for _ in range(2)))
    changed = await post(http, "/console/playground", **{**form, "text": "Say another"})
    assert one.status_code == two.status_code == changed.status_code == 303
    assert one.headers["location"] == two.headers["location"] != changed.headers["location"]
    assert text_in((await http.get(one.headers["location"])).text, "prompt") == "Say\nit"


async def test_the_playground_submits_a_job_of_a_class(http: httpx.AsyncClient) -> None:
    form = {"user_id": "console-class", "model": "docstrings", "max_tokens": "1", "text": "x"}
    for job_class, words in (("JOB_CLASS_HIGH", "High"), ("", "Standard")):
        place = (await post(http, "/console/playground", **form, job_class=job_class)).headers["location"]
        assert f"<dt>Class</dt><dd>{words}</dd>" in (await http.get(place)).text
        again = (await http.get(f"/console/playground?job={place.rpartition('/')[2]}")).text
        assert f'<option value="{job_class}" selected>{words}</option>' in again
    assert 'id="job_class-wrong"' in (await post(http, "/console/playground", **form, job_class="URGENT")).text


async def test_the_playground_names_every_bad_field_and_keeps_the_rest(http: httpx.AsyncClient) -> None:
    form = {
        "user_id": "me",
        "model": "docstrings",
        "temperature": "hot",
        "kind": "chat",
        "text": "<b>Hi",
        "system": "S",
    }
    answer = await post(http, "/console/playground", **form)
    assert answer.status_code == 400
    assert 'id="temperature-wrong">must be a number' in answer.text
    answer = await post(http, "/console/playground", **{**form, "temperature": "9", "max_tokens": "-1"})
    assert answer.status_code == 400
    assert 'id="temperature-wrong"' in answer.text
    assert 'id="max_tokens-wrong"' in answer.text
    assert "&lt;b&gt;Hi</textarea>" in answer.text


async def test_stop_texts_are_counted_before_anything_is_made_of_them(http: httpx.AsyncClient) -> None:
    """Of a million the front made a message, and answered nobody for seconds."""
    form = {"user_id": "console", "model": "docstrings", "kind": "prompt", "text": "x", "stop": "a\n" * 1_000_000}
    answer = await post(http, "/console/playground", **form)
    assert answer.status_code == 400
    assert "must have at most 100 lines" in answer.text


async def test_use_again_says_what_the_form_has_no_place_for(
    http: httpx.AsyncClient, stub: llm_pb2_grpc.LlmServiceStub
) -> None:
    params = {"temperature": 0.1234567, "min_p": 0.1, "stop": ["a\nb"]}
    job = new_job(
        messages=[
            {"role": "ROLE_SYSTEM", "content": "the system's"},
            {"role": "ROLE_USER", "content": "the first question"},
            {"role": "ROLE_ASSISTANT", "content": "the first answer"},
            {"role": "ROLE_USER", "content": "the second question"},
            {"role": "ROLE_ASSISTANT", "content": "the beginning of an answer"},
        ],
        params=params,
        labels={"team": "red"},
        priority=4,
    )
    submitted = await stub.Submit(llm_pb2.SubmitRequest(job=job))
    page = (await http.get(f"/console/playground?job={submitted.workflow_id}")).text
    assert 'value="0.1234567"' in page
    assert "the system&#39;s</textarea>" in page
    assert "the second question</textarea>" in page
    assert 'name="max_tokens" type="text" value=""' in page, "the job has none"
    note = re.search(r'id="left-out".*?</p>', page, re.DOTALL)
    assert note is not None
    assert "3 messages" in note[0]
    assert re.findall("<code>(.*?)</code>", note[0]) == ["priority", "labels", "min_p", "stop"]


async def test_use_again_of_a_simple_job_leaves_nothing_out(
    http: httpx.AsyncClient, stub: llm_pb2_grpc.LlmServiceStub
) -> None:
    job = new_job(params={"temperature": 0.5, "stop": ["x", "y"]}, project_id="again")
    submitted = await stub.Submit(llm_pb2.SubmitRequest(job=job))
    page = (await http.get(f"/console/playground?job={submitted.workflow_id}")).text
    assert 'id="left-out"' not in page
    assert "Say something.</textarea>" in page
    assert "x\ny</textarea>" in page


@pytest.mark.parametrize("origin", ["https://elsewhere.example", "null"])
async def test_no_other_page_may_send_a_form(http: httpx.AsyncClient, origin: str) -> None:
    form = {"user_id": "foreign", "model": "docstrings", "text": "x"}
    assert (await post(http, "/console/playground", origin, **form)).status_code == 403
    assert (await http.post("/console/playground", data=form)).status_code == 403
    answer = await http.post("/console/playground", json=form, headers={"Origin": str(http.base_url).rstrip("/")})
    assert answer.status_code == 415


async def test_models_show_their_queues(http: httpx.AsyncClient) -> None:
    page = await until(http, "/console/models", lambda page: "Available" in page)
    assert "No worker" in page, "nobody polls for the model `idle`"
    cells = re.findall(
        r'<td class="main">(High|Standard|Background|Scheduled)</td>\s*<td[^>]*>(.*?)</td>\s*<td[^>]*>(.*?)<', page
    )
    assert cells == [
        ("High", "100", "67 %"),
        ("Standard", "50", "33 %"),
        ("Background", "10", "67 %"),
        ("Scheduled", "5", "33 %"),
    ]


async def test_workers_show_how_full_they_are(http: httpx.AsyncClient, stub: llm_pb2_grpc.LlmServiceStub) -> None:
    final = (await run_job(stub, new_job(params={"max_tokens": 1}))).final
    page = await until(http, "/console/models", lambda page: "Serving" in page)
    assert final.result.metadata.worker in page
    assert re.search(r"\d of \d+</span> <meter", page)


async def test_settings_link_a_job_and_leave_the_console_out(stack: Stack, stub: llm_pb2_grpc.LlmServiceStub) -> None:
    final = (await run_job(stub, new_job(params={"max_tokens": 1}))).final.status
    links = {
        "HTTP_CONSOLE_TRACE_URL": "https://traces.example/trace/{trace_id}",
        "HTTP_CONSOLE_TEMPORAL_URL": "https://temporal.example/workflows/{workflow_id}/{run_id}",
        # Pages of these origins may call the API. The console's forms are its own.
        "HTTP_CORS_ORIGINS": "https://trusted.example",
    }
    async with running_front(stack, **links) as front:
        page = (await front.client.get(f"/console/jobs/{final.workflow_id}")).text
        assert f"https://temporal.example/workflows/{final.workflow_id}/{final.run_id}" in page
        assert f"https://traces.example/trace/{final.trace_id}" in page
        assert (await post(front.client, "/console/playground", "https://trusted.example")).status_code == 403
        trusted = {"Origin": "https://trusted.example"}
        assert "access-control-allow-origin" in (await front.client.get("/jobs", headers=trusted)).headers
        for path in ("/", "/console/", "/console/playground", "/console/nothing", f"/console/jobs/{final.workflow_id}"):
            answer = await front.client.get(path, headers=trusted)
            assert "access-control-allow-origin" not in answer.headers, path
    async with running_front(stack, HTTP_CONSOLE="false") as front:
        answer = await front.client.get("/console/")
        assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
