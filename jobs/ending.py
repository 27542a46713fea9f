"""How a job ends: from what Temporal says of its last attempt to the job's error and final state."""

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
_TIMED_OUT: Final = (errors.QueueTimeout, errors.RunTimeout, errors.TotalTimeout)


def final_state(error: errors.JobError | None) -> "llm_pb2.JobState.ValueType":
    """Return the state of a job that ended with the error, or without one."""
    if error is None:
        return llm_pb2.JOB_STATE_SUCCEEDED
    if isinstance(error, errors.Cancelled):
        return llm_pb2.JOB_STATE_CANCELLED
    return llm_pb2.JOB_STATE_TIMED_OUT if isinstance(error, _TIMED_OUT) else llm_pb2.JOB_STATE_FAILED


def understand(cause: BaseException | None) -> tuple[errors.JobError, llm_pb2.JobResult | None]:
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
