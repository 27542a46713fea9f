"""Submits the job of a request, or finds the one that an earlier try of the request has submitted."""

import time
from contextlib import suppress
from datetime import timedelta
from typing import Final, NamedTuple

from durable_llm.errors import (
    DeletionNotFound,
    InvalidRequest,
    JobDeleted,
    JobNotFound,
    RequestIdReused,
    UserNotAllowed,
    Violation,
)
from jobs.ids import workflow_id
from llm_pb import llm_pb2
from openai_api.asked import DEFAULT_USER, NOTE_LABEL, Asked
from openai_api.outcome import Ending
from services.http.failures import bad_request
from services.http.gateway import Calls
from services.http.openai.repeats import WITHIN, Tries, random_id

_TAKEN: Final = (RequestIdReused, JobDeleted)


class Accepted(NamedTuple):
    """A job that was submitted, and its status then."""

    job: llm_pb2.JobRequest
    status: llm_pb2.JobStatus

    @property
    def workflow_id(self) -> str:
        """The job's id."""
        return self.status.workflow_id


async def submit(calls: Calls, asked: Asked, tries: Tries, unwatched_timeout: timedelta) -> Accepted:
    """Return the job of a request. Raises ApiError, and Failure for parameters that break a rule.

    A job that is not in the background is cancelled when no front has watched it for `unwatched_timeout`.
    """
    job = llm_pb2.JobRequest()
    job.CopyFrom(asked.job)
    if not asked.background:
        job.cancel_if_unwatched.FromTimedelta(unwatched_timeout)
    if tries.key:
        return await _submit(calls, asked, job, tries.key)
    if not tries.counted:
        return await _submit(calls, asked, job, random_id())
    this, before = tries.request_ids()
    if tries.repeated and (found := await _find(calls, job, (this, before))) is not None:
        return found
    try:
        # The nonce separates it from the job of an equal request.
        return await _submit(calls, asked, job, this, nonce=random_id())
    except _TAKEN:
        # The first try may have been on its way.
        if tries.repeated and (found := await _find(calls, job, (this,))) is not None:
            return found
        return await _submit(calls, asked, job, random_id())


async def _submit(calls: Calls, asked: Asked, job: llm_pb2.JobRequest, request_id: str, nonce: str = "") -> Accepted:
    job.request_id = request_id
    job.labels[NOTE_LABEL] = str(asked.note(nonce))
    anyones = not job.user_id
    if anyones:
        job.user_id = DEFAULT_USER
    request = llm_pb2.SubmitRequest(job=job)
    try:
        response = await calls.call("Submit", request)
    except InvalidRequest as error:
        raise bad_request(*(Violation(*asked.violation(found)) for found in error.violations)) from error
    except UserNotAllowed as error:
        if not (anyones and error.metadata.get("user_id")):
            raise
        # A request without a user means the one user of the credential.
        job.user_id = error.metadata["user_id"]
        return await _submit(calls, asked, job, request_id, nonce)
    return Accepted(job, response.status)


async def _find(calls: Calls, job: llm_pb2.JobRequest, request_ids: tuple[str, ...]) -> Accepted | None:
    """Return the job of an earlier try, if it is recent and was not cancelled; None otherwise."""
    tenant = (await calls.call("GetQuota", llm_pb2.GetQuotaRequest())).tenant
    user_id = job.user_id or await _default_user(calls)
    for request_id in request_ids:
        request = llm_pb2.GetJobRequest(workflow_id=workflow_id(user_id, request_id, tenant))
        try:
            found = await calls.call("GetJob", request)
        except JobNotFound:
            continue
        age = time.time() - found.status.create_time.ToNanoseconds() / 1e9
        # A client that gave the first try up has cancelled its job.
        if age <= WITHIN.total_seconds() and not found.status.cancel_requested:
            return Accepted(found.job, found.status)
    return None


async def _default_user(calls: Calls) -> str:
    """Return the user of a request that names none."""
    try:
        await calls.call("List", llm_pb2.ListRequest(user_id=DEFAULT_USER, page_size=1))
    except UserNotAllowed as error:
        return error.metadata.get("user_id", DEFAULT_USER)
    return DEFAULT_USER


async def require_may_delete(calls: Calls) -> None:
    """Raise ApiError for a caller who may not delete jobs, and when that cannot be checked now."""
    with suppress(DeletionNotFound):
        await calls.call("GetDeletion", llm_pb2.GetDeletionRequest(deletion_id="none"))


async def find(calls: Calls, id_: str) -> tuple[llm_pb2.JobRequest, Ending]:
    """Return a job with its present status and result. Raises ApiError."""
    found = await calls.call("GetJob", llm_pb2.GetJobRequest(workflow_id=id_))
    return found.job, Ending(found.status, found.result)
