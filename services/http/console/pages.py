"""Renders the pages of the console. Whatever a job, a user or a model wrote is escaped."""

from http import HTTPStatus
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from llm_pb import file_pb2, llm_pb2
from services.http.console import formats
from services.http.console.caller import context_of
from services.http.console.static_files import StaticFiles
from services.http.failures import Failure
from services.http.settings import HttpSettings

HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    # Not no-referrer, with which browsers hide the origin of a form.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
}
"""The headers of every page."""


class Pages:
    """Renders templates."""

    def __init__(self, settings: HttpSettings, files: StaticFiles) -> None:
        self._environment = Environment(
            loader=PackageLoader("services.http.console"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters |= formats.FILTERS
        self._environment.globals |= {
            "static": files.path,
            "settings": settings,
            "JobState": llm_pb2.JobState,
            "DeletionState": llm_pb2.DeletionState,
            "FileState": file_pb2.FileState,
        }

    def render(
        self, request: Request | None, template: str, status: HTTPStatus = HTTPStatus.OK, /, **values: Any
    ) -> Response:
        """Return the page that a template makes of some values. An error page may have no request."""
        html = self._environment.get_template(template).render({**context_of(request), **values})
        return HTMLResponse(html, status, HEADERS)

    def answer(self, failure: Failure, request: Request | None = None) -> Response:
        """Return the page of an error. With the request it says who has signed in."""
        page = self.render(request, "error.html", failure.status, failure=failure)
        page.headers.update(failure.headers)
        return page
