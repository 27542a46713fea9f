"""The list of jobs."""

from collections.abc import Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from durable_llm.errors import Violation
from llm_pb import llm_pb2
from services.http.console.caller import caller_of
from services.http.console.formats import state
from services.http.console.job_view import FINAL
from services.http.console.listing import PAGE_SIZE, ListQuery
from services.http.console.optional import ask
from services.http.console.pages import Pages
from services.http.console.snippets import base_of, curl_call
from services.http.failures import bad_request
from services.http.front import Front
from services.http.gateway import Calls

_STATES: Final = {value.name: state(value.number) for value in llm_pb2.JobState.DESCRIPTOR.values if value.number}
_FILTERS: Final = ("state", "model", "user_id", "project_id")


class JobList:
    """The handler."""

    def __init__(self, front: Front, pages: Pages) -> None:
        self._front = front
        self._pages = pages

    async def show(self, request: Request) -> Response:
        """Show a page of jobs. The filters are in the URL. Raises Failure, 400, for a state that does not exist."""
        query = ListQuery.of(request, _FILTERS)
        filters = query.filters
        if filters["state"] and filters["state"] not in _STATES:
            raise bad_request(Violation("state", f"must be one of {', '.join(_STATES)}"))
        message = llm_pb2.ListRequest(
            user_id=filters["user_id"],
            model=filters["model"],
            project_id=filters["project_id"],
            states=[llm_pb2.JobState.Value(filters["state"])] if filters["state"] else [],
            page_size=PAGE_SIZE,
            page_token=query.page_token,
        )
        calls = self._front.gateway.in_name_of(caller_of(request))
        listed = await calls.call("List", message)
        first_job = await _first_job(calls, request) if query.plain and not listed.jobs else ""
        return self._pages.render(
            request,
            "jobs.html",
            first_job=first_job,
            jobs=[_row(job) for job in listed.jobs],
            priced=any(job.HasField("cost_micros") for job in listed.jobs),
            states=_STATES,
            **query.shown(listed.next_page_token),
        )


async def _first_job(calls: Calls, request: Request) -> str:
    """Return the command that submits a first job."""
    models = (await ask(calls, "ListModels", llm_pb2.ListModelsRequest())).answer
    model = models.models[0].name if models is not None and models.models else ""
    job = llm_pb2.JobRequest(user_id="me", request_id="first", model=model, prompt="Return the")
    return curl_call(job, base_of(request), credential=bool(caller_of(request)))


def _row(job: llm_pb2.JobSummary) -> Mapping[str, Any]:
    return {"job": job, "status": job.status, "final": job.status.state in FINAL}
