"""The paths of the console."""

from http import HTTPStatus
from typing import Final

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from services.http.console.batch_list import BatchList
from services.http.console.batch_page import BatchPage
from services.http.console.file_list import FileList
from services.http.console.job_list import JobList
from services.http.console.job_page import JobPage
from services.http.console.models import Models
from services.http.console.pages import Pages
from services.http.console.pipeline_list import PipelineList
from services.http.console.pipeline_page import PipelinePage
from services.http.console.playground import Playground
from services.http.console.schedule_list import ScheduleList
from services.http.console.schedule_page import SchedulePage
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

    job, batch, schedule = JobPage(front, pages), BatchPage(front, pages), SchedulePage(front, pages)
    pipeline, uploads, playground = PipelinePage(front, pages), FileList(front, pages), Playground(front, pages)
    batches, schedules, models = BatchList(front, pages), ScheduleList(front, pages), Models(front, pages)
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
        Resource("/console/batches", {"GET": batches.show, "POST": batches.create}),
        Resource("/console/batches/{id:id}/events", {"GET": batch.events}),
        Resource("/console/batches/{id:id}/cancel", {"POST": batch.cancel}),
        Resource("/console/batches/{id:id}", {"GET": batch.show}),
        Resource("/console/pipelines", {"GET": PipelineList(front, pages).show}),
        Resource("/console/pipelines/{id:id}/events", {"GET": pipeline.events}),
        Resource("/console/pipelines/{id:id}/cancel", {"POST": pipeline.cancel}),
        Resource("/console/pipelines/{id:id}/answer", {"POST": pipeline.answer}),
        Resource("/console/pipelines/{id:id}", {"GET": pipeline.show}),
        Resource("/console/schedules", {"GET": schedules.show, "POST": schedules.create}),
        Resource("/console/schedules/{id:id}/pause", {"POST": schedule.pause}),
        Resource("/console/schedules/{id:id}/resume", {"POST": schedule.resume}),
        Resource("/console/schedules/{id:id}/trigger", {"POST": schedule.trigger}),
        Resource("/console/schedules/{id:id}/delete", {"POST": schedule.delete}),
        Resource("/console/schedules/{id:id}", {"GET": schedule.show}),
        Resource("/console/files", {"GET": uploads.show}),
        Resource("/console/files/{id:id}/content", {"GET": uploads.content}),
        Resource("/console/files/{id:id}/delete", {"POST": uploads.delete}),
        Resource("/console/models", {"GET": models.show}),
        Resource("/console/models/{id:id}/alias", {"POST": models.set_alias}),
        Resource("/console/models/{id:id}/delete", {"POST": models.delete_version}),
        Resource("/console/playground", {"GET": playground.show, "POST": playground.submit}),
    )
    static = Resource("/console/static/{version}/{name}", {"GET": files.answer})
    found = (*SignIn(front, pages).with_sessions(*resources), static)
    return Package(PREFIX, found, pages.answer, has_sessions=True)
