"""The heartbeat of RunLLMOnGPU, in the form in which Temporal keeps it."""

from collections.abc import Sequence
from typing import Any

from llm_pb import internal_pb2, llm_pb2


def to_details(heartbeat: internal_pb2.RunHeartbeat) -> tuple[Any, ...]:
    """Return the arguments of `activity.heartbeat`.

    They are the fields, and not the message: workers and gateways of version 0.1.0 know no RunHeartbeat. The message
    may be sent as soon as none of them can run beside this version any more; `from_details` reads it already.
    """
    return heartbeat.progress, heartbeat.metadata


def from_details(details: Sequence[Any]) -> internal_pb2.RunHeartbeat:
    """Return what a heartbeat's decoded details say, in either form; an empty message where they say nothing."""
    heartbeat = internal_pb2.RunHeartbeat()
    for detail in details:
        match detail:
            case internal_pb2.RunHeartbeat():
                heartbeat.MergeFrom(detail)
            case llm_pb2.JobProgress():
                heartbeat.progress.CopyFrom(detail)
            case llm_pb2.ResultMetadata():
                heartbeat.metadata.CopyFrom(detail)
    return heartbeat


def before_handover(request: internal_pb2.RunRequest) -> internal_pb2.RunHeartbeat:
    """Return what the last heartbeat before a hand-over would say: Temporal forgets it with the activity."""
    return internal_pb2.RunHeartbeat(
        progress=llm_pb2.JobProgress(output_bytes=request.output_bytes),
        metadata=llm_pb2.ResultMetadata(
            queue_time=request.queue_time, rewinds=request.rewinds, lowest_rewind_offset=request.lowest_rewind_offset
        ),
    )
