"""The paths of the REST API."""

from starlette.requests import Request
from starlette.responses import Response

from llm_pb import llm_pb2
from services.http.bodies import query_of
from services.http.front import Front
from services.http.resources import Package, Resource
from services.http.rest.messages import answer_with
from services.http.rest.problems import answer


def package(front: Front) -> Package:
    """Return the package. It takes all paths that no other package has."""

    async def models(request: Request) -> Response:
        query_of(request, ())
        return answer_with(await front.gateway.of(request).call("ListModels", llm_pb2.ListModelsRequest()))

    return Package("", (Resource("/models", {"GET": models}),), answer)
