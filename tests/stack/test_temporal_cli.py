"""An operator can start, describe and signal jobs with Temporal's own CLI."""

import asyncio
import json
from typing import Any

import pytest
from temporalio.client import Client, WorkflowHandle

from deploy.local.stack import Stack
from jobs import names
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.jobs import new_job, run_job, unpack, until_output, watch
from tests.support.stacks import temporal_cli

SPECIFIED = {
    "user_id": "user-123",
    "request_id": "req-456",
    "model": "docstrings",
    "prompt": "Return the",
    "params": {"temperature": "0.1"},
}
"""Job of the original specification."""


async def start(stack: Stack, id_: str, job: object) -> None:
    queue = ("--task-queue", "gateway-workflows", "--workflow-id", id_)
    await temporal_cli(stack, "workflow", "start", "--type", "LLMJobWorkflow", *queue, "--input", json.dumps(job))


async def test_a_job_in_json_runs(stack: Stack, stub: LlmServiceStub) -> None:
    """A job that is started past the gateway is watched through it like any other, and List finds it."""
    await start(stack, "by-cli", SPECIFIED)
    seen = await watch(stub, "by-cli")
    assert seen.states[-1] == "SUCCEEDED"
    assert seen.output == seen.final.result.output.encode() != b""
    async with asyncio.timeout(60):
        # Temporal's visibility store is updated a moment later, and nothing notifies.
        while not (await stub.List(llm_pb2.ListRequest(user_id="user-123"))).jobs:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def test_a_bad_job_in_json_fails_with_the_reason(stack: Stack, stub: LlmServiceStub) -> None:
    """The worker checks the job as the gateway would have, and nothing is retried for ever."""
    await start(stack, "by-cli-bad", {**SPECIFIED, "model": "", "params": {"temperature": 9}})
    seen = await watch(stub, "by-cli-bad")
    assert seen.states[-1] == "FAILED"
    assert unpack(seen.final.status.error)["ErrorInfo"].reason == "INVALID_JOB"
    assert "temperature" in seen.final.status.error.message


async def test_json_that_is_no_job_fails_the_workflow(stack: Stack, stub: LlmServiceStub) -> None:
    """A field that llm.proto does not have fails the workflow immediately, and the API reports it."""
    await start(stack, "by-cli-foreign", {"promt": "a typo"})
    seen = await watch(stub, "by-cli-foreign")
    assert seen.states[-1] == "FAILED"
    assert "promt" in seen.final.status.error.message


@pytest.mark.parametrize(
    ("about", "given"),
    [
        ("nothing", []),
        ("null", [None]),
        ("an-empty-job", [{}]),
        ("two-jobs", [new_job(), new_job()]),
        ("two-jobs-in-json", [SPECIFIED, SPECIFIED]),
        ("three-inputs", [new_job(), None, "x"]),
    ],
)
async def test_a_workflow_without_one_job_fails(
    stub: LlmServiceStub, temporal: Client, about: str, given: list[Any]
) -> None:
    """The workflow is not retried for ever."""
    id_ = f"by-hand-with-{about}"
    await temporal.start_workflow(names.JOB_WORKFLOW_TYPE, args=given, id=id_, task_queue=names.WORKFLOW_QUEUE)
    seen = await watch(stub, id_)
    assert seen.states[-1] == "FAILED"
    assert unpack(seen.final.status.error)["ErrorInfo"].reason == "INVALID_JOB"


@pytest.mark.parametrize("given", [[], [{}, {}]], ids=["none", "two"])
async def test_deliveries_without_one_state_end(temporal: Client, given: list[Any]) -> None:
    handle: WorkflowHandle[None, None] = await temporal.start_workflow(
        names.DELIVERY_WORKFLOW_TYPE,
        args=given,
        id=f"deliveries-of-{len(given)}",
        task_queue=names.WORKFLOW_QUEUE,
    )
    await asyncio.wait_for(handle.result(), 60)


async def test_an_open_job_in_json_is_listed_by_what_it_is(
    stack: Stack, stub: LlmServiceStub, temporal: Client
) -> None:
    """It has its search attributes before its end."""
    job = {**SPECIFIED, "user_id": "by-cli-open", "project_id": "p", "params": {"max_tokens": 4000}}
    await start(stack, "by-cli-open", job)
    async with asyncio.timeout(30):
        while not (found := (await stub.List(llm_pb2.ListRequest(user_id="by-cli-open"))).jobs):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        (listed,) = found
    assert (listed.request_id, listed.model, listed.project_id) == ("req-456", "docstrings", "p")
    assert listed.status.state in (llm_pb2.JOB_STATE_QUEUED, llm_pb2.JOB_STATE_RUNNING)
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id="by-cli-open"))
    assert (await watch(stub, "by-cli-open")).states[-1] == "CANCELLED"
    described = (await temporal.get_workflow_handle("by-cli-open").describe()).typed_search_attributes
    assert described.get(names.JOB_STATE) == "JOB_STATE_CANCELLED"
    assert described.get(names.USER_ID) == "by-cli-open"


async def test_the_signal_cancels(stack: Stack, stub: LlmServiceStub) -> None:
    """The signal has a reason as JSON or none. More than one input counts as none."""
    reason = ("--input", '{"reason": "by hand"}')
    for name, more, said in (("with", reason, "by hand"), ("without", (), None), ("with-two", reason * 2, None)):
        await start(stack, f"by-cli-{name}", {**SPECIFIED, "params": {"max_tokens": 4000}})
        await until_output(stub, f"by-cli-{name}")
        await temporal_cli(stack, "workflow", "signal", "--name", "Cancel", "-w", f"by-cli-{name}", *more)
        seen = await watch(stub, f"by-cli-{name}")
        assert seen.states[-1] == "CANCELLED"
        assert seen.final.status.error.message == (said or "cancelled on request")


async def test_the_cli_shows_payloads_as_json(stack: Stack, stub: LlmServiceStub) -> None:
    """The codec server that `make up` starts decodes them."""
    seen = await run_job(stub, new_job("A prompt to look for.", params={"max_tokens": 2}))
    codec = ("--codec-endpoint", f"http://{stack.address('codec')}")
    shown = await temporal_cli(stack, "workflow", "show", "-w", seen.final.status.workflow_id, "--detailed", *codec)
    assert "A prompt to look for." in shown
    asked = ("workflow", "query", "--type", "GetStatus", "-w", seen.final.status.workflow_id, *codec)
    assert "JOB_STATE_SUCCEEDED" in await temporal_cli(stack, *asked)
