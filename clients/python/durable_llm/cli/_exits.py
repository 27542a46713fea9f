"""Exit statuses of the command line, and the line of text for each error."""

from enum import IntEnum
from typing import TYPE_CHECKING

from durable_llm._enums import name_of
from durable_llm.cli._text import visible

if TYPE_CHECKING:
    from durable_llm.errors import ApiError, JobError


class Exit(IntEnum):
    """How a command ended."""

    OK = 0
    """It did what it was asked for. The job succeeded, if the command waits for its end."""
    FAILED = 1
    """The job failed, or another error occurred."""
    USAGE = 2
    """The command line, the profile or a field of the request is wrong."""
    NOT_FOUND = 3
    """There is no such job, or it is past its retention."""
    NO_ACCESS = 4
    """The API key is missing or no longer valid, or it does not allow the call."""
    CANCELLED = 5
    """The job was cancelled or terminated."""
    TIMED_OUT = 6
    """The job exceeded one of its time limits."""
    UNAVAILABLE = 7
    """The service did not answer."""
    LIMITED = 8
    """A limit or a quota is reached: try again later."""
    REWOUND = 9
    """The job started over after its text had gone into a pipe, from which it cannot be taken back."""
    INTERRUPTED = 130
    """Ctrl-C. The job continues."""
    BROKEN_PIPE = 141
    """Nobody reads standard output any more."""


class CommandError(Exception):
    """An error of the command line itself."""

    def __init__(self, message: str, status: Exit = Exit.USAGE) -> None:
        super().__init__(message)
        self.status = status


class ReaderGone(Exception):
    """Nobody reads standard output any more. Click would take a BrokenPipeError for its own."""


class Interrupted(Exception):
    """Ctrl-C ended a wait."""

    def __init__(self, come_back: str) -> None:
        """`come_back` says how to come back to what continues."""
        super().__init__(come_back)


_ACCESS = ("UNAUTHENTICATED", "PERMISSION_DENIED")
_BY_CODE = {
    "NOT_FOUND": Exit.NOT_FOUND,
    "INVALID_ARGUMENT": Exit.USAGE,
    "RESOURCE_EXHAUSTED": Exit.LIMITED,
    "UNAVAILABLE": Exit.UNAVAILABLE,
    "DEADLINE_EXCEEDED": Exit.UNAVAILABLE,
    **dict.fromkeys(_ACCESS, Exit.NO_ACCESS),
}
"""Exit statuses by the name of the gRPC status. Any other is FAILED."""
_BY_STATE = {"JOB_STATE_CANCELLED": Exit.CANCELLED, "JOB_STATE_TIMED_OUT": Exit.TIMED_OUT}
"""Exit statuses by the state in which a job ended. Any other is FAILED."""


def exit_of_call(error: "ApiError") -> Exit:
    """Return the exit status for a call that failed."""
    return _BY_CODE.get(error.code.name, Exit.FAILED)


def exit_of_job(error: "JobError") -> Exit:
    """Return the exit status for a job that ended without success."""
    from llm_pb.llm_pb2 import JobState

    return _BY_STATE.get(name_of(JobState, error.status.state), Exit.FAILED)


def from_service(error: Exception, address: str) -> Exception:
    """Return the CommandError for the error of a call or of a job; any other error as it is."""
    if isinstance(error, CommandError | Interrupted | ReaderGone):
        return error
    from durable_llm import ApiError, JobError

    if isinstance(error, JobError):
        return CommandError(describe_job(error), exit_of_job(error))
    if isinstance(error, ApiError):
        return CommandError(describe_call(error, address), exit_of_call(error))
    return error


def describe_call(error: "ApiError", address: str) -> str:
    """Return the line of text for a call that failed: what is wrong, and what helps."""
    if error.violations:
        return "; ".join(_violation(item.field, item.description) for item in error.violations)
    text = visible(str(error))
    match exit_of_call(error):
        # One with a reason is the gateway's own.
        case Exit.UNAVAILABLE if not error.reason:
            return (
                f"{text}. Does a gateway listen at {address}? --address or DURABLE_LLM_ADDRESS names another address."
            )
        case Exit.NO_ACCESS if error.code.name == "UNAUTHENTICATED":
            return f"{text}. Set DURABLE_LLM_API_KEY, --api-key-file or the profile's api_key."
        case Exit.LIMITED if error.retry_delay is not None:
            return f"{text}. Try again in {error.retry_delay.total_seconds():.0f} s."
    return text


def describe_job(error: "JobError") -> str:
    """Return the line of text for a job that ended without success."""
    return visible(f"{error.reason}: {error}" if error.reason else str(error))


OPTIONS = {
    "job.prompt": "PROMPT",
    "job.messages": "--messages",
    "job.user_id": "--user",
    "job.project_id": "--project",
    "job.timeouts.total": "--timeout",
    "batch.user_id": "--user",
    "batch.project_id": "--project",
    "batch.window": "--window",
    "batch.max_concurrent": "--max-concurrent",
    "batch.max_failure_rate": "--max-failure-rate",
    "file.user_id": "--user",
    "file.purpose": "--purpose",
    "file.ref.media_type": "--media-type",
    "file.expire_time": "--expires",
}
"""Options whose names are not those of their fields."""
_OF_PARAMS = ("job.params.", "job.")
_OF_SCHEDULE = "schedule."


def _violation(field: str, description: str) -> str:
    # A field of a schedule's job has the option of a job's.
    field = field.removeprefix(_OF_SCHEDULE) if field.startswith(f"{_OF_SCHEDULE}job.") else field
    option = next((option for place, option in OPTIONS.items() if field.startswith(place)), "")
    prefix = next((prefix for prefix in _OF_PARAMS if field.startswith(prefix)), "")
    if not option and prefix:
        option = "--" + field.removeprefix(prefix).partition("[")[0].partition(".")[0].replace("_", "-")
    named = f"{field} ({option})" if option else field
    return visible(f"{named} {description}".strip())
