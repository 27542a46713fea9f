"""The cache of answers through the real stack: tests/unit/test_answer_cache.py has the rules."""

import asyncio
import uuid
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.wrappers_pb2 import StringValue
from temporalio.client import Client
from temporalio.testing import ActivityEnvironment

from deploy.local.stack import Stack
from llm_pb import internal_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from services.gateway.quotas.ended_jobs import LedgerActivities
from tests.support.deletions import delete
from tests.support.jobs import new_job, run_job, until_output, watch
from tests.support.pipelines import follow, new_pipeline, submit

TTL = llm_pb2.AnswerCache(ttl=Duration(seconds=3600))


@pytest.fixture
def prompt() -> str:
    return f"Say {uuid.uuid4().hex}."


def job(prompt: str, **changes: Any) -> llm_pb2.JobRequest:
    return new_job(prompt, **{"params": {"max_tokens": 20, "temperature": 0}, "cache": TTL, **changes})


async def test_the_answer_is_kept_until_its_job_is_deleted(stub: LlmServiceStub, temporal: Client, prompt: str) -> None:
    first = await run_job(stub, job(prompt))
    second = await run_job(stub, job(prompt))
    metadata = second.final.result.metadata
    assert [seen.final.result.metadata.cached for seen in (first, second)] == [False, True]
    assert second.output == first.output == second.final.result.output.encode()
    assert metadata.output_tokens == first.final.result.metadata.output_tokens == 20
    progress = [message.status.progress for message in second.messages if message.HasField("status")]
    assert (progress[-1].percent, progress[-1].output_tokens) == (100, 20)
    # A ledger that has not heard of their ends counts what they have generated.
    request = internal_pb2.FindEndedJobsRequest(workflow_ids=[one.final.status.workflow_id for one in (first, second)])
    found = await ActivityEnvironment().run(LedgerActivities(temporal).find_ended_jobs, request)
    used = dict(zip(found.ended, found.output_tokens, strict=True))
    assert [used[id_] for id_ in request.workflow_ids] == [20, 0]

    deleted = await delete(stub, second.final.status.workflow_id)
    assert deleted.state == llm_pb2.DELETION_STATE_DONE
    assert (await run_job(stub, job(prompt))).final.result.metadata.cached, "the entry is the first job's"
    await delete(stub, first.final.status.workflow_id)
    assert not (await run_job(stub, job(prompt))).final.result.metadata.cached


async def test_equal_jobs_at_once_generate_once(stub: LlmServiceStub, prompt: str) -> None:
    slow = {"params": {"max_tokens": 1000, "seed": 4}}
    first = (await stub.Submit(llm_pb2.SubmitRequest(job=job(prompt, **slow)))).workflow_id
    await until_output(stub, first)
    others = await asyncio.gather(*(run_job(stub, job(prompt, **slow)) for _ in range(4)))
    made = await watch(stub, first)
    assert not made.final.result.metadata.cached
    for seen in others:
        assert seen.final.result.metadata.cached
        assert seen.output == made.output
        assert "queued" in {message.status.progress.stage for message in seen.messages}


async def test_over_http_and_in_pipelines(
    http: httpx.AsyncClient, stub: LlmServiceStub, stack: Stack, prompt: str
) -> None:
    """What a pipeline takes from the cache is none of its usage."""
    asked = job(prompt, params={"max_tokens": 8, "seed": 1})
    answer = await http.post("/jobs", json=MessageToDict(asked, preserving_proto_field_name=True))
    assert answer.status_code == 202, answer.text
    await watch(stub, answer.json()["workflow_id"])
    asked.request_id = "again"
    again = await http.post("/jobs", json=MessageToDict(asked, preserving_proto_field_name=True))
    id_ = again.json()["workflow_id"]
    assert (await watch(stub, id_)).final.result.metadata.cached
    assert (await http.get(f"/jobs/{id_}")).json()["result"]["metadata"]["cached"] is True
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        pipelines = PipelineServiceStub(channel)
        seen = await follow(
            pipelines, (await submit(pipelines, new_pipeline("twice", StringValue(value=prompt)))).pipeline_id
        )
    assert seen.result is not None, seen.status
    value = StringValue()
    seen.result.value.Unpack(value)
    assert value.value == "True True"
    assert seen.result.usage.output_tokens == 0
