"""List: finds the jobs of a page in Temporal's visibility, and returns their status as GetStatus does."""

import asyncio
import logging
from typing import Final

from temporalio.client import Client, WorkflowExecution
from temporalio.service import RPCError

from encryption import Encryption, KeysUnavailable
from jobs import names
from jobs.search import Hash
from llm_pb import common_pb2, llm_pb2
from payload_converter import PayloadError
from runtime.auth import Caller
from services.gateway.errors import ApiError
from services.gateway.job_reader import JobReader
from services.gateway.job_record import (
    bare_status,
    base_status,
    cost_of,
    final_status,
    job_class_of,
    labels_of,
    search_attributes_of,
)
from services.gateway.page_token import PageTokens
from services.gateway.scopes import gateway_for
from services.gateway.settings import GatewaySettings
from services.gateway.visibility import DEFAULT_PAGE_SIZE, own_page, terms_of

_log = logging.getLogger(__name__)
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

    def __init__(
        self,
        client: Client,
        reader: JobReader,
        page_tokens: PageTokens,
        settings: GatewaySettings,
        encryption: Encryption | None = None,
        *,
        knows_tenants: bool,
    ) -> None:
        """`knows_tenants`: whether the namespace has the search attribute TenantId."""
        self._knows_tenants = knows_tenants
        self._client = client
        self._reader = reader
        self._page_tokens = page_tokens
        self._timeout = settings.list_timeout
        self._encryption = encryption
        self._describes = asyncio.Semaphore(_DESCRIBES)

    async def list_page(self, caller: Caller, request: llm_pb2.ListRequest) -> llm_pb2.ListResponse:
        """Return a page of the jobs of the caller's tenant.

        Raises ApiError INVALID_ARGUMENT for a page_token that Temporal refuses, UNAVAILABLE when it does not answer in
        time; RPCError; KeysUnavailable when the jobs of a filter may have hashes.
        """
        began, within = asyncio.get_running_loop().time(), self._timeout.total_seconds()
        page = self._client.list_workflows(
            visibility_query(
                caller.tenant,
                request,
                await self._hash_for(caller.tenant, request),
                names.JOB_WORKFLOW_TYPE,
                knows_tenants=self._knows_tenants,
            ),
            page_size=request.page_size or DEFAULT_PAGE_SIZE,
            next_page_token=self._page_tokens.unseal(caller.tenant, request),
        )
        own, following = await own_page(
            page, caller.tenant, request, self._page_tokens, self._timeout * _SHARE_OF_VISIBILITY
        )
        summaries = await asyncio.gather(*(self._summary(item, began + within) for item in own))
        jobs = [job for job in summaries if not request.states or job.status.state in request.states]
        return llm_pb2.ListResponse(jobs=jobs, next_page_token=following)

    async def _summary(self, execution: WorkflowExecution, until: float) -> llm_pb2.JobSummary:
        # Without a final status the job is open, or Temporal ended it before it wrote one.
        status = llm_pb2.JobStatus()
        try:
            status.CopyFrom(await final_status(execution) or await self._status(execution, until))
        except (PayloadError, KeysUnavailable) as error:
            _log.info("%s cannot be decrypted: %s", execution.id, error)
            status = bare_status(execution)
        status.ClearField("progress")
        status.ClearField("notifications")
        attributes = await search_attributes_of(execution)
        return llm_pb2.JobSummary(
            status=status,
            user_id=attributes.get(names.USER_ID.name, ""),
            request_id=attributes.get(names.REQUEST_ID.name, ""),
            model=attributes.get(names.MODEL.name, ""),
            project_id=attributes.get(names.PROJECT_ID.name, ""),
            labels=await labels_of(execution),
            job_class=job_class_of(execution),
            cost_micros=await cost_of(execution),
        )

    async def _hash_for(self, tenant: str, request: llm_pb2.ListRequest) -> Hash | None:
        """Return the hash that jobs of the filter may have, None if none can."""
        if self._encryption is None or not (request.user_id or request.project_id):
            return None
        return await self._encryption.known_search_hash(tenant)

    async def _status(self, execution: WorkflowExecution, until: float) -> llm_pb2.JobStatus:
        """Return the status that GetStatus returns, or what the list itself holds when that is not there in time."""
        try:
            async with asyncio.timeout_at(until), self._describes:
                gateway = gateway_for(execution.id)
                description = await self._reader.describe(gateway, execution.id, execution.run_id)
                return (await self._reader.status_of(description)).status
        except (ApiError, RPCError, TimeoutError) as error:
            # The job is past its retention since it was listed, or no worker runs workflows. The page must not fail.
            _log.info("%s cannot be described: %r", execution.id, error)
            return await base_status(execution)


def visibility_query(
    tenant: str, request: llm_pb2.ListRequest, hash_: Hash | None, workflow_type: str, *, knows_tenants: bool
) -> str:
    """Return the visibility query for a tenant's jobs, or pipelines: see terms_of."""
    filters = {names.USER_ID: request.user_id, names.MODEL: request.model, names.PROJECT_ID: request.project_id}
    terms = [f"WorkflowType = '{workflow_type}'"]
    terms += terms_of(tenant, filters, hash_, knows_tenants=knows_tenants)
    if request.classes:
        terms.append(f"({' OR '.join(sorted(map(_class_query, set(request.classes))))})")
    if request.states:
        terms.append(f"({' OR '.join(sorted({_STATE_QUERIES[state] for state in request.states}))})")
    return " AND ".join(terms)


def _class_query(job_class: "common_pb2.JobClass.ValueType") -> str:
    name = names.JOB_CLASS.name
    if job_class == common_pb2.JOB_CLASS_STANDARD:
        return f"{name} IS NULL"
    return f"{name} = '{common_pb2.JobClass.Name(job_class)}'"
