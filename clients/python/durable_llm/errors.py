"""What can go wrong, one class for each reason that the service names.

    DurableLLMError
    ├── ApiError                  a call was refused or failed
    │   ├── InvalidRequest        a field breaks a rule; see violations
    │   ├── JobNotFound           no such job, or it is past its retention
    │   ├── RequestIdReused       the request_id was used for another job
    │   ├── JobDeleted            the job was deleted and does not run again
    │   ├── DeletionNotFound      no such deletion, or it is past its retention
    │   ├── JobNotEnded           the job has not ended yet
    │   ├── LimitReached          a limit of the service is reached; see retry_delay
    │   ├── CredentialMissing     the call had no credential
    │   ├── CredentialInvalid     the credential does not count, or not any more
    │   ├── CredentialExpired     the credential was good; call with a new one
    │   ├── MissingScope          the credential is not for this call
    │   ├── UserNotAllowed        the credential is for the jobs of another user
    │   └── Unavailable           the service did not answer
    │       ├── TemporalUnavailable        the service cannot reach Temporal
    │       ├── AuthenticationUnavailable  the service cannot verify the credential now
    │       ├── AuditUnavailable           the service cannot record the call now
    │       └── GatewayShutdown            the gateway that was asked stops
    └── JobError                  a job ended without success; see result for its partial output
        ├── InvalidJob            ├── OutOfMemory      ├── QueueTimeout
        ├── UnknownModel          ├── EngineDead       ├── RunTimeout
        ├── PromptTooLong         ├── WorkerShutdown   ├── TotalTimeout
        ├── UnsupportedParams     ├── WorkerLost       ├── Cancelled
        ├── ResultTooLarge        ├── EngineFailed     └── Terminated

A class that a later service names and this package does not know is the base class, with its `reason`.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Final, NamedTuple

import grpc
from google.rpc import error_details_pb2, status_pb2

from llm_pb import llm_pb2


class DurableLLMError(Exception):
    """The base of all errors of this package."""

    reason = ""
    """The reason that the service gives: google.rpc.ErrorInfo.reason. Empty when it gives none."""


class Violation(NamedTuple):
    """A field that breaks a rule."""

    field: str
    """Its path in the request: job.params.stop[2]."""
    description: str
    """The rule, and how to keep it."""


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
        """The gRPC status."""
        self.reason = reason or self.reason
        self.retry_delay = retry_delay
        """How long to wait before the call is worth repeating. None when the service does not say."""
        self.violations = violations
        """Every field that breaks a rule."""


class InvalidRequest(ApiError):
    """A field breaks a rule of llm.proto."""

    reason = "INVALID_REQUEST"


class JobNotFound(ApiError):
    """There is no such job, or it is past its retention."""

    reason = "JOB_NOT_FOUND"


class RequestIdReused(ApiError):
    """The pair of user_id and request_id was used for another job."""

    reason = "REQUEST_ID_REUSED"


class JobDeleted(ApiError):
    """The job under the pair of user_id and request_id was deleted and does not run again."""

    reason = "JOB_DELETED"


class DeletionNotFound(ApiError):
    """There is no such deletion, or it is past its retention."""

    reason = "DELETION_NOT_FOUND"


class JobNotEnded(ApiError):
    """The job has not ended yet."""

    reason = "JOB_NOT_ENDED"


class LimitReached(ApiError):
    """A limit of the service is reached."""

    reason = "LIMIT_REACHED"


class CredentialMissing(ApiError):
    """The call had no credential, and the service asks for one."""

    reason = "CREDENTIAL_MISSING"


class CredentialInvalid(ApiError):
    """The credential does not count, or not any more."""

    reason = "CREDENTIAL_INVALID"


class CredentialExpired(ApiError):
    """The credential was good until it expired; call with a new one."""

    reason = "CREDENTIAL_EXPIRED"


class MissingScope(ApiError):
    """The credential is good, but lacks a scope that the call needs."""

    reason = "MISSING_SCOPE"


class UserNotAllowed(ApiError):
    """The credential is for the jobs of another user."""

    reason = "USER_NOT_ALLOWED"


class Unavailable(ApiError):
    """The service did not answer. A Submit may have been accepted all the same: repeat it under its request_id."""


class TemporalUnavailable(Unavailable):
    """The service cannot reach Temporal."""

    reason = "TEMPORAL_UNAVAILABLE"


class AuthenticationUnavailable(Unavailable):
    """The service cannot verify the credential now, because its issuer is away."""

    reason = "AUTHENTICATION_UNAVAILABLE"


class AuditUnavailable(Unavailable):
    """The service cannot record the call now, and does nothing without a record."""

    reason = "AUDIT_UNAVAILABLE"


class GatewayShutdown(Unavailable):
    """The gateway that was asked stops."""

    reason = "GATEWAY_SHUTDOWN"


class JobError(DurableLLMError):
    """A job ended without success."""

    def __init__(self, status: llm_pb2.JobStatus, result: llm_pb2.JobResult) -> None:
        super().__init__(status.error.message or llm_pb2.JobState.Name(status.state))
        self.status = status
        """How the job ended."""
        self.result = result
        """What it produced until then. Its output may be empty."""
        self.reason = reason_of(status.error) or self.reason


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
    """The engine cannot do what the sampling parameters ask for."""

    reason = "UNSUPPORTED_PARAMS"


class ResultTooLarge(JobError):
    """The output is larger than a result may be."""

    reason = "RESULT_TOO_LARGE"


class EngineFailed(JobError):
    """The engine failed on this job in every attempt."""

    reason = "ENGINE_FAILED"


class OutOfMemory(JobError):
    """The device had no memory for this job in any attempt."""

    reason = "OUT_OF_MEMORY"


class EngineDead(JobError):
    """The engine died or hung in every attempt."""

    reason = "ENGINE_DEAD"


class WorkerShutdown(JobError):
    """The workers that had the job stopped, again and again."""

    reason = "WORKER_SHUTDOWN"


class WorkerLost(JobError):
    """The workers that had the job sent no more heartbeats."""

    reason = "WORKER_LOST"


class QueueTimeout(JobError):
    """No worker took the job in time."""

    reason = "QUEUE_TIMEOUT"


class RunTimeout(JobError):
    """Every attempt took too long."""

    reason = "RUN_TIMEOUT"


class TotalTimeout(JobError):
    """The job's whole time was spent."""

    reason = "TOTAL_TIMEOUT"


class Cancelled(JobError):
    """Somebody cancelled the job."""

    reason = "CANCELLED"


class Terminated(JobError):
    """An operator terminated the job's workflow."""

    reason = "TERMINATED"


API_ERRORS: Final[Mapping[str, type[ApiError]]] = {
    kind.reason: kind for kind in (*ApiError.__subclasses__(), *Unavailable.__subclasses__()) if kind.reason
}
"""The class of each reason that a call fails for."""
JOB_ERRORS: Final[Mapping[str, type[JobError]]] = {kind.reason: kind for kind in JobError.__subclasses__()}
"""The class of each reason that a job ends for."""


def reason_of(status: status_pb2.Status) -> str:
    """Return the reason of a status's ErrorInfo; empty when it has none."""
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            reason: str = info.reason
            return reason
    return ""
