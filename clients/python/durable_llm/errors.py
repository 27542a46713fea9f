"""Errors of this package, one class for each reason that the service names.

    DurableLLMError
    ├── ApiError                  a call was refused or failed
    │   ├── InvalidRequest        a field breaks a rule; see violations
    │   ├── JobNotFound           no job has this id, or it is past its retention
    │   ├── RequestIdReused       the request_id was used for another job
    │   ├── JobNotEnded           the job has not ended yet
    │   ├── LimitReached          a limit of the service is reached; see retry_delay
    │   └── Unavailable           the service did not answer
    │       ├── TemporalUnavailable   the service cannot reach Temporal
    │       └── GatewayShutdown       the gateway is about to stop
    └── JobError                  a job ended without success; see result for its partial output
        ├── InvalidJob            ├── OutOfMemory      ├── QueueTimeout
        ├── UnknownModel          ├── EngineDead       ├── RunTimeout
        ├── PromptTooLong         ├── WorkerShutdown   ├── TotalTimeout
        ├── UnsupportedParams     ├── WorkerLost       ├── Cancelled
        ├── ResultTooLarge        ├── EngineFailed     └── Terminated

A reason that this version does not know is raised as ApiError or JobError, with that `reason`.

All errors can be pickled.
"""

import contextlib
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final, NamedTuple

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from llm_pb import llm_pb2

_DETAILS_KEY: Final = "grpc-status-details-bin"


class DurableLLMError(Exception):
    """The base of all errors of this package."""

    reason = ""
    """The reason that the service gives, google.rpc.ErrorInfo.reason. Empty when it gives none."""


class Violation(NamedTuple):
    """A field that breaks a rule."""

    field: str
    """The field's path in the request, such as job.params.stop[2]."""
    description: str
    """The rule that the field breaks."""


class ApiError(DurableLLMError):
    """A call was refused or failed."""

    def __init__(
        self,
        message: str,
        code: grpc.StatusCode,
        reason: str = "",
        retry_delay: timedelta | None = None,
        violations: tuple[Violation, ...] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        """The gRPC status code."""
        self.reason = reason or self.reason
        self.retry_delay = retry_delay
        """Time after which a repeated call may succeed. None when the service does not say."""
        self.violations = violations
        """All fields that break a rule."""

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is rebuilt from its args by default, which are the message alone.
        return type(self), (*self.args, self.code), vars(self)


class InvalidRequest(ApiError):
    """A field breaks a rule of llm.proto."""

    reason = "INVALID_REQUEST"


class JobNotFound(ApiError):
    """No job has this id, or it is past its retention."""

    reason = "JOB_NOT_FOUND"


class RequestIdReused(ApiError):
    """The user_id and request_id belong to another job."""

    reason = "REQUEST_ID_REUSED"


class JobNotEnded(ApiError):
    """The job has not ended yet."""

    reason = "JOB_NOT_ENDED"


class LimitReached(ApiError):
    """A limit of the service is reached."""

    reason = "LIMIT_REACHED"


class Unavailable(ApiError):
    """The service did not answer. It may have accepted a Submit nevertheless: repeat it with the same request_id."""


class TemporalUnavailable(Unavailable):
    """The service cannot reach Temporal."""

    reason = "TEMPORAL_UNAVAILABLE"


class GatewayShutdown(Unavailable):
    """The gateway is about to stop."""

    reason = "GATEWAY_SHUTDOWN"


class JobError(DurableLLMError):
    """A job ended without success."""

    def __init__(self, status: llm_pb2.JobStatus, result: llm_pb2.JobResult) -> None:
        super().__init__(status.error.message or llm_pb2.JobState.Name(status.state))
        self.status = status
        """The job's final status."""
        self.result = result
        """What the job produced until its end. The output may be empty."""
        self.reason = _reason(status.error) or self.reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.status, self.result), vars(self)


class InvalidJob(JobError):
    """The job breaks a rule of llm.proto."""

    reason = "INVALID_JOB"


class UnknownModel(JobError):
    """The worker that took the job does not serve its model."""

    reason = "UNKNOWN_MODEL"


class PromptTooLong(JobError):
    """The prompt leaves no room for a token in the model's context."""

    reason = "PROMPT_TOO_LONG"


class UnsupportedParams(JobError):
    """The engine does not support the sampling parameters."""

    reason = "UNSUPPORTED_PARAMS"


class ResultTooLarge(JobError):
    """The output exceeds the maximum size of a result."""

    reason = "RESULT_TOO_LARGE"


class EngineFailed(JobError):
    """The engine failed on this job in every attempt."""

    reason = "ENGINE_FAILED"


class OutOfMemory(JobError):
    """The device ran out of memory for this job in every attempt."""

    reason = "OUT_OF_MEMORY"


class EngineDead(JobError):
    """The engine died or hung in every attempt."""

    reason = "ENGINE_DEAD"


class WorkerShutdown(JobError):
    """Every worker that ran the job was stopped."""

    reason = "WORKER_SHUTDOWN"


class WorkerLost(JobError):
    """The workers that ran the job stopped sending heartbeats."""

    reason = "WORKER_LOST"


class QueueTimeout(JobError):
    """No worker took the job within its queue timeout."""

    reason = "QUEUE_TIMEOUT"


class RunTimeout(JobError):
    """Every attempt exceeded the job's run timeout."""

    reason = "RUN_TIMEOUT"


class TotalTimeout(JobError):
    """The job exceeded its total timeout."""

    reason = "TOTAL_TIMEOUT"


class Cancelled(JobError):
    """A client or an operator cancelled the job."""

    reason = "CANCELLED"


class Terminated(JobError):
    """An operator terminated the job's workflow."""

    reason = "TERMINATED"


API_ERRORS: Final[Mapping[str, type[ApiError]]] = {
    kind.reason: kind for kind in (*ApiError.__subclasses__(), *Unavailable.__subclasses__()) if kind.reason
}
"""The class for each reason for which a call fails."""
JOB_ERRORS: Final[Mapping[str, type[JobError]]] = {kind.reason: kind for kind in JobError.__subclasses__()}
"""The class for each reason for which a job ends without success."""


def from_call(error: grpc.aio.AioRpcError) -> ApiError:
    """Return the error of a gRPC call that failed."""
    code, message = error.code(), error.details() or error.code().name
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            with contextlib.suppress(DecodeError):
                status = status_pb2.Status.FromString(value)
    retry, request = error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(retry)
        detail.Unpack(request)
    reason = _reason(status)
    otherwise = Unavailable if code == grpc.StatusCode.UNAVAILABLE else ApiError
    return API_ERRORS.get(reason, otherwise)(
        message,
        code,
        reason,
        retry.retry_delay.ToTimedelta() if retry.HasField("retry_delay") else None,
        tuple(Violation(item.field, item.description) for item in request.field_violations),
    )


def from_outcome(status: llm_pb2.JobStatus, result: llm_pb2.JobResult) -> JobError | None:
    """Return the error of a job that ended. Return None for a job that succeeded."""
    if status.state == llm_pb2.JOB_STATE_SUCCEEDED:
        return None
    return JOB_ERRORS.get(_reason(status.error), JobError)(status, result)


def _reason(status: status_pb2.Status) -> str:
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            reason: str = info.reason
            return reason
    return ""
