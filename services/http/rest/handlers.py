"""What the handlers of the REST API share: a request as one call of the gateway, and the parameters of lists."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar
from urllib.parse import quote

from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import Response

from durable_llm import ApiError
from durable_llm.errors import Violation
from services.http.bodies import read_object
from services.http.failures import Failure, bad_request, of_call, with_fields
from services.http.front import Front
from services.http.parsing import parse
from services.http.rest.messages import answer_with
from services.http.rest.operations import Parameter

Query = Mapping[str, list[str]]


class Handlers:
    """The base of the handlers of one kind of resource."""

    id_field: ClassVar[str]
    """The field of requests that holds the id in the path."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def _answer(self, request: Request, method: str, message: Message) -> Response:
        """Answer with the response to a message about what the path names."""
        return answer_with(await self._call(request, method, self._of(request, message)))

    async def _answer_to_body(
        self, request: Request, method: str, message: Message, status: HTTPStatus = HTTPStatus.OK
    ) -> Response:
        """Answer with the response to a message about what the path names, and what the body adds."""
        return answer_with(await self._call(request, method, await self._with_body(request, message)), status)

    async def _call(self, request: Request, method: str, message: Message) -> Any:
        return await self._front.gateway.of(request).call(method, message)

    async def _send(self, request: Request, method: str, message: Any, part: str) -> Any:
        """Return the response to a message whose field `part` is the body. Bad fields are named as in the body."""
        value, inner = await self._body(request), getattr(message, part)
        if part in value:
            words = (
                f"is no field of {inner.DESCRIPTOR.name}: the body is the {part} itself, without an object around it"
            )
            raise bad_request(Violation(part, words))
        inner.SetInParent()
        parse(value, inner)
        try:
            return await self._call(request, method, message)
        except ApiError as error:
            raise with_fields(of_call(error), lambda field: field.removeprefix(f"{part}.")) from error

    async def _list(
        self, request: Request, method: str, message: Message, query: Query, repeated: Mapping[str, str]
    ) -> Response:
        """Answer with a page. The query holds the fields of the message.

        `repeated` are the repeated fields by their parameters, which are repeated for each value.
        """
        value: dict[str, Any] = {name: values[0] for name, values in query.items() if name not in repeated}
        value |= {field: query.get(name, []) for name, field in repeated.items()}
        try:
            return answer_with(await self._call(request, method, parse(value, message)))
        except ApiError as error:
            failure = of_call(error)
        except Failure as wrong:
            failure = wrong
        raise with_fields(failure, lambda field: _as_parameter(field, repeated))

    async def _body(self, request: Request, *, optional: bool = False) -> dict[str, Any]:
        return await read_object(request, self._front.settings, optional=optional)

    async def _with_body(self, request: Request, message: Any) -> Any:
        """Return the message, with the id in the path and with what the body adds."""
        value = await self._body(request, optional=True)
        json_name = message.DESCRIPTOR.fields_by_name[self.id_field].json_name
        return self._of(request, parse(value, message, without=(self.id_field, json_name)))

    def _of(self, request: Request, message: Any) -> Any:
        """Return the message with the id in the path."""
        setattr(message, self.id_field, request.path_params["id"])
        return message


def _as_parameter(field: str, repeated: Mapping[str, str]) -> str:
    """Return the path of a field as one of a parameter."""
    for name, of_request in repeated.items():
        field = field.replace(of_request, name, 1)
    return field


def located(response: Message, kind: str, id_: str, status: HTTPStatus = HTTPStatus.ACCEPTED) -> Response:
    """Answer with a response, and with where what was begun or created is found: `/<kind>/<id>`."""
    return answer_with(response, status, {"Location": f"/{kind}/{quote(id_, safe='')}"})


def list_parameters(what: str, **filters: Parameter) -> dict[str, Parameter]:
    """Return the parameters of a list: of a user, its own filters, and those of a page."""
    return {
        "user_id": Parameter(f"Lists only {what} of this user."),
        **filters,
        "page_size": Parameter(f"Maximum number of {what}: 1 to 100, 20 unless set.", {"type": "integer"}),
        "page_token": Parameter("The next_page_token of the previous page."),
    }
