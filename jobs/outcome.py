"""How a job ends: from what Temporal says of its last attempt to the job's error, final state and status."""

from typing import Final

from temporalio.exceptions import ApplicationError, CancelledError, TimeoutType
from temporalio.exceptions import TimeoutError as TemporalTimeoutError

from jobs import errors
from llm_pb import llm_pb2

_TIMEOUT_ERRORS: Final[dict[TimeoutType, errors.JobError]] = {
    TimeoutType.SCHEDULE_TO_START: errors.QueueTimeout("no worker took the job in time; raise timeouts.queue or retry"),
    TimeoutType.START_TO_CLOSE: errors.RunTimeout("no attempt finished in time; raise timeouts.run or ask for less"),
    TimeoutType.SCHEDULE_TO_CLOSE: errors.TotalTimeout("the job's total time was spent; raise timeouts.total"),
    TimeoutType.HEARTBEAT: errors.WorkerLost("the workers that ran the job fell silent"),
}


def final_state(error: errors.JobError | None) -> "llm_pb2.JobState.ValueType":
    """Return the state of a job that ended with the error, or without one."""
    if error is None:
        return llm_pb2.JOB_STATE_SUCCEEDED
    if isinstance(error, errors.Stopped):
        return llm_pb2.JOB_STATE_CANCELLED
    return llm_pb2.JOB_STATE_TIMED_OUT if isinstance(error, errors.TimedOut) else llm_pb2.JOB_STATE_FAILED


def classify_failure(cause: BaseException | None) -> tuple[errors.JobError, llm_pb2.JobResult | None]:
    """Return what ended the last attempt, and the output it had made; None of one that could not say."""
    match cause:
        case CancelledError():
            return errors.Cancelled("cancelled on request"), None
        case TemporalTimeoutError(type=TimeoutType() as kind):
            return _TIMEOUT_ERRORS[kind], None
        case ApplicationError():
            error = errors.from_application_error(cause, otherwise=errors.EngineFailed)
            return error, errors.partial_result(cause)
    return errors.EngineFailed(str(cause)), None


def add_attempt(status: llm_pb2.JobStatus, result: llm_pb2.JobResult) -> None:
    """Write into the status which attempt made the result, and when."""
    status.attempt = result.metadata.attempts
    for field in ("start_time", "first_token_time"):
        if result.metadata.HasField(field):
            getattr(status, field).CopyFrom(getattr(result.metadata, field))


def add_result(status: llm_pb2.JobStatus, result: llm_pb2.JobResult, final: "llm_pb2.JobState.ValueType") -> None:
    """Write into the status, whose end_time is set, how far a job came that ended in the final state."""
    add_attempt(status, result)
    status.progress.CopyFrom(
        llm_pb2.JobProgress(
            percent=100 if final == llm_pb2.JOB_STATE_SUCCEEDED else 0,
            stage="done",
            output_tokens=result.metadata.output_tokens,
            output_bytes=len(result.output.encode()),
            worker=result.metadata.worker,
            updated_at=status.end_time,
        )
    )
