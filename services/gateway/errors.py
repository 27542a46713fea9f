"""The errors of the API: one exception, and a function for each case that creates it."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from temporalio.service import RPCError, RPCStatusCode

from jobs import names
from jobs.errors import error_info, make_status
from jobs.field_rules import Violation
from payload_converter import PayloadError
from runtime.auth import Code, Refusal

_RETRY: Final = timedelta(seconds=1)
_MAX_DETAILS_BYTES: Final = 4096
"""Maximum size of the details. Many clients accept 8 KiB of trailers, in which base64 adds a third."""
_MAX_FIELDS_IN_MESSAGE: Final = 8


class ApiError(Exception):
    """Ends the call with this status."""

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.status = status


class JobNotFound(ApiError):
    """NOT_FOUND: there is no such job."""


class BatchNotFound(ApiError):
    """NOT_FOUND: there is no such batch."""


class FileNotFound(ApiError):
    """NOT_FOUND: there is no such file."""


class JobDeleted(JobNotFound):
    """NOT_FOUND, in the same bytes: the job was deleted, and its id is kept."""


class PipelineNotFound(ApiError):
    """NOT_FOUND: there is no such pipeline."""


class ScheduleNotFound(ApiError):
    """NOT_FOUND: there is no such schedule."""


def invalid(violations: Sequence[Violation]) -> ApiError:
    """INVALID_ARGUMENT that names every bad field. Of those that do not fit into the trailers it gives the number."""
    details = error_details_pb2.BadRequest()
    for index, violation in enumerate(violations):
        if details.ByteSize() > _MAX_DETAILS_BYTES:
            details.field_violations.add(description=f"and {len(violations) - index} more")
            break
        details.field_violations.add(field=violation.field, description=violation.description)
    first = violations[0]
    message = f"{first.field} {first.description}".strip()
    if others := [violation.field for violation in violations[1:]]:
        # Not every client shows details.
        named = ", ".join(others[:_MAX_FIELDS_IN_MESSAGE])
        message += f"; also wrong: {named}{' and more' if len(others) > _MAX_FIELDS_IN_MESSAGE else ''}"
    return ApiError(make_status(code_pb2.INVALID_ARGUMENT, message, details, error_info("INVALID_REQUEST")))


def not_found(workflow_id: str, kind: type[JobNotFound] = JobNotFound) -> JobNotFound:
    """NOT_FOUND for a job."""
    message = f"there is no job {workflow_id}, or it is past its retention"
    return kind(make_status(code_pb2.NOT_FOUND, message, error_info("JOB_NOT_FOUND")))


def deletion_not_found(deletion_id: str) -> ApiError:
    """NOT_FOUND for a deletion."""
    message = f"there is no deletion {deletion_id}, or it is past its retention"
    return ApiError(make_status(code_pb2.NOT_FOUND, message, error_info("DELETION_NOT_FOUND")))


def schedule_not_found(schedule_id: str) -> ScheduleNotFound:
    """NOT_FOUND for a schedule."""
    message = f"there is no schedule {schedule_id}"
    return ScheduleNotFound(make_status(code_pb2.NOT_FOUND, message, error_info("SCHEDULE_NOT_FOUND")))


def schedule_key_reused(user_id: str, request_id: str) -> ApiError:
    """ALREADY_EXISTS: the idempotency key belongs to another schedule."""
    message = (
        f"request_id {request_id!r} of user {user_id!r} was used for a different schedule; choose another request_id,"
        " or call UpdateSchedule"
    )
    return ApiError(make_status(code_pb2.ALREADY_EXISTS, message, error_info("REQUEST_ID_REUSED")))


def batch_not_found(batch_id: str) -> BatchNotFound:
    """NOT_FOUND for a batch."""
    message = f"there is no batch {batch_id}, or it is past its retention"
    return BatchNotFound(make_status(code_pb2.NOT_FOUND, message, error_info("BATCH_NOT_FOUND")))


def batch_key_reused(user_id: str, request_id: str) -> ApiError:
    """ALREADY_EXISTS: the idempotency key belongs to another batch."""
    message = f"request_id {request_id!r} of user {user_id!r} was used for a different batch; choose another request_id"
    return ApiError(make_status(code_pb2.ALREADY_EXISTS, message, error_info("REQUEST_ID_REUSED")))


def pipeline_not_found(pipeline_id: str) -> PipelineNotFound:
    """NOT_FOUND for a pipeline."""
    message = f"there is no pipeline {pipeline_id}, or it is past its retention"
    return PipelineNotFound(make_status(code_pb2.NOT_FOUND, message, error_info("PIPELINE_NOT_FOUND")))


def pipeline_key_reused(user_id: str, request_id: str) -> ApiError:
    """ALREADY_EXISTS: the idempotency key belongs to another pipeline."""
    message = f"request_id {request_id!r} of user {user_id!r} was used for another pipeline; choose another request_id"
    return ApiError(make_status(code_pb2.ALREADY_EXISTS, message, error_info("REQUEST_ID_REUSED")))


def work_deleted(kind: str, user_id: str, request_id: str) -> ApiError:
    """ALREADY_EXISTS: what is under the idempotency key, "job", "batch" or "pipeline", was deleted."""
    message = (
        f"the {kind} with request_id {request_id!r} of user {user_id!r} was deleted and does not run again;"
        f" choose another request_id for a new {kind}"
    )
    return ApiError(make_status(code_pb2.ALREADY_EXISTS, message, error_info("JOB_DELETED")))


def answer_refused(reason: str, message: str) -> ApiError:
    """The error for an answer that a pipeline does not take. `reason` is one of jobs.names."""
    codes = {names.STEP_NOT_FOUND: code_pb2.NOT_FOUND, names.STEP_ANSWERED: code_pb2.ALREADY_EXISTS}
    return ApiError(make_status(codes.get(reason, code_pb2.FAILED_PRECONDITION), message, error_info(reason)))


def trained_model_refused(reason: str, message: str) -> ApiError:
    """The error for a change of a trained model that cannot be made. `reason` is one of jobs.names."""
    code = code_pb2.NOT_FOUND if reason == names.MODEL_NOT_FOUND else code_pb2.FAILED_PRECONDITION
    return ApiError(make_status(code, message, error_info(reason)))


def job_not_ended(workflow_id: str) -> ApiError:
    """FAILED_PRECONDITION: the job has no outcome yet, or delivers it for the first time."""
    message = f"job {workflow_id} has not ended; call again when it has"
    return ApiError(make_status(code_pb2.FAILED_PRECONDITION, message, error_info("JOB_NOT_ENDED")))


def file_not_found(file_id: str) -> FileNotFound:
    """NOT_FOUND for a file."""
    message = f"there is no file {file_id}, or it has expired"
    return FileNotFound(make_status(code_pb2.NOT_FOUND, message, error_info("FILE_NOT_FOUND")))


def file_key_reused(user_id: str, request_id: str) -> ApiError:
    """ALREADY_EXISTS: the idempotency key belongs to another file."""
    message = f"request_id {request_id!r} of user {user_id!r} was used for a different file; choose another request_id"
    return ApiError(make_status(code_pb2.ALREADY_EXISTS, message, error_info("REQUEST_ID_REUSED")))


def wrong_offset(offset: int, committed_bytes: int) -> ApiError:
    """OUT_OF_RANGE: an upload does not go on where the file ends."""
    message = f"the file has {committed_bytes} bytes: go on at that offset, not at {offset}"
    info = error_info("WRONG_OFFSET", {"committed_bytes": str(committed_bytes)})
    return ApiError(make_status(code_pb2.OUT_OF_RANGE, message, info))


def upload_overtaken(committed_bytes: int) -> ApiError:
    """ABORTED: another upload of the file has written to it meanwhile."""
    message = f"another upload has written to the file, which has {committed_bytes} bytes now"
    info = error_info("UPLOAD_OVERTAKEN", {"committed_bytes": str(committed_bytes)})
    return ApiError(make_status(code_pb2.ABORTED, message, info))


def file_not_ready(file_id: str) -> ApiError:
    """FAILED_PRECONDITION: the upload of the file has not ended."""
    message = f"the upload of {file_id} has not ended; read it when it is ready"
    return ApiError(make_status(code_pb2.FAILED_PRECONDITION, message, error_info("FILE_NOT_READY")))


def file_of_job(file_id: str) -> ApiError:
    """FAILED_PRECONDITION: the file belongs to a job."""
    message = f"{file_id} is the output of a job; delete the job"
    return ApiError(make_status(code_pb2.FAILED_PRECONDITION, message, error_info("FILE_OF_JOB")))


def files_disabled() -> ApiError:
    """FAILED_PRECONDITION: the operator has set no store."""
    message = "there are no files here: the operator has not set STORE_URL"
    return ApiError(make_status(code_pb2.FAILED_PRECONDITION, message, error_info("FILES_DISABLED")))


def store_unavailable(message: str = "the store of files is away; call again") -> ApiError:
    """UNAVAILABLE: the store does not answer, or what it should hold is still being removed."""
    return ApiError(make_status(code_pb2.UNAVAILABLE, message, error_info("STORE_UNAVAILABLE"), _retry_info()))


def content_unreadable(message: str) -> ApiError:
    """DATA_LOSS: the content of a file is gone, or can never be decrypted again."""
    return ApiError(make_status(code_pb2.DATA_LOSS, message, error_info("CONTENT_UNREADABLE")))


def key_reused(user_id: str, request_id: str) -> ApiError:
    """ALREADY_EXISTS: the idempotency key belongs to another job."""
    message = f"request_id {request_id!r} of user {user_id!r} was used for a different job; choose another request_id"
    return ApiError(make_status(code_pb2.ALREADY_EXISTS, message, error_info("REQUEST_ID_REUSED")))


def exhausted(message: str, wait: timedelta = _RETRY, about: Mapping[str, str] | None = None) -> ApiError:
    """RESOURCE_EXHAUSTED with the time after which a retry may succeed. `about` is the metadata of its ErrorInfo."""
    info = error_info("LIMIT_REACHED", about)
    return ApiError(make_status(code_pb2.RESOURCE_EXHAUSTED, message, info, _retry_info(wait)))


def quota_exceeded(tenant: str, quota: str, description: str, wait: timedelta | None) -> ApiError:
    """RESOURCE_EXHAUSTED: a quota of a tenant is reached. `quota` is the name of its setting.

    `wait` is None for what never fits into the quota, however long its caller waits.
    """
    failure = error_details_pb2.QuotaFailure()
    failure.violations.add(subject=f"tenant:{tenant}", description=description)
    info = error_info("QUOTA_EXCEEDED", {"quota": quota})
    details = [failure, info] if wait is None else [failure, info, _retry_info(wait)]
    return ApiError(make_status(code_pb2.RESOURCE_EXHAUSTED, description, *details))


class PipelineResumed(ApiError):
    """UNAVAILABLE: the pipeline was submitted again. See pipeline_resumed()."""


def pipeline_resumed() -> ApiError:
    """UNAVAILABLE: the pipeline was submitted again while its earlier run was followed. A new call follows it."""
    message = "the pipeline was submitted again, and goes on; call again"
    return PipelineResumed(make_status(code_pb2.UNAVAILABLE, message, error_info("PIPELINE_RESUMED"), _retry_info()))


def shutting_down() -> ApiError:
    """UNAVAILABLE: this gateway is about to stop. The client can continue with another one, or with this one later."""
    message = "the gateway is shutting down; call again"
    return ApiError(make_status(code_pb2.UNAVAILABLE, message, error_info("GATEWAY_SHUTDOWN"), _retry_info()))


def audit_unavailable() -> ApiError:
    """UNAVAILABLE: the call cannot be recorded, so it must not be done."""
    message = "the audit log takes no record now, and nothing is done without one; call again"
    return ApiError(make_status(code_pb2.UNAVAILABLE, message, error_info("AUDIT_UNAVAILABLE"), _retry_info()))


def feed_unavailable() -> ApiError:
    """UNAVAILABLE: the gateway is not connected to the broker of the live feed."""
    message = "the gateway gets no reports of workers: it is not connected to NATS, or may not read them; call again"
    return ApiError(make_status(code_pb2.UNAVAILABLE, message, error_info("FEED_UNAVAILABLE"), _retry_info()))


def refused(refusal: Refusal) -> ApiError:
    """UNAUTHENTICATED or PERMISSION_DENIED for who calls; UNAVAILABLE when that is not known now."""
    details: list[Message] = [error_info(refusal.reason, refusal.about)]
    if refusal.code is Code.UNAVAILABLE:
        details.append(_retry_info())
    return ApiError(make_status(code_pb2.Code.Value(refusal.code.name), str(refusal), *details))


def from_temporal(error: RPCError) -> ApiError:
    """Return the error that a failed call to Temporal becomes for the client. It is never the client's fault."""
    if error.status == RPCStatusCode.RESOURCE_EXHAUSTED:
        return exhausted("Temporal is at its rate limit; call again")
    # The SDK reports its own time limit as CANCELLED.
    if error.status in (RPCStatusCode.CANCELLED, RPCStatusCode.DEADLINE_EXCEEDED):
        why = "has not answered in time"
    elif error.status == RPCStatusCode.UNAVAILABLE:
        why = "cannot be reached"
    else:
        why = f"has failed ({error.status.name})"
    return temporal_unavailable(f"Temporal {why}; call again")


def temporal_unavailable(message: str) -> ApiError:
    """UNAVAILABLE: Temporal does not answer."""
    return ApiError(make_status(code_pb2.UNAVAILABLE, message, error_info("TEMPORAL_UNAVAILABLE"), _retry_info()))


def unreadable(error: PayloadError) -> ApiError:
    """DATA_LOSS: the content of the job can never be decrypted again."""
    return ApiError(make_status(code_pb2.DATA_LOSS, error.message, error_info("CONTENT_UNREADABLE")))


def keys_unavailable() -> ApiError:
    """UNAVAILABLE: a key of encrypted content is unavailable now."""
    message = "the keys of encrypted content are unavailable; call again"
    return ApiError(make_status(code_pb2.UNAVAILABLE, message, error_info("KEYS_UNAVAILABLE"), _retry_info()))


def _retry_info(wait: timedelta = _RETRY) -> error_details_pb2.RetryInfo:
    delay = Duration()
    delay.FromTimedelta(wait)
    return error_details_pb2.RetryInfo(retry_delay=delay)
