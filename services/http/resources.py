"""The paths of the API: the parts of a package, and the way of a request to its handler."""

import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final
from urllib.parse import quote, unquote

from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from durable_llm import ApiError
from services.http.failures import Failure, of_call

_log = logging.getLogger(__name__)

ROUTE: Final = "http_route"
"""The key of a scope with the template of the request's path."""

_CONVERTOR: Final = re.compile(r":\w+}")

Handler = Callable[[Request], Awaitable[Response]]
"""Answers a request. It raises Failure, or ApiError of a call that has failed."""
Judge = Callable[[Request], Awaitable[None]]
"""Returns once the credential of a request was accepted. Raises Failure or ApiError for one that is refused."""
Answer = Callable[[Failure], Response]
"""Returns the answer to a request that has failed."""


@dataclass(frozen=True)
class Resource:
    """A path and the handlers of its methods."""

    path: str
    """The template of the path. `{id:id}` is a job's id."""
    methods: Mapping[str, Handler]
    """The handlers by method. HEAD is GET without its body: a handler whose GET does more looks at the method."""

    @property
    def template(self) -> str:
        """The path as people write it: `{id}` for `{id:id}`."""
        return _CONVERTOR.sub("}", self.path)


@dataclass(frozen=True)
class Package:
    """A part of the API with one form of errors."""

    prefix: str
    """The prefix of the paths whose errors have the package's form, also of those that do not exist."""
    resources: Sequence[Resource]
    """The paths, in the order in which they are tried: `/jobs/{id:id}/status` before `/jobs/{id:id}`."""
    answer: Answer
    """Gives an error the package's form."""
    has_sessions: bool = False
    """Whether sessions authenticate callers, instead of the header Authorization. The package checks them itself."""


class IdConvertor(Convertor[str]):
    """An id in a path. It may hold a plain `/`. `%2F` is a `/` that separates no segments."""

    regex = ".+"

    def convert(self, value: str) -> str:
        """Return the id. One that is no UTF-8 becomes an id that does not exist."""
        return unquote(value)

    def to_string(self, value: str) -> str:
        """Return the id as it stands in a path."""
        return quote(value, safe="/:@=+~,")


register_url_convertor("id", IdConvertor())


def routes(package: Package, judge: Judge) -> list[BaseRoute]:
    """Return the routes of a package's resources."""
    judging = judge if not package.has_sessions else None
    return [Route(resource.path, _Endpoint(resource, package.answer, judging)) for resource in package.resources]


class _Endpoint:
    """Answers the requests of one path, whatever their method."""

    def __init__(self, resource: Resource, answer: Answer, judge: Judge | None) -> None:
        self._resource = resource
        self._answer = answer
        self._judge = judge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[ROUTE] = self._resource.template
        response = await self._respond(Request(scope, receive))
        await response(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
        methods, expected = self._resource.methods, request.headers.get("expect", "100-continue")
        handler = methods.get("GET" if request.method == "HEAD" else request.method)
        try:
            if handler is None:
                allow = ", ".join(sorted({*methods, *({"HEAD"} if "GET" in methods else set())}))
                words = f"{self._resource.template} takes {allow}"
                raise Failure(HTTPStatus.METHOD_NOT_ALLOWED, words, headers={"Allow": allow})
            if expected.lower() != "100-continue":
                words = f"the expectation {expected!r} is not supported; only 100-continue is"
                raise Failure(HTTPStatus.EXPECTATION_FAILED, words, headers={"Connection": "close"})
            return await self._handle(request, handler)
        except Failure as failure:
            return self._answer(failure)
        except ApiError as error:
            return self._answer(of_call(error))
        except Exception:  # noqa: BLE001  # the caller gets an answer of the API's form, whatever is wrong here
            _log.exception("a request to %s failed", self._resource.template)
            return self._answer(Failure(HTTPStatus.INTERNAL_SERVER_ERROR, "the front has failed", "INTERNAL"))

    async def _handle(self, request: Request, handler: Handler) -> Response:
        """Answer a request. What is wrong with it is shown only to callers with a valid credential, if one is needed.

        Without a credential the body is read only if none is needed. Otherwise the call for the request itself checks
        the credential, or a further call before the front refuses the request. So a valid request costs one call.
        """
        if self._judge is None:
            return await handler(request)
        if request.method not in ("GET", "HEAD") and "authorization" not in request.headers:
            await self._judge(request)
        try:
            return await handler(request)
        except Failure:
            await self._judge(request)
            raise
