"""Requests with `store=false`: however they end, their job does not stay."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final, NamedTuple

import grpc
import httpx
import pytest

from deploy.local.stack import Stack
from llm_pb import llm_pb2, llm_pb2_grpc
from tests.support.http_fronts import running_front
from tests.support.unsteady_gateway import Turn, UnsteadyGateway, serving

PATIENCE: Final = 120
LONG: Final = 4000
"""Output tokens of a job that runs on while a test looks at it."""
BODIES: Final[dict[str, dict[str, Any]]] = {
    "/v1/responses": {"input": "Go on.", "max_output_tokens": LONG},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": LONG},
    "/v1/completions": {"prompt": "Go on.", "max_tokens": LONG},
}
COMPLETIONS: Final = [path for path in BODIES if path.endswith("completions")]


class Unsteady(NamedTuple):
    """A front, and the gateway that it calls."""

    client: httpx.AsyncClient
    gateway: UnsteadyGateway


@pytest.fixture(scope="module")
async def unsteady(stack: Stack) -> AsyncIterator[Unsteady]:
    async with (
        serving(stack, Turn()) as gateway,
        running_front(stack, HTTP_GATEWAY=gateway.address, HTTP_GATEWAY_RETRY="PT0S") as front,
    ):
        yield Unsteady(front.client, gateway)


def body_of(path: str, *, stream: bool, user: str = "forgotten") -> dict[str, Any]:
    return {"model": "docstrings", "store": False, "stream": stream, "user": user, **BODIES[path]}


async def jobs_of(stub: llm_pb2_grpc.LlmServiceStub, user: str) -> list[str]:
    response = await stub.List(llm_pb2.ListRequest(user_id=user))
    return [job.status.workflow_id for job in response.jobs]


async def until_listed(stub: llm_pb2_grpc.LlmServiceStub, user: str) -> str:
    """Return the id of the user's one job, once it is listed."""
    async with asyncio.timeout(PATIENCE):
        while not (found := await jobs_of(stub, user)):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    (workflow_id,) = found
    return workflow_id


async def until_gone(stub: llm_pb2_grpc.LlmServiceStub, workflow_id: str) -> None:
    """Return once no job has the id any more."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await stub.GetJob(llm_pb2.GetJobRequest(workflow_id=workflow_id))
            except grpc.aio.AioRpcError as error:
                if error.code() == grpc.StatusCode.NOT_FOUND:
                    return
                raise
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", COMPLETIONS)
async def test_a_completion_whose_job_fails(
    http: httpx.AsyncClient, stub: llm_pb2_grpc.LlmServiceStub, path: str, *, stream: bool
) -> None:
    user = f"failing{path.replace('/', '-')}-{stream}"
    asking = asyncio.create_task(http.post(path, json=body_of(path, stream=stream, user=user)))
    workflow_id = await until_listed(stub, user)
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=workflow_id))
    answer = await asking
    assert (answer.status_code, '"error"' in answer.text) == (200 if stream else 500, True)
    await until_gone(stub, workflow_id)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "turn", [Turn(messages=0), Turn(messages=3, fails=False, rewinds=True)], ids=["away", "rewind"]
)
async def test_a_stream_that_cannot_go_on(
    unsteady: Unsteady, stub: llm_pb2_grpc.LlmServiceStub, path: str, turn: Turn
) -> None:
    """It says to call again, for there is nothing to retrieve."""
    unsteady.gateway.plan(turn)
    answer = await unsteady.client.post(path, json=body_of(path, stream=True))
    assert "error" in answer.text
    assert "call again" in answer.text
    assert "retrieve" not in answer.text
    await until_gone(stub, unsteady.gateway.submitted[-1])


@pytest.mark.parametrize("path", BODIES)
async def test_an_answer_that_cannot_be_had(unsteady: Unsteady, stub: llm_pb2_grpc.LlmServiceStub, path: str) -> None:
    unsteady.gateway.plan(Turn(messages=0))
    answer = await unsteady.client.post(path, json=body_of(path, stream=False))
    assert answer.status_code == 503
    await until_gone(stub, unsteady.gateway.submitted[-1])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", BODIES)
async def test_a_front_that_shuts_down(
    stack: Stack, stub: llm_pb2_grpc.LlmServiceStub, path: str, *, stream: bool
) -> None:
    user = f"ending{path.replace('/', '-')}-{stream}"
    async with running_front(stack) as front:
        asking = asyncio.create_task(front.client.post(path, json=body_of(path, stream=stream, user=user)))
        workflow_id = await until_listed(stub, user)
        await front.process.terminate()
        answer = await asking
        assert answer.status_code == (200 if stream else 503)
    await until_gone(stub, workflow_id)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", BODIES)
async def test_a_full_front_submits_nothing(
    stack: Stack, stub: llm_pb2_grpc.LlmServiceStub, path: str, *, stream: bool
) -> None:
    """So a request that it refuses can be sent again as it is, with the same Idempotency-Key."""
    user = f"refused{path.replace('/', '-')}-{stream}"
    async with running_front(stack, HTTP_MAX_STREAMS="1") as front:
        taking = body_of("/v1/responses", stream=True, user="taking")
        async with front.client.stream("POST", "/v1/responses", json=taking) as open_stream:
            await anext(open_stream.aiter_lines())
            answer = await front.client.post(path, json=body_of(path, stream=stream, user=user))
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "limit_reached")
            assert await jobs_of(stub, user) == []
