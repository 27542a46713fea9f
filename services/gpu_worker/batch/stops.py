"""Why an attempt at a chunk ends before its items."""

from dataclasses import dataclass

from google.rpc import status_pb2
from temporalio import activity

from jobs import batches
from jobs.errors import BudgetSpent, Cancelled, JobError, TotalTimeout, WorkerShutdown, to_status


@dataclass(frozen=True)
class Stop:
    """Why a chunk ends before its items."""

    error: JobError
    """The error with which running attempts end."""
    status: status_pb2.Status | None = None
    """The error of running items, which end with what they have generated. None: the next attempt goes on with them."""
    for_grant: bool = False
    """Whether the next attempt is to be one with a larger grant."""


def stop_expired() -> Stop:
    """Return the stop at the end of the batch's window."""
    over = batches.stop_expired().error
    return Stop(TotalTimeout(over.message), over)


def stop_for_grant(*, is_last: bool) -> Stop:
    """Return the stop of a chunk whose grant is spent while items run."""
    if not is_last:
        return Stop(WorkerShutdown("the chunk waits for a further grant"), for_grant=True)
    error = BudgetSpent("budget.engine_time of the batch is spent")
    return Stop(error, to_status(error))


def stop_of(details: activity.ActivityCancellationDetails | None) -> Stop | None:
    """Return the stop of a cancel of the activity; None when Temporal has given the attempt up."""
    if details is not None and details.cancel_requested:
        cancelled = batches.stop_cancelled("the batch was cancelled, or has failed")
        return Stop(Cancelled("cancelled on request"), cancelled.error)
    if details is not None and (details.worker_shutdown or details.paused or details.reset):
        return Stop(WorkerShutdown("the worker was asked to stop"))
    return None


def first_of(error: BaseException) -> BaseException:
    """Return the first error of a group of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
