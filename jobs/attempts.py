"""The attempts at a job, as JobResult lists them: who adds to the list, and how an attempt's end is found out.

An attempt reports its end itself. If it could not, the next attempt closes its entry, or the workflow if there is none.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Final

from google.rpc import status_pb2

from jobs import errors
from llm_pb import llm_pb2

_FIRST: Final = 5
_LAST: Final = 15
"""Number of attempts at either end of a list that is too long."""
_MAX_MESSAGE: Final = 256
"""Maximum length of an error's message in the list, in characters."""


def merged(*lists: Iterable[llm_pb2.JobAttempt]) -> list[llm_pb2.JobAttempt]:
    """Return the attempts of several lists, each once, oldest first; a later list knows more about an attempt.

    Temporal sets the time at which an attempt started, so that it identifies the attempt.
    """
    known = {attempt.start_time.ToNanoseconds(): attempt for attempts in lists for attempt in attempts}
    return bounded([known[start] for start in sorted(known)])


def bounded(attempts: list[llm_pb2.JobAttempt]) -> list[llm_pb2.JobAttempt]:
    """Return the first and the last of the attempts, as many as a list may hold."""
    return attempts if len(attempts) <= _FIRST + _LAST else [*attempts[:_FIRST], *attempts[-_LAST:]]


def has_ended(attempt: llm_pb2.JobAttempt) -> bool:
    """Return whether the end of the attempt is known."""
    return attempt.end != llm_pb2.ATTEMPT_END_UNSPECIFIED


def close(attempt: llm_pb2.JobAttempt, error: errors.JobError | None) -> None:
    """Write into an attempt that ends now why it does."""
    attempt.end_time.GetCurrentTime()
    attempt.end = llm_pb2.ATTEMPT_END_FINISHED if error is None else _end_of(error)
    if error is not None and not isinstance(error, errors.Cancelled):
        attempt.error.CopyFrom(_short_status(error))


def fail(attempt: llm_pb2.JobAttempt, error: errors.JobError) -> None:
    """Write into an attempt that has not reported its end the error with which Temporal says that it ended."""
    if not has_ended(attempt):
        attempt.end = _end_of(error)
        attempt.error.CopyFrom(_short_status(error))


def pause(attempt: llm_pb2.JobAttempt) -> None:
    """Write into an attempt that ends now that its worker has no seat for the job."""
    attempt.end_time.GetCurrentTime()
    attempt.end = llm_pb2.ATTEMPT_END_PAUSED


def lose(attempt: llm_pb2.JobAttempt) -> None:
    """Write into an attempt that has not reported its end, and that another one follows, that its worker was lost."""
    if not has_ended(attempt):
        attempt.end = llm_pb2.ATTEMPT_END_WORKER_LOST


def settle(
    result: llm_pb2.JobResult, earlier: Iterable[llm_pb2.JobAttempt], error: errors.JobError, ended_at: datetime
) -> None:
    """Add the attempts before the last hand-over to a partial result, and how the last attempt ended by Temporal.

    Temporal counts only for an attempt that has not reported its end.
    """
    attempts = merged(earlier, result.attempts)
    del result.attempts[:]
    result.attempts.extend(attempts)
    if not attempts or has_ended(attempts[-1]):
        return
    last = result.attempts[-1]
    if isinstance(error, errors.QueueTimeout):
        # No worker has taken the attempt that was to follow.
        lose(last)
        return
    last.end = _end_of(error)
    if last.end != llm_pb2.ATTEMPT_END_WORKER_LOST:
        last.end_time.FromDatetime(ended_at)
    if last.end != llm_pb2.ATTEMPT_END_CANCELLED:
        last.error.CopyFrom(_short_status(error))


def _end_of(error: errors.JobError) -> "llm_pb2.AttemptEnd.ValueType":
    if isinstance(error, errors.WorkerLost):
        return llm_pb2.ATTEMPT_END_WORKER_LOST
    if isinstance(error, errors.Stopped):
        return llm_pb2.ATTEMPT_END_CANCELLED
    if isinstance(error, errors.TimedOut):
        return llm_pb2.ATTEMPT_END_TIMED_OUT
    return llm_pb2.ATTEMPT_END_HANDED_OVER if errors.RULES[type(error)].handed_over else llm_pb2.ATTEMPT_END_FAILED


def _short_status(error: errors.JobError) -> status_pb2.Status:
    status = errors.to_status(error)
    status.message = status.message[:_MAX_MESSAGE]
    return status
