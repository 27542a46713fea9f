"""The end of a job: its error, final state and status, from what Temporal reports of its last attempt."""

from datetime import timedelta
from typing import Final

from google.protobuf.duration_pb2 import Duration
from temporalio.exceptions import ApplicationError, CancelledError, TimeoutType
from temporalio.exceptions import TimeoutError as TemporalTimeoutError

from jobs import errors
from jobs.application_errors import from_application_error, partial_result
from llm_pb import llm_pb2

TOTAL_SPENT: Final = "the job's total time was spent; raise timeouts.total"
_TIMEOUT_ERRORS: Final[dict[TimeoutType, errors.JobError]] = {
    TimeoutType.SCHEDULE_TO_START: errors.QueueTimeout("no worker took the job in time; raise timeouts.queue or retry"),
    TimeoutType.START_TO_CLOSE: errors.RunTimeout("no attempt finished in time; raise timeouts.run or ask for less"),
    TimeoutType.SCHEDULE_TO_CLOSE: errors.TotalTimeout(TOTAL_SPENT),
    TimeoutType.HEARTBEAT: errors.WorkerLost("the workers that ran the job sent no more heartbeats"),
}


def final_state(error: errors.JobError | None) -> "llm_pb2.JobState.ValueType":
    """Return the state of a job that ended with the error, or without one."""
    if error is None:
        return llm_pb2.JOB_STATE_SUCCEEDED
    if isinstance(error, errors.Stopped):
        return llm_pb2.JOB_STATE_CANCELLED
    return llm_pb2.JOB_STATE_TIMED_OUT if isinstance(error, errors.TimedOut) else llm_pb2.JOB_STATE_FAILED


def classify_failure(cause: BaseException | None) -> tuple[errors.JobError, llm_pb2.JobResult | None]:
    """Return the error that ended the last attempt, and the output that it reported; None if it reported none."""
    match cause:
        case CancelledError():
            return errors.Cancelled("cancelled on request"), None
        case TemporalTimeoutError(type=TimeoutType() as kind):
            return _TIMEOUT_ERRORS[kind], None
        case ApplicationError():
            error = from_application_error(cause, otherwise=errors.EngineFailed)
            return error, partial_result(cause)
    return errors.EngineFailed(str(cause)), None


def total_spent(error: errors.JobError, timeouts: llm_pb2.JobTimeouts, within: timedelta) -> bool:
    """Return whether the error is of another limit than the total time, of which only `within` was left before it.

    Temporal shortens each limit to the time that is left, and reports any of those that then end in the same moment.
    """
    limits: dict[type[errors.JobError], Duration] = {
        errors.QueueTimeout: timeouts.queue,
        errors.RunTimeout: timeouts.run,
    }
    limit = limits.get(type(error))
    return limit is not None and limit.ToTimedelta() >= within


def output_bytes(result: llm_pb2.JobResult) -> int:
    """Return the size of the result's output, in UTF-8 bytes, wherever it is."""
    return result.output_file.size_bytes if result.HasField("output_file") else len(result.output.encode())


def without_output(result: llm_pb2.JobResult) -> llm_pb2.JobResult:
    """Return the result without output and logprobs. A file that holds the output stays."""
    return llm_pb2.JobResult(
        finish_reason=result.finish_reason,
        metadata=result.metadata,
        attempts=result.attempts,
        output_file=result.output_file if result.HasField("output_file") else None,
        images=result.images,
    )


def add_attempt(status: llm_pb2.JobStatus, result: llm_pb2.JobResult) -> None:
    """Write the number and times of the attempt that returned the result into the status."""
    status.attempt = result.metadata.attempts
    for field in ("start_time", "first_token_time"):
        if result.metadata.HasField(field):
            getattr(status, field).CopyFrom(getattr(result.metadata, field))


def add_result(status: llm_pb2.JobStatus, result: llm_pb2.JobResult, final: "llm_pb2.JobState.ValueType") -> None:
    """Write the attempt and the final progress into the status, whose end_time must be set."""
    add_attempt(status, result)
    status.progress.CopyFrom(
        llm_pb2.JobProgress(
            percent=100 if final == llm_pb2.JOB_STATE_SUCCEEDED else 0,
            stage="done",
            output_tokens=result.metadata.output_tokens,
            output_bytes=output_bytes(result),
            worker=result.metadata.worker,
            updated_at=status.end_time,
        )
    )
