"""The paths of OpenAI's API."""

from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llm_pb import llm_pb2
from services.http.bodies import query_of
from services.http.failures import Failure
from services.http.front import Front
from services.http.openai.answers import answered, failing, refuse
from services.http.openai.chat import Completions
from services.http.openai.files import Files
from services.http.openai.responses import Responses
from services.http.resources import Package, Resource


def package(front: Front) -> Package:
    """Return the package."""

    async def known(request: Request) -> list[dict[str, Any]]:
        query_of(request, ())
        response = await front.gateway.of(request).call("ListModels", llm_pb2.ListModelsRequest())
        return [
            {"id": model.name, "object": "model", "created": 0, "owned_by": "durable-llm"} for model in response.models
        ]

    async def models(request: Request) -> Response:
        return answered({"object": "list", "data": await known(request)})

    async def model(request: Request) -> Response:
        name = request.path_params["id"]
        for found in await known(request):
            if found["id"] == name:
                return answered(found)
        raise Failure(HTTPStatus.NOT_FOUND, f"there is no model {name!r}", "MODEL_NOT_FOUND")

    found = (
        *Responses(front).resources,
        *Completions(front).resources,
        *Files(front).resources,
        Resource("/v1/models", {"GET": models}),
        Resource("/v1/models/{id:id}", {"GET": model}),
    )
    resources = [
        Resource(resource.path, {method: failing(handler) for method, handler in resource.methods.items()})
        for resource in found
    ]
    return Package("/v1/", resources, refuse)
