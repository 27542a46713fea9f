"""The paths of trained models: aliases and versions."""

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from durable_llm.errors import Violation
from llm_pb import llm_pb2
from services.http.failures import bad_request
from services.http.front import Front
from services.http.parsing import parse
from services.http.rest.handlers import Handlers, Query
from services.http.rest.messages import answer_with
from services.http.rest.operations import Operation, Paths

_OF_PATH: Final = ("model", "alias")


class Models(Handlers):
    """The handlers."""

    id_field = "model"

    async def set_alias(self, request: Request, _: Query) -> Response:
        """Point an alias at a version. The body is a SetModelAliasRequest without what the path has."""
        message = parse(await self._body(request), self._alias(request), without=_OF_PATH)
        if not message.version:
            # The gateway would remove the alias, for which there is DELETE.
            raise bad_request(Violation("version", "is required: a version from 1"))
        return answer_with(await self._call(request, "SetModelAlias", message))

    async def remove_alias(self, request: Request, _: Query) -> Response:
        """Remove an alias."""
        return answer_with(await self._call(request, "SetModelAlias", self._alias(request)))

    async def delete_version(self, request: Request, _: Query) -> Response:
        """Remove a version, and the model with its last one."""
        value = {"version": request.path_params["version"]}
        message = self._of(request, parse(value, llm_pb2.DeleteModelVersionRequest()))
        return answer_with(await self._call(request, "DeleteModelVersion", message))

    def _alias(self, request: Request) -> llm_pb2.SetModelAliasRequest:
        message: llm_pb2.SetModelAliasRequest = self._of(
            request, llm_pb2.SetModelAliasRequest(alias=request.path_params["alias"])
        )
        return message


def paths(front: Front) -> Paths:
    """Return the operations."""
    models = Models(front)
    return {
        "/models/{id:id}/aliases/{alias:id}": {
            "PUT": Operation(
                "SetModelAlias",
                "Points an alias of a trained model at a version.",
                models.set_alias,
                llm_pb2.SetModelAliasResponse,
                body=llm_pb2.SetModelAliasRequest,
                body_without=_OF_PATH,
                body_required=True,
            ),
            "DELETE": Operation(
                "RemoveModelAlias",
                "Removes an alias of a trained model.",
                models.remove_alias,
                llm_pb2.SetModelAliasResponse,
            ),
        },
        "/models/{id:id}/versions/{version:id}": {
            "DELETE": Operation(
                "DeleteModelVersion",
                "Removes a version of a trained model, and the model with its last one.",
                models.delete_version,
                llm_pb2.DeleteModelVersionResponse,
            )
        },
    }
