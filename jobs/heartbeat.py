"""The heartbeat of RunLLMOnGPU, in the form in which Temporal stores it."""

from collections.abc import Sequence
from typing import Any

from llm_pb import internal_pb2, llm_pb2


def to_details(heartbeat: internal_pb2.RunHeartbeat) -> tuple[Any, ...]:
    """Return the arguments of `activity.heartbeat`.

    They are the message's fields, because workers and gateways of version 0.1.0 do not know RunHeartbeat. The message
    itself may be sent once none of them can run next to this version. `from_details` already reads it.
    """
    details: tuple[Any, ...] = (heartbeat.progress, heartbeat.metadata)
    # They ignore a third one, of a type that they know.
    if heartbeat.attempts:
        details = (*details, llm_pb2.JobResult(attempts=heartbeat.attempts))
    if heartbeat.HasField("provider_response"):
        # Only where the operator has asked for it, so that no worker of that version runs.
        details = (*details, internal_pb2.RunHeartbeat(provider_response=heartbeat.provider_response))
    return details


def from_details(details: Sequence[Any]) -> internal_pb2.RunHeartbeat:
    """Return the heartbeat in the decoded details, in either form, with the attempts. It is empty if they hold none."""
    heartbeat = internal_pb2.RunHeartbeat()
    for detail in details:
        match detail:
            case internal_pb2.RunHeartbeat():
                heartbeat.MergeFrom(detail)
            case llm_pb2.JobProgress():
                heartbeat.progress.CopyFrom(detail)
            case llm_pb2.ResultMetadata():
                heartbeat.metadata.CopyFrom(detail)
            case llm_pb2.JobResult():
                heartbeat.attempts.extend(detail.attempts)
    if heartbeat.metadata.attempts and not heartbeat.attempts:
        metadata = heartbeat.metadata
        heartbeat.attempts.add(
            attempt=metadata.attempts,
            worker=metadata.worker,
            start_time=metadata.start_time,
            end_time=heartbeat.progress.updated_at,
        )
    return heartbeat


def before_handover(request: internal_pb2.RunRequest) -> internal_pb2.RunHeartbeat:
    """Return the equivalent of the last heartbeat before a hand-over, which Temporal drops with the activity."""
    heartbeat = internal_pb2.RunHeartbeat(
        attempts=request.attempts,
        progress=llm_pb2.JobProgress(output_bytes=request.output_bytes),
        metadata=request.metadata,
    )
    # Workflow workers of earlier versions send these alone.
    heartbeat.metadata.MergeFrom(
        llm_pb2.ResultMetadata(
            queue_time=request.queue_time if request.HasField("queue_time") else None,
            rewinds=request.rewinds,
            lowest_rewind_offset=request.lowest_rewind_offset,
        )
    )
    return heartbeat
