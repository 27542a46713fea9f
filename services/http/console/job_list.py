"""The list of jobs."""

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from durable_llm.errors import Violation
from llm_pb import llm_pb2
from services.http.bodies import query_of
from services.http.console.caller import caller_of
from services.http.console.formats import state
from services.http.console.job_view import FINAL
from services.http.console.optional import ask
from services.http.console.pages import Pages
from services.http.console.snippets import base_of, curl_call
from services.http.failures import bad_request
from services.http.front import Front
from services.http.gateway import Calls

_STATES: Final = {value.name: state(value.number) for value in llm_pb2.JobState.DESCRIPTOR.values if value.number}
_FILTERS: Final = ("state", "model", "user_id", "project_id")
_PAGE: Final = 25


class JobList:
    """The handler."""

    def __init__(self, front: Front, pages: Pages) -> None:
        self._front = front
        self._pages = pages

    async def show(self, request: Request) -> Response:
        """Show a page of jobs. The filters are in the URL. Raises Failure, 400, for a state that does not exist."""
        query = {name: values[0] for name, values in query_of(request, (*_FILTERS, "page_token")).items()}
        filters = {name: query.get(name, "").strip() for name in _FILTERS}
        if filters["state"] and filters["state"] not in _STATES:
            raise bad_request(Violation("state", f"must be one of {', '.join(_STATES)}"))
        message = llm_pb2.ListRequest(
            user_id=filters["user_id"],
            model=filters["model"],
            project_id=filters["project_id"],
            states=[llm_pb2.JobState.Value(filters["state"])] if filters["state"] else [],
            page_size=_PAGE,
            page_token=query.get("page_token", ""),
        )
        calls = self._front.gateway.in_name_of(caller_of(request))
        listed = await calls.call("List", message)
        empty = not (listed.jobs or message.page_token or any(filters.values()))
        first_job = await _first_job(calls, request) if empty else ""
        return self._pages.render(
            request,
            "jobs.html",
            first_job=first_job,
            jobs=[_row(job) for job in listed.jobs],
            filters=filters,
            filtered=any(filters.values()),
            first=not message.page_token,
            states=_STATES,
            following=_page(filters, listed.next_page_token) if listed.next_page_token else "",
            beginning=_page(filters, ""),
        )


async def _first_job(calls: Calls, request: Request) -> str:
    """Return the command that submits a first job."""
    models = (await ask(calls, "ListModels", llm_pb2.ListModelsRequest())).answer
    model = models.models[0].name if models is not None and models.models else ""
    job = llm_pb2.JobRequest(user_id="me", request_id="first", model=model, prompt="Return the")
    return curl_call(job, base_of(request), credential=bool(caller_of(request)))


def _row(job: llm_pb2.JobSummary) -> Mapping[str, Any]:
    return {"job": job, "status": job.status, "final": job.status.state in FINAL}


def _page(filters: Mapping[str, str], token: str) -> str:
    return "?" + urlencode({name: value for name, value in {**filters, "page_token": token}.items() if value})
