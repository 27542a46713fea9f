"""Errors of this package, one class for each reason that the service names.

    DurableLLMError
    ├── ApiError                  a call was refused or failed
    │   ├── InvalidRequest        a field breaks a rule; see violations
    │   ├── JobNotFound           no job has this id, or it is past its retention
    │   ├── RequestIdReused       the request_id was used for another job
    │   ├── JobDeleted            the job was deleted and does not run again
    │   ├── ScheduleNotFound      no schedule has this id
    │   ├── DeletionNotFound      no such deletion, or it is past its retention
    │   ├── JobNotEnded           the job has not ended yet
    │   ├── LimitReached          a limit of the service is reached; see retry_delay
    │   ├── QuotaExceeded         a quota of the caller's tenant is reached; see retry_delay
    │   ├── CredentialMissing     the call had no credential
    │   ├── CredentialInvalid     the credential does not count, or not any more
    │   ├── CredentialExpired     the credential was good; call with a new one
    │   ├── MissingScope          the credential is not for this call
    │   ├── UserNotAllowed        the credential is for the jobs of another user
    │   ├── ContentUnreadable     the job's content can never be decrypted again
    │   └── Unavailable           the service did not answer
    │       ├── TemporalUnavailable        the service cannot reach Temporal
    │       ├── AuthenticationUnavailable  the service cannot verify the credential now
    │       ├── KeysUnavailable            the keys of encrypted content are unavailable
    │       ├── AuditUnavailable           the service cannot record the call now
    │       ├── FeedUnavailable            the service gets no reports of workers now
    │       └── GatewayShutdown            the gateway is about to stop
    └── JobError                  a job ended without success; see result for its partial output
        ├── InvalidJob            ├── OutOfMemory      ├── QueueTimeout
        ├── UnknownModel          ├── EngineDead       ├── RunTimeout
        ├── PromptTooLong         ├── WorkerShutdown   ├── TotalTimeout
        ├── UnsupportedParams     ├── WorkerLost       ├── Cancelled
        ├── ResultTooLarge        ├── EngineFailed     └── Terminated
        ├── BudgetSpent          └── PromptFileMissing

A reason that this version does not know is raised as ApiError or JobError, with that `reason`.

All errors can be pickled.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final

import grpc

from durable_llm._details import Violation as Violation
from durable_llm._error import DurableLLMError as DurableLLMError
from durable_llm._job_errors import JOB_ERRORS as JOB_ERRORS
from durable_llm._job_errors import BudgetSpent as BudgetSpent
from durable_llm._job_errors import Cancelled as Cancelled
from durable_llm._job_errors import EngineDead as EngineDead
from durable_llm._job_errors import EngineFailed as EngineFailed
from durable_llm._job_errors import InvalidJob as InvalidJob
from durable_llm._job_errors import JobError as JobError
from durable_llm._job_errors import OutOfMemory as OutOfMemory
from durable_llm._job_errors import PromptFileMissing as PromptFileMissing
from durable_llm._job_errors import PromptTooLong as PromptTooLong
from durable_llm._job_errors import QueueTimeout as QueueTimeout
from durable_llm._job_errors import ResultTooLarge as ResultTooLarge
from durable_llm._job_errors import RunTimeout as RunTimeout
from durable_llm._job_errors import Terminated as Terminated
from durable_llm._job_errors import TotalTimeout as TotalTimeout
from durable_llm._job_errors import UnknownModel as UnknownModel
from durable_llm._job_errors import UnsupportedParams as UnsupportedParams
from durable_llm._job_errors import WorkerLost as WorkerLost
from durable_llm._job_errors import WorkerShutdown as WorkerShutdown


class ApiError(DurableLLMError):
    """A call was refused or failed."""

    def __init__(
        self,
        message: str,
        code: grpc.StatusCode,
        reason: str = "",
        retry_delay: timedelta | None = None,
        violations: tuple[Violation, ...] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        """The gRPC status code."""
        self.reason = reason or self.reason
        self.retry_delay = retry_delay
        """Time after which a repeated call may succeed. None when the service does not say."""
        self.violations = violations
        """All fields that break a rule."""
        self.metadata = dict(metadata or {})
        """What the service says of the reason, google.rpc.ErrorInfo.metadata: the missing `scope`, for example."""

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


class QuotaExceeded(ApiError):
    """A quota of the caller's tenant is reached."""

    reason = "QUOTA_EXCEEDED"


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


class ContentUnreadable(ApiError):
    """The job's content can never be decrypted again: its keys were deleted, or it was altered."""

    reason = "CONTENT_UNREADABLE"


class ScheduleNotFound(ApiError):
    """No schedule has this id."""

    reason = "SCHEDULE_NOT_FOUND"


class Unavailable(ApiError):
    """The service did not answer. It may have accepted a Submit nevertheless: repeat it with the same request_id."""


class TemporalUnavailable(Unavailable):
    """The service cannot reach Temporal."""

    reason = "TEMPORAL_UNAVAILABLE"


class AuthenticationUnavailable(Unavailable):
    """The service cannot verify the credential now, because its issuer is away."""

    reason = "AUTHENTICATION_UNAVAILABLE"


class KeysUnavailable(Unavailable):
    """The keys of encrypted content are unavailable now."""

    reason = "KEYS_UNAVAILABLE"


class AuditUnavailable(Unavailable):
    """The service cannot record the call now, and does nothing without a record."""

    reason = "AUDIT_UNAVAILABLE"


class FeedUnavailable(Unavailable):
    """The service is not connected to NATS, so it does not know the workers."""

    reason = "FEED_UNAVAILABLE"


class GatewayShutdown(Unavailable):
    """The gateway is about to stop."""

    reason = "GATEWAY_SHUTDOWN"


API_ERRORS: Final[Mapping[str, type[ApiError]]] = {
    kind.reason: kind for kind in (*ApiError.__subclasses__(), *Unavailable.__subclasses__()) if kind.reason
}
"""The class for each reason for which a call fails."""
