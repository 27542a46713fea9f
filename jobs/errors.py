"""What can go wrong with a job, in one tree and one table.

    JobError
    ├── JobRejected           no attempt can finish the job as it is
    │   ├── InvalidJob            the job breaks a rule of llm.proto
    │   ├── UnknownModel          this worker does not serve the model
    │   ├── PromptTooLong         prompt and one token do not fit the context
    │   ├── UnsupportedParams     the engine cannot do what params ask for
    │   └── ResultTooLarge        the output does not fit a Temporal payload
    ├── EngineError           the engine failed in this attempt and lives on
    │   ├── EngineFailed          on this job
    │   └── OutOfMemory           the device had no memory for this job
    ├── WorkerGone            the attempt ended with its worker; the job goes on at another
    │   ├── EngineDead            the engine is gone for good, the worker's process ends
    │   ├── WorkerShutdown        the worker was told to stop
    │   └── WorkerLost            the worker fell silent
    ├── TimedOut              a limit of JobTimeouts was spent
    │   ├── QueueTimeout          no worker took the job in time
    │   ├── RunTimeout            every attempt took too long
    │   └── TotalTimeout          the job's whole time was spent
    ├── Stopped               somebody ended the job
    │   ├── Cancelled             by a cancel
    │   └── Terminated            an operator, by terminating the workflow
    └── DeliveryError         an event did not reach its receiver
        ├── DeliveryFailed        a receiver could not be told, this time
        └── DeliveryRefused       a receiver will never take it

A leaf is what is raised, a branch what is caught. `RULES` says of each leaf which canonical code it has, whether
another attempt may help, and how that attempt comes about. In Temporal an error travels as an ApplicationError whose
type is the reason; to clients it is a google.rpc.Status with an ErrorInfo.
"""

from datetime import timedelta
from typing import Any, Final, NamedTuple

from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory

from jobs.names import ERROR_DOMAIN
from llm_pb import llm_pb2
from payload_converter import PAYLOAD_ERROR_TYPE


class JobError(Exception):
    """Something that ends an attempt or a job. The message is for the client: no secrets, no prompt."""

    reason: str
    """The error's name on the wire. Branches have none."""


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


class UnsupportedParams(JobRejected):
    """The engine cannot do what the sampling parameters ask for, or not without holding up all other jobs."""

    reason = "UNSUPPORTED_PARAMS"


class ResultTooLarge(JobRejected):
    """The result does not fit a Temporal payload (2 MiB); Temporal would retry it for ever."""

    reason = "RESULT_TOO_LARGE"


class EngineError(JobError):
    """The engine failed in this attempt and lives on."""


class EngineFailed(EngineError):
    """The engine failed on this job and can go on with others."""

    reason = "ENGINE_FAILED"


class OutOfMemory(EngineError):
    """The device had no memory left for this job."""

    reason = "OUT_OF_MEMORY"


class WorkerGone(JobError):
    """The attempt ended with the worker that ran it. The job is not known to be at fault."""


class EngineDead(WorkerGone):
    """The engine is gone for good, or hangs; the worker's process ends after this."""

    reason = "ENGINE_DEAD"


class WorkerShutdown(WorkerGone):
    """The worker was told to stop before the job was done, or could not load its model."""

    reason = "WORKER_SHUTDOWN"


class WorkerLost(WorkerGone):
    """The worker fell silent about the job: killed, cut off, or the job hangs in its engine."""

    reason = "WORKER_LOST"


class TimedOut(JobError):
    """A limit of JobTimeouts was spent."""


class QueueTimeout(TimedOut):
    """No worker took the job within JobTimeouts.queue."""

    reason = "QUEUE_TIMEOUT"


class RunTimeout(TimedOut):
    """Every attempt took longer than JobTimeouts.run."""

    reason = "RUN_TIMEOUT"


class TotalTimeout(TimedOut):
    """JobTimeouts.total was spent."""

    reason = "TOTAL_TIMEOUT"


class Stopped(JobError):
    """Somebody ended the job."""


class Cancelled(Stopped):
    """Somebody asked for the job to stop."""

    reason = "CANCELLED"


class Terminated(Stopped):
    """An operator terminated the workflow."""

    reason = "TERMINATED"


class DeliveryError(JobError):
    """An event did not reach its receiver."""


class DeliveryFailed(DeliveryError):
    """A receiver could not be told, this time."""

    reason = "DELIVERY_FAILED"


class DeliveryRefused(DeliveryError):
    """A receiver will never take this delivery."""

    reason = "DELIVERY_REFUSED"


_IMMEDIATELY: Final = timedelta(milliseconds=100)


class Rule(NamedTuple):
    """What follows from an error."""

    code: int
    """A google.rpc.Code."""
    retryable: bool
    """Whether another attempt, maybe on another worker, can succeed."""
    handed_over: bool = False
    """Whether the workflow starts that attempt itself, as a new activity, so that it uses up none of the retries."""
    retry_delay: timedelta | None = None
    """Wait before that attempt. None: the wait of the job's RetryOptions."""


RULES: Final[dict[type[JobError], Rule]] = {
    InvalidJob: Rule(code_pb2.INVALID_ARGUMENT, retryable=False),
    UnknownModel: Rule(code_pb2.NOT_FOUND, retryable=False),
    PromptTooLong: Rule(code_pb2.INVALID_ARGUMENT, retryable=False),
    UnsupportedParams: Rule(code_pb2.INVALID_ARGUMENT, retryable=False),
    ResultTooLarge: Rule(code_pb2.OUT_OF_RANGE, retryable=False),
    EngineFailed: Rule(code_pb2.UNAVAILABLE, retryable=True),
    OutOfMemory: Rule(code_pb2.RESOURCE_EXHAUSTED, retryable=True),
    # An engine that died says nothing about the job: no need to wait.
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
"""Characters: an engine's own words may be pages, which neither Temporal's memo nor gRPC's trailers have room for."""

BY_REASON: Final[dict[str, type[JobError]]] = {error.reason: error for error in RULES}


def to_application_error(error: JobError, *details: Any) -> ApplicationError:
    """Return what the workflow of a job raises that ended with the error."""
    rule = RULES[type(error)]
    return ApplicationError(message_of(error), *details, type=error.reason, non_retryable=not rule.retryable)


def to_attempt_error(
    error: JobError,
    *details: Any,
    category: ApplicationErrorCategory = ApplicationErrorCategory.UNSPECIFIED,
) -> ApplicationError:
    """Return what an activity raises whose attempt ended with the error: Temporal then retries it by the table.

    What is handed over Temporal must not retry: the workflow does.
    """
    rule = RULES[type(error)]
    return ApplicationError(
        message_of(error),
        *details,
        type=error.reason,
        non_retryable=rule.handed_over or not rule.retryable,
        next_retry_delay=rule.retry_delay,
        category=category,
    )


def from_application_error(error: ApplicationError, otherwise: type[JobError]) -> JobError:
    """Return the error that travelled; `otherwise` for one that is none of ours, an exception in an activity, say."""
    if error.type == PAYLOAD_ERROR_TYPE:
        return InvalidJob(error.message)
    return BY_REASON.get(error.type or "", otherwise)(error.message)


def partial_result(error: ApplicationError) -> llm_pb2.JobResult | None:
    """Return the output that travelled with the error, of an attempt or of a job that did not get to its end."""
    return next((detail for detail in error.details if isinstance(detail, llm_pb2.JobResult)), None)


def to_status(error: JobError) -> status_pb2.Status:
    """Return the error as clients see it: code, message and an ErrorInfo with the reason."""
    return make_status(RULES[type(error)].code, message_of(error), error_info(error.reason))


def error_type(error: BaseException) -> str:
    """Return the name of an error for a metric or a span: a reason of ours, else the name of its class."""
    return error.reason if isinstance(error, JobError) else type(error).__name__


def error_info(reason: str) -> error_details_pb2.ErrorInfo:
    """Return the detail that every error of the API carries."""
    return error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN)


def make_status(code: int, message: str, *details: Message) -> status_pb2.Status:
    """Return a google.rpc.Status with its details packed."""
    status = status_pb2.Status(code=code, message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return status


def message_of(error: JobError) -> str:
    """Return the error's message, cut to what has room wherever it travels."""
    text = str(error)
    return text if len(text) <= _MAX_MESSAGE else text[: _MAX_MESSAGE - 1] + "…"
