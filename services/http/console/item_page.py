"""The page of one thing, and what people do to it there."""

from abc import ABC, abstractmethod
from http import HTTPStatus
from typing import ClassVar

from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from durable_llm import ApiError
from services.http.console.caller import caller_of
from services.http.console.formats import as_path
from services.http.console.pages import Pages
from services.http.failures import of_call
from services.http.front import Front
from services.http.gateway import Calls


class ItemPage(ABC):
    """The handlers of a page, `show` among them."""

    place: ClassVar[str]
    """The path under which the pages of all such things are: `/console/jobs`."""

    def __init__(self, front: Front, pages: Pages) -> None:
        self._front = front
        self._pages = pages

    async def show(self, request: Request) -> Response:
        """Show the page."""
        return await self._show(request)

    @abstractmethod
    async def _show(self, request: Request, refused: str = "", status: HTTPStatus = HTTPStatus.OK) -> Response:
        """Show the page, with the message of what was `refused`."""

    def _calls(self, request: Request) -> Calls:
        return self._front.gateway.in_name_of(caller_of(request))

    async def _do(self, request: Request, method: str, message: Message, *, gone: bool = False) -> Response:
        """Make a call and return to the page, or to the list if the thing is `gone` then.

        What the gateway refuses stands in the page.
        """
        try:
            await self._calls(request).call(method, message)
        except ApiError as error:
            failure = of_call(error)
            # A page that cannot be shown has its own error.
            page = await self._show(request, failure.message, failure.status)
            page.headers.update(failure.headers)
            return page
        path = self.place if gone else f"{self.place}/{as_path(id_of(request))}"
        return RedirectResponse(path, HTTPStatus.SEE_OTHER)


def id_of(request: Request) -> str:
    """Return the id in the path."""
    value: str = request.path_params["id"]
    return value
