"""The paths of the console."""

from http import HTTPStatus
from typing import Final

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from services.http.console.job_list import JobList
from services.http.console.job_page import JobPage
from services.http.console.models import Models
from services.http.console.pages import Pages
from services.http.console.playground import Playground
from services.http.console.sign_in import SignIn
from services.http.console.static_files import StaticFiles
from services.http.front import Front
from services.http.resources import Package, Resource

PREFIX: Final = "/console/"
"""The prefix of the console's paths."""


def package(front: Front) -> Package:
    """Return the package."""
    files = StaticFiles.load()
    pages = Pages(front.settings, files)

    async def home(_: Request) -> Response:
        return RedirectResponse("/console/", HTTPStatus.FOUND)

    job, playground = JobPage(front, pages), Playground(front, pages)
    # The paths with a suffix come first, because an id may hold `/`.
    resources = (
        Resource("/", {"GET": home}),
        Resource("/console", {"GET": home}),
        Resource("/console/", {"GET": JobList(front, pages).show}),
        Resource("/console/jobs/{id:id}/events", {"GET": job.events}),
        Resource("/console/jobs/{id:id}/output", {"GET": job.output}),
        Resource("/console/jobs/{id:id}/cancel", {"POST": job.cancel}),
        Resource("/console/jobs/{id:id}/redeliver", {"POST": job.redeliver}),
        Resource("/console/jobs/{id:id}/delete", {"GET": job.confirm, "POST": job.delete}),
        Resource("/console/jobs/{id:id}", {"GET": job.show}),
        Resource("/console/deletions/{id:id}", {"GET": job.deletion}),
        Resource("/console/models", {"GET": Models(front, pages).show}),
        Resource("/console/playground", {"GET": playground.show, "POST": playground.submit}),
    )
    static = Resource("/console/static/{version}/{name}", {"GET": files.answer})
    found = (*SignIn(front, pages).with_sessions(*resources), static)
    return Package(PREFIX, found, pages.answer, has_sessions=True)
