"""The HTTP front as its callers see it: the real process, in front of a real gateway."""

import httpx

from deploy.local.stack import Stack
from llm_pb import llm_pb2, llm_pb2_grpc


async def test_it_lists_the_models_of_the_gateway(
    stack: Stack, stub: llm_pb2_grpc.LlmServiceStub, http: httpx.AsyncClient
) -> None:
    answer = await http.get("/models")
    known = await stub.ListModels(llm_pb2.ListModelsRequest())
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert [model["name"] for model in answer.json()["models"]] == [model.name for model in known.models]
