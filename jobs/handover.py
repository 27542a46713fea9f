"""What an attempt leaves to the one that follows a hand-over, which Temporal knows nothing of.

A hand-over is by a worker that had to stop, or by one that had no seat for the job: see ATTEMPT_END_PAUSED.
"""

from datetime import datetime, timedelta

from temporalio.exceptions import TimeoutError as TemporalTimeoutError

from jobs.heartbeat import before_handover, from_details
from jobs.outcome import output_bytes
from jobs.stages import PAUSED
from llm_pb import internal_pb2, llm_pb2


def is_pause(result: llm_pb2.JobResult | None) -> bool:
    """Return whether the last attempt of a partial result ended because the worker had no seat for the job.

    Its error is that of a hand-over by a worker that had to stop, so that workflow code of earlier versions goes on.
    """
    return bool(result and result.attempts and result.attempts[-1].end == llm_pb2.ATTEMPT_END_PAUSED)


def add_handover(request: internal_pb2.RunRequest, result: llm_pb2.JobResult | None) -> None:
    """Count a hand-over in the request of the attempt that follows, and add what the last one left, if anything."""
    request.handovers += 1
    request.unseated += is_pause(result)
    if result is None:
        return
    earlier = result.metadata
    request.earlier_attempts = max(0, earlier.attempts - 1)
    request.queue_time.CopyFrom(earlier.queue_time)
    request.output_bytes = output_bytes(result)
    request.rewinds = earlier.rewinds
    request.lowest_rewind_offset = earlier.lowest_rewind_offset
    request.metadata.CopyFrom(earlier)
    del request.attempts[:]
    request.attempts.extend(result.attempts)


def add_reported_times(
    result: llm_pb2.JobResult, request: internal_pb2.RunRequest, cause: BaseException | None
) -> None:
    """Add to an output that was read from the live feed the times that the job's last heartbeat or hand-over has
    reported.

    `cause` is how the last attempt ended: Temporal adds the last heartbeat to its timeouts.
    """
    reported = before_handover(request)
    if isinstance(cause, TemporalTimeoutError):
        heartbeat = from_details(cause.last_heartbeat_details)
        reported = heartbeat if heartbeat.HasField("metadata") else reported
    for field in ("queue_time", "engine_time"):
        if reported.metadata.HasField(field):
            getattr(result.metadata, field).CopyFrom(getattr(reported.metadata, field))
    result.metadata.pauses = reported.metadata.pauses


def queue_timeout(request: internal_pb2.RunRequest, limit: timedelta, now: datetime) -> timedelta | None:
    """Return the maximum wait of an attempt for a worker; None if only the total time bounds it.

    `limit` is the job's queue timeout. A hand-over by a worker that had to stop begins it again. Once a worker has had
    no seat for the job it is of the wait for the first seat: no hand-over begins it again, and it ends with that seat.
    """
    if not request.unseated:
        return limit
    if request.metadata.HasField("engine_time"):
        return None
    return max(request.create_time.ToDatetime(now.tzinfo) + limit - now, timedelta(milliseconds=1))


def paused_progress(request: internal_pb2.RunRequest, result: llm_pb2.JobResult) -> llm_pb2.JobProgress:
    """Return the progress of a job that waits for a seat in the queue, after an attempt that left this result."""
    tokens = result.metadata.output_tokens
    limit = request.job.params.max_tokens or request.default_max_tokens
    return llm_pb2.JobProgress(
        percent=round(100 * min(tokens / limit, 1.0), 1) if limit else 0,
        stage=PAUSED,
        updated_at=result.attempts[-1].end_time,
        output_tokens=tokens,
        output_bytes=output_bytes(result),
    )
