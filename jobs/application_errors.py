"""The errors of a job as Temporal's exceptions, and back.

They are apart from jobs.errors so that a process without Temporal, such as the HTTP front, need not import Temporal's
library.
"""

from typing import Any

from temporalio.exceptions import ApplicationError, ApplicationErrorCategory

from jobs.errors import BY_REASON, RULES, InvalidJob, JobError, message_of
from llm_pb import llm_pb2
from payload_converter import PAYLOAD_ERROR_TYPE


def to_application_error(error: JobError, *details: Any) -> ApplicationError:
    """Return the exception that a job's workflow raises to end with the error."""
    rule = RULES[type(error)]
    return ApplicationError(message_of(error), *details, type=error.reason, non_retryable=not rule.retryable)


def to_attempt_error(
    error: JobError,
    *details: Any,
    category: ApplicationErrorCategory = ApplicationErrorCategory.UNSPECIFIED,
) -> ApplicationError:
    """Return the exception that an activity raises to end its attempt with the error.

    Temporal then retries it by `RULES`. It does not retry an error that is handed over, because the workflow does.
    """
    rule = RULES[type(error)]
    return ApplicationError(
        message_of(error),
        *details,
        type=error.reason,
        non_retryable=rule.handed_over or not rule.retryable,
        next_retry_delay=error.retry_after or rule.retry_delay,
        category=category,
    )


def from_application_error(error: ApplicationError, otherwise: type[JobError]) -> JobError:
    """Return the JobError that it carries; an `otherwise` if its type is unknown, as of an exception in an activity."""
    if error.type == PAYLOAD_ERROR_TYPE:
        return InvalidJob(error.message)
    return BY_REASON.get(error.type or "", otherwise)(error.message)


def partial_result(error: ApplicationError) -> llm_pb2.JobResult | None:
    """Return the partial output that an attempt or a job attached to the error; None if it attached none."""
    return next((detail for detail in error.details if isinstance(detail, llm_pb2.JobResult)), None)
