"""The attempt of an open job, from Temporal's description of the pending activity RunLLMOnGPU."""

from collections.abc import Sequence

from temporalio.api.enums.v1 import PendingActivityState, TimeoutType
from temporalio.api.failure.v1 import Failure
from temporalio.api.workflow.v1 import PendingActivityInfo
from temporalio.client import WorkflowExecutionDescription
from temporalio.converter import DataConverter

from jobs import attempts, errors, names
from jobs.heartbeat import from_details
from jobs.stages import waits_for_seat
from llm_pb import internal_pb2, llm_pb2


def pending_run(description: WorkflowExecutionDescription) -> PendingActivityInfo | None:
    """Return the job's attempt, waiting or running; None if it has none yet or none any more."""
    pending = description.raw_description.pending_activities
    return next((item for item in pending if item.activity_type.name == names.ACTIVITY_RUN), None)


async def add_run(
    status: llm_pb2.JobStatus,
    run: PendingActivityInfo,
    converter: DataConverter,
    earlier: Sequence[llm_pb2.JobAttempt] = (),
) -> Sequence[llm_pb2.JobAttempt]:
    """Write the attempt into the status: QUEUED while it waits for a worker or a seat, or RUNNING with its progress.
    Return the attempts so far. `earlier` are those before the last hand-over.

    The status may already describe attempts before a hand-over, after which Temporal counts from 1 again. The first
    attempt after a hand-over keeps the number of the last one before it.
    """
    waiting = run.state == PendingActivityState.PENDING_ACTIVITY_STATE_SCHEDULED
    status.state = llm_pb2.JOB_STATE_QUEUED if waiting else llm_pb2.JOB_STATE_RUNNING
    status.attempt = max(status.attempt, max(status.attempt - 1, 0) + run.attempt - waiting)
    status.cancel_requested = run.state == PendingActivityState.PENDING_ACTIVITY_STATE_CANCEL_REQUESTED
    if run.HasField("last_started_time"):
        # The worker gets the time in whole microseconds, and reports it so.
        status.start_time.FromDatetime(run.last_started_time.ToDatetime())
    failed: errors.JobError | None = None
    if run.HasField("last_failure"):
        failure = run.last_failure
        message = await _message_of(failure, converter)
        kind = errors.BY_REASON.get(failure.application_failure_info.type, errors.EngineFailed)
        if failure.HasField("timeout_failure_info"):
            late = failure.timeout_failure_info.timeout_type == TimeoutType.TIMEOUT_TYPE_START_TO_CLOSE
            kind = errors.RunTimeout if late else errors.WorkerLost
        failed = kind(message)
        status.error.CopyFrom(errors.to_status(failed))
    if not waiting:
        # That of a paused job before a worker took it again.
        status.ClearField("progress")
    heartbeat = internal_pb2.RunHeartbeat()
    if run.heartbeat_details.payloads:
        heartbeat = from_details(await converter.decode(run.heartbeat_details.payloads))
    if not waiting and run.heartbeat_details.payloads:
        status.progress.CopyFrom(heartbeat.progress)
        # Temporal shows the heartbeat of the last attempt until this one has sent its own.
        if waits_for_seat(heartbeat.progress) and heartbeat.metadata.start_time == status.start_time:
            status.state = llm_pb2.JOB_STATE_QUEUED
        if heartbeat.HasField("metadata"):
            # Temporal counts from 1 again after a hand-over.
            status.attempt = heartbeat.metadata.attempts
    found = attempts.merged(earlier, heartbeat.attempts)
    if run.HasField("last_started_time"):
        found = _with_last(found, status, failed if waiting else None)
    return found


def _with_last(
    found: list[llm_pb2.JobAttempt], status: llm_pb2.JobStatus, failed: errors.JobError | None
) -> list[llm_pb2.JobAttempt]:
    """Return the attempts that a heartbeat has reported, with the last one that Temporal started.

    `failed` is how that one ended; None while it runs.
    """
    if not found or found[-1].start_time != status.start_time:
        for attempt in found:
            attempts.lose(attempt)
        found = attempts.bounded([*found, llm_pb2.JobAttempt(attempt=status.attempt, start_time=status.start_time)])
    last = found[-1]
    if failed is not None:
        attempts.fail(last, failed)
    elif not attempts.has_ended(last):
        last.ClearField("end_time")
    return found


async def _message_of(failure: Failure, converter: DataConverter) -> str:
    """Return the failure's message, which is in a payload of its own where payloads are encrypted."""
    if failure.HasField("encoded_attributes"):
        (attributes,) = await converter.decode([failure.encoded_attributes])
        if isinstance(attributes, dict):
            return str(attributes.get("message", ""))
    return failure.message
