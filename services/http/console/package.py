"""The paths of the console."""

from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from services.http.console.job_list import JobList
from services.http.console.pages import Pages
from services.http.console.sign_in import SignIn
from services.http.console.static_files import StaticFiles
from services.http.front import Front
from services.http.resources import Package, Resource


def package(front: Front) -> Package:
    """Return the package."""
    files = StaticFiles.load()
    pages = Pages(front.settings, files)

    async def home(_: Request) -> Response:
        return RedirectResponse("/console/", HTTPStatus.FOUND)

    resources = (
        Resource("/", {"GET": home}),
        Resource("/console", {"GET": home}),
        Resource("/console/", {"GET": JobList(front, pages).show}),
    )
    static = Resource("/console/static/{version}/{name}", {"GET": files.answer})
    return Package("/console/", (*SignIn(front, pages).with_sessions(*resources), static), pages.answer)
