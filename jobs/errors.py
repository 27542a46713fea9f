"""The errors of a job: one tree of classes and one table of their consequences.

    JobError
    ├── JobRejected           no attempt can finish the job as it is
    │   ├── InvalidJob            the job breaks a rule of llm.proto
    │   ├── UnknownModel          this worker does not serve the model
    │   ├── PromptTooLong         prompt and one token do not fit the context
    │   ├── PromptFileMissing     the file of the prompt is gone
    │   ├── UnsupportedParams     the engine cannot do what params ask for
    │   ├── ResultTooLarge        the output exceeds what a result may hold
    │   └── BudgetSpent           the job has used all that its budget allows
    ├── EngineError           the engine failed in this attempt and continues to run
    │   ├── EngineFailed          on this job
    │   └── OutOfMemory           the device had no memory for this job
    ├── WorkerGone            the attempt ended with its worker; the job continues at another
    │   ├── EngineDead            the engine failed permanently; the worker's process ends
    │   ├── WorkerShutdown        the worker was asked to stop
    │   └── WorkerLost            the worker stopped sending heartbeats
    ├── TimedOut              a limit of JobTimeouts was exceeded
    │   ├── QueueTimeout          no worker took the job in time
    │   ├── RunTimeout            every attempt took too long
    │   └── TotalTimeout          the job did not end within its total time
    ├── Stopped               somebody ended the job
    │   ├── Cancelled             a client or an operator cancelled it
    │   └── Terminated            an operator terminated the workflow
    └── DeliveryError         an event did not reach its receiver
        ├── DeliveryFailed        this attempt failed; a later one may succeed
        └── DeliveryRefused       a receiver will never accept it

Code raises leaves and catches branches. `RULES` gives each leaf its canonical code, whether another attempt may
succeed, and how that attempt is started. In Temporal an error is an ApplicationError whose type is the reason: see
jobs.application_errors. Clients receive a google.rpc.Status with an ErrorInfo.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Final, NamedTuple

from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

ERROR_DOMAIN: Final = "llm.v1"
"""The domain of every ErrorInfo of the API."""
MAX_RETRY_AFTER: Final = timedelta(hours=1)
"""Maximum wait before another attempt that a provider can have."""


class JobError(Exception):
    """An error that ends an attempt or a job. Clients see its message, so it holds no secret and no prompt."""

    reason: str
    """The error's name on the wire. Branches have none."""
    retry_after: timedelta | None = None
    """Wait before another attempt that a provider asks for, MAX_RETRY_AFTER at most. None means the wait of `RULES`."""


class JobRejected(JobError):
    """No attempt can finish the job as it is: its sender has to change it."""


class InvalidJob(JobRejected):
    """The job breaks a rule of llm.proto."""

    reason = "INVALID_JOB"


class UnknownModel(JobRejected):
    """The worker that took the job does not serve its model."""

    reason = "UNKNOWN_MODEL"


class PromptTooLong(JobRejected):
    """The prompt leaves no room for a token in the model's context."""

    reason = "PROMPT_TOO_LONG"


class PromptFileMissing(JobRejected):
    """The file of the prompt was deleted or has expired, or is another one by now."""

    reason = "PROMPT_FILE_MISSING"


class UnsupportedParams(JobRejected):
    """The engine does not support the sampling parameters, or would delay all other jobs with them."""

    reason = "UNSUPPORTED_PARAMS"


class ResultTooLarge(JobRejected):
    """Output and logprobs exceed the operator's maximum, or without a store what fits a Temporal payload (2 MiB)."""

    reason = "RESULT_TOO_LARGE"


class BudgetSpent(JobRejected):
    """The job has used all that its budget allows, or its prompt alone would."""

    reason = "BUDGET_SPENT"


class EngineError(JobError):
    """The engine failed in this attempt and continues to run."""


class EngineFailed(EngineError):
    """The engine failed on this job and can continue with others."""

    reason = "ENGINE_FAILED"


class OutOfMemory(EngineError):
    """The device had no memory left for this job."""

    reason = "OUT_OF_MEMORY"


class WorkerGone(JobError):
    """The attempt ended with the worker that ran it. The job is not known to be at fault."""


class EngineDead(WorkerGone):
    """The engine failed permanently or hangs. The worker's process ends after this."""

    reason = "ENGINE_DEAD"


class WorkerShutdown(WorkerGone):
    """The worker was asked to stop before the job was done, or could not load its model."""

    reason = "WORKER_SHUTDOWN"


class WorkerLost(WorkerGone):
    """The worker sent no more heartbeats: it was killed or disconnected, or the job hangs in its engine."""

    reason = "WORKER_LOST"


class TimedOut(JobError):
    """A limit of JobTimeouts was exceeded."""


class QueueTimeout(TimedOut):
    """No worker took the job within JobTimeouts.queue."""

    reason = "QUEUE_TIMEOUT"


class RunTimeout(TimedOut):
    """Every attempt took longer than JobTimeouts.run."""

    reason = "RUN_TIMEOUT"


class TotalTimeout(TimedOut):
    """The job did not end within JobTimeouts.total."""

    reason = "TOTAL_TIMEOUT"


class Stopped(JobError):
    """Somebody ended the job."""


class Cancelled(Stopped):
    """A client or an operator cancelled the job."""

    reason = "CANCELLED"


class Terminated(Stopped):
    """An operator terminated the workflow."""

    reason = "TERMINATED"


class DeliveryError(JobError):
    """An event did not reach its receiver."""


class DeliveryFailed(DeliveryError):
    """The receiver could not be notified in this attempt. A later one may succeed."""

    reason = "DELIVERY_FAILED"


class DeliveryRefused(DeliveryError):
    """The receiver will never accept this delivery."""

    reason = "DELIVERY_REFUSED"


_IMMEDIATELY: Final = timedelta(milliseconds=100)


class Rule(NamedTuple):
    """The consequences of an error."""

    code: int
    """A google.rpc.Code."""
    retryable: bool
    """Whether another attempt, maybe on another worker, can succeed."""
    handed_over: bool = False
    """Whether the workflow starts that attempt itself, as a new activity, so that it uses up no retry."""
    retry_delay: timedelta | None = None
    """Wait before that attempt. None means the wait of the job's RetryOptions."""


RULES: Final[dict[type[JobError], Rule]] = {
    InvalidJob: Rule(code_pb2.INVALID_ARGUMENT, retryable=False),
    UnknownModel: Rule(code_pb2.NOT_FOUND, retryable=False),
    PromptTooLong: Rule(code_pb2.INVALID_ARGUMENT, retryable=False),
    PromptFileMissing: Rule(code_pb2.NOT_FOUND, retryable=False),
    UnsupportedParams: Rule(code_pb2.INVALID_ARGUMENT, retryable=False),
    ResultTooLarge: Rule(code_pb2.OUT_OF_RANGE, retryable=False),
    BudgetSpent: Rule(code_pb2.RESOURCE_EXHAUSTED, retryable=False),
    EngineFailed: Rule(code_pb2.UNAVAILABLE, retryable=True),
    OutOfMemory: Rule(code_pb2.RESOURCE_EXHAUSTED, retryable=True),
    # The death of an engine shows no fault of the job, so the retry need not wait.
    EngineDead: Rule(code_pb2.UNAVAILABLE, retryable=True, retry_delay=_IMMEDIATELY),
    WorkerShutdown: Rule(code_pb2.UNAVAILABLE, retryable=True, handed_over=True),
    WorkerLost: Rule(code_pb2.UNAVAILABLE, retryable=True),
    QueueTimeout: Rule(code_pb2.DEADLINE_EXCEEDED, retryable=False),
    RunTimeout: Rule(code_pb2.DEADLINE_EXCEEDED, retryable=True),
    TotalTimeout: Rule(code_pb2.DEADLINE_EXCEEDED, retryable=False),
    Cancelled: Rule(code_pb2.CANCELLED, retryable=False),
    Terminated: Rule(code_pb2.ABORTED, retryable=False),
    DeliveryFailed: Rule(code_pb2.UNAVAILABLE, retryable=True),
    DeliveryRefused: Rule(code_pb2.FAILED_PRECONDITION, retryable=False),
}

_MAX_MESSAGE: Final = 2000
"""Maximum length of a message in characters: an engine's may be too long for Temporal's memo and gRPC's trailers."""

BY_REASON: Final[dict[str, type[JobError]]] = {error.reason: error for error in RULES}


def to_status(error: JobError) -> status_pb2.Status:
    """Return the error as clients see it: code, message and an ErrorInfo with the reason."""
    return make_status(RULES[type(error)].code, message_of(error), error_info(error.reason))


def rule_of(status: status_pb2.Status) -> Rule | None:
    """Return the rule of the error that to_status made the status from; None of any other status."""
    kind = BY_REASON.get(reason_of(status))
    return None if kind is None else RULES[kind]


def reason_of(status: status_pb2.Status) -> str:
    """Return the reason in the ErrorInfo of a status. Empty without one."""
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
    reason: str = info.reason
    return reason


def error_type(error: BaseException) -> str:
    """Return the name of an error for a metric or a span: the reason of a JobError, else the name of the class."""
    return error.reason if isinstance(error, JobError) else type(error).__name__


def error_info(reason: str, about: Mapping[str, str] | None = None) -> error_details_pb2.ErrorInfo:
    """Return the detail that every error of the API carries."""
    return error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN, metadata=about)


def make_status(code: int, message: str, *details: Message) -> status_pb2.Status:
    """Return a google.rpc.Status with its details packed."""
    status = status_pb2.Status(code=code, message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return status


def message_of(error: JobError) -> str:
    """Return the error's message, as message_from() does."""
    return message_from(str(error))


def message_from(text: str) -> str:
    """Return a text of at most _MAX_MESSAGE characters, without halves of surrogate pairs, which no field can hold."""
    shown = text if len(text) <= _MAX_MESSAGE else text[: _MAX_MESSAGE - 1] + "…"
    return shown.encode(errors="replace").decode()
