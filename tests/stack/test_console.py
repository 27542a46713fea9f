"""The console's pages, as they come from a front of the stack."""

import httpx

from llm_pb import llm_pb2, llm_pb2_grpc
from tests.support.jobs import new_job


async def test_the_list_shows_the_jobs_that_the_url_asks_for(
    http: httpx.AsyncClient, stub: llm_pb2_grpc.LlmServiceStub
) -> None:
    job = new_job(project_id="console-list", labels={"<b>team": "<script>"})
    workflow_id = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    async for _ in stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=workflow_id)):
        pass
    answer = await http.get("/", follow_redirects=True)
    assert (answer.status_code, answer.url.path) == (200, "/console/")
    while workflow_id not in (page := (await http.get(f"/console/?user_id={job.user_id}")).text):
        pass
    assert "&lt;b&gt;team" in page
    assert "<b>team" not in page
    assert workflow_id not in (await http.get("/console/?user_id=nobody-here")).text


async def test_every_answer_keeps_foreign_content_out(http: httpx.AsyncClient) -> None:
    for path, status in (("/console/", 200), ("/console/there-is-no-page", 404)):
        answer = await http.get(path)
        assert answer.status_code == status
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
        assert "unsafe" not in policy
        assert " style=" not in answer.text
