"""Forms on lists that create what the list shows."""

import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar, NamedTuple

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from durable_llm import ApiError
from services.http.console.caller import caller_of
from services.http.console.formats import as_path
from services.http.console.forms import read_form
from services.http.console.pages import Pages
from services.http.failures import Failure, of_call
from services.http.front import Front
from services.http.gateway import Calls


class Refused(NamedTuple):
    """A form that was refused."""

    form: Mapping[str, str]
    message: str
    status: HTTPStatus


class CreatingList(ABC):
    """A list with a form. The form's id is its request_id, so one that is sent twice creates one thing."""

    place: ClassVar[str]
    """The path of the list, under which the pages of its things are, too."""
    fields: ClassVar[tuple[str, ...]]
    """The fields of the form, in addition to user_id and request_id."""

    def __init__(self, front: Front, pages: Pages) -> None:
        self._front = front
        self._pages = pages

    async def show(self, request: Request) -> Response:
        """Show a page of the list."""
        return await self._show(request)

    async def create(self, request: Request) -> Response:
        """Create what the form says, and lead to its page. What is refused stands on the list, with the filled form."""
        form = await read_form(request, self._front.settings, *self.fields, "user_id", "request_id")
        form = {name: value.strip() for name, value in form.items()}
        try:
            created = await self._create(self._calls(request), form)
        except Failure as wrong:
            failure = wrong
        except ApiError as error:
            failure = of_call(error)
        else:
            return RedirectResponse(f"{self.place}/{as_path(created)}", HTTPStatus.SEE_OTHER)
        page = await self._show(request, Refused(form, failure.message, failure.status))
        page.headers.update(failure.headers)
        return page

    @abstractmethod
    async def _create(self, calls: Calls, form: Mapping[str, str]) -> str:
        """Create what a form says; return its id. Raises Failure, ApiError."""

    @abstractmethod
    async def _show(self, request: Request, refused: Refused | None = None) -> Response:
        """Show the page, with the form that was refused and why."""

    def _render(self, request: Request, template: str, refused: Refused | None, **values: Any) -> Response:
        """Return the page of a template, whose form is the refused one or a new one."""
        form = (
            {"user_id": "console", "request_id": f"console-{secrets.token_hex(6)}"} if refused is None else refused.form
        )
        return self._pages.render(
            request,
            template,
            HTTPStatus.OK if refused is None else refused.status,
            form={name: form.get(name, "") for name in (*self.fields, "user_id", "request_id")},
            refused="" if refused is None else refused.message,
            **values,
        )

    def _calls(self, request: Request) -> Calls:
        return self._front.gateway.in_name_of(caller_of(request))
