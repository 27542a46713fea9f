"""The operations of the REST API: the handler of each, and its description for /openapi.json."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import Response

from services.http.bodies import query_of
from services.http.resources import Resource


@dataclass(frozen=True)
class Parameter:
    """A parameter of a query."""

    description: str
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})
    """The JSON Schema of the value. A parameter of the type `array` may occur more than once."""

    @property
    def repeated(self) -> bool:
        """Whether the parameter may occur more than once."""
        return bool(self.schema["type"] == "array")


@dataclass(frozen=True)
class Operation:
    """The handler of a method of a path, and its description."""

    name: str
    """The name of the method of LlmService, or of what the front adds."""
    summary: str
    handle: Callable[[Request, Mapping[str, list[str]]], Awaitable[Response]]
    """Answers a request. Its second argument is the query."""
    answer: type[Message] | None = None
    """The message that the answer holds. None: another media type."""
    status: HTTPStatus = HTTPStatus.OK
    media_type: str = "application/json"
    """The media type of the answer."""
    ends: str = ""
    """The condition of the answer 204, which has no body."""
    body: type[Message] | None = None
    """The message that the request's body holds."""
    body_without: tuple[str, ...] = ()
    """The fields of that message that the path sets. A body with such fields may be missing."""
    body_required: bool = False
    """Whether a body must be there although the path sets fields of it."""
    query: Mapping[str, Parameter] = field(default_factory=dict)
    """The parameters of the query by name."""

    async def __call__(self, request: Request) -> Response:
        """Answer a request. Raises Failure, 400, for a parameter that the operation does not have."""
        repeated = {name for name, parameter in self.query.items() if parameter.repeated}
        return await self.handle(request, query_of(request, self.query.keys() - repeated, repeated=repeated))


def streamed(
    name: str,
    summary: str,
    handle: Callable[[Request, Mapping[str, list[str]]], Awaitable[Response]],
    answer: type[Message],
    query: Mapping[str, Parameter],
) -> Operation:
    """Return an operation that answers with server-sent events whose data are messages of a type."""
    return Operation(
        name,
        summary,
        handle,
        answer,
        media_type="text/event-stream",
        ends="The client has had the last event.",
        query=query,
    )


Paths = Mapping[str, Mapping[str, Operation]]
"""The operations by the template of the path and by method."""


def resources(paths: Paths) -> list[Resource]:
    """Return the paths as resources, in their order."""
    return [Resource(path, operations) for path, operations in paths.items()]
