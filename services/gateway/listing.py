"""List: finds the jobs of a page in Temporal's visibility, and returns their status as GetStatus does."""

import asyncio
import logging
from typing import Final

from temporalio.client import Client, WorkflowExecution
from temporalio.service import RPCError, RPCStatusCode

from jobs import names
from llm_pb import llm_pb2
from services.gateway.errors import ApiError, invalid, temporal_unavailable
from services.gateway.job_reader import JobReader
from services.gateway.job_record import base_status, final_status
from services.gateway.page_token import REFUSED, PageTokens
from services.gateway.settings import GatewaySettings

_log = logging.getLogger(__name__)
_DEFAULT_PAGE_SIZE: Final = 20
_DESCRIBES: Final = 32
"""Maximum number of jobs that all List calls describe concurrently."""
_SHARE_OF_VISIBILITY: Final = 0.5
"""Fraction of List's time for visibility. The rest is for describing jobs of the page, mostly the open ones."""

_STATE_QUERIES: Final = {
    llm_pb2.JOB_STATE_QUEUED: "ExecutionStatus = 'Running'",
    llm_pb2.JOB_STATE_RUNNING: "ExecutionStatus = 'Running'",
    llm_pb2.JOB_STATE_NOTIFYING: "ExecutionStatus = 'Running'",
    llm_pb2.JOB_STATE_SUCCEEDED: "ExecutionStatus = 'Completed'",
    # A job without JobState could not read its input.
    llm_pb2.JOB_STATE_FAILED: (
        "(ExecutionStatus = 'Failed' AND (JobState IS NULL OR JobState != 'JOB_STATE_TIMED_OUT'))"
    ),
    llm_pb2.JOB_STATE_CANCELLED: "ExecutionStatus IN ('Canceled', 'Terminated')",
    llm_pb2.JOB_STATE_TIMED_OUT: "(ExecutionStatus = 'TimedOut' OR JobState = 'JOB_STATE_TIMED_OUT')",
}


class JobListing:
    """Lists jobs."""

    def __init__(self, client: Client, reader: JobReader, page_tokens: PageTokens, settings: GatewaySettings) -> None:
        self._client = client
        self._reader = reader
        self._page_tokens = page_tokens
        self._timeout = settings.list_timeout
        self._describes = asyncio.Semaphore(_DESCRIBES)

    async def list_page(self, request: llm_pb2.ListRequest) -> llm_pb2.ListResponse:
        """Return a page of jobs.

        Raises ApiError INVALID_ARGUMENT for a page_token that Temporal refuses, UNAVAILABLE when it does not answer in
        time; RPCError.
        """
        began, within = asyncio.get_running_loop().time(), self._timeout.total_seconds()
        token = self._page_tokens.unseal(request)
        page = self._client.list_workflows(
            _query(request), page_size=request.page_size or _DEFAULT_PAGE_SIZE, next_page_token=token
        )
        try:
            async with asyncio.timeout_at(began + within * _SHARE_OF_VISIBILITY):
                await page.fetch_next_page()
        except TimeoutError as error:
            raise temporal_unavailable("Temporal did not list the jobs in time; call again") from error
        except RPCError as error:
            # The token may be of an older Temporal: its SQL store answers UNKNOWN to a token that it cannot read.
            if token is not None and error.status in (RPCStatusCode.INVALID_ARGUMENT, RPCStatusCode.UNKNOWN):
                raise invalid([REFUSED]) from error
            raise
        summaries = await asyncio.gather(*(self._summary(item, began + within) for item in page.current_page or ()))
        jobs = [job for job in summaries if not request.states or job.status.state in request.states]
        return llm_pb2.ListResponse(jobs=jobs, next_page_token=self._page_tokens.seal(request, page.next_page_token))

    async def _summary(self, execution: WorkflowExecution, until: float) -> llm_pb2.JobSummary:
        # Without a final status the job is open, or Temporal ended it before it wrote one.
        status = llm_pb2.JobStatus()
        status.CopyFrom(await final_status(execution) or await self._status(execution, until))
        status.ClearField("progress")
        status.ClearField("notifications")
        attributes = execution.typed_search_attributes
        return llm_pb2.JobSummary(
            status=status,
            user_id=attributes.get(names.USER_ID) or "",
            request_id=attributes.get(names.REQUEST_ID) or "",
            model=attributes.get(names.MODEL) or "",
            project_id=attributes.get(names.PROJECT_ID) or "",
        )

    async def _status(self, execution: WorkflowExecution, until: float) -> llm_pb2.JobStatus:
        """Return the status that GetStatus returns, or what the list itself holds when that is not there in time."""
        try:
            async with asyncio.timeout_at(until), self._describes:
                return (
                    await self._reader.status_of(await self._reader.describe(execution.id, execution.run_id))
                ).status
        except (ApiError, RPCError, TimeoutError) as error:
            # The job is past its retention since it was listed, or no worker runs workflows. The page must not fail.
            _log.info("%s cannot be described: %r", execution.id, error)
            return await base_status(execution)


def _query(request: llm_pb2.ListRequest) -> str:
    """Return the visibility query. Every value has passed a rule that forbids quotes."""
    terms = [f"WorkflowType = '{names.JOB_WORKFLOW_TYPE}'"]
    for key, value in (
        (names.USER_ID, request.user_id),
        (names.MODEL, request.model),
        (names.PROJECT_ID, request.project_id),
    ):
        if value:
            terms.append(f"{key.name} = '{value}'")
    if request.states:
        terms.append(f"({' OR '.join(sorted({_STATE_QUERIES[state] for state in request.states}))})")
    return " AND ".join(terms)
