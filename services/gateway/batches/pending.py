"""The chunks of a batch that run or wait, from Temporal's description of its workflow."""

from typing import NamedTuple

from temporalio.api.enums.v1 import PendingActivityState
from temporalio.client import WorkflowExecutionDescription
from temporalio.converter import DataConverter

from jobs import batches, names
from llm_pb import internal_pb2


class PendingChunk(NamedTuple):
    """A chunk that has not ended."""

    ended: internal_pb2.EndedChunk
    """What it has done by its last heartbeat."""
    runs: bool
    """Whether a worker has it."""


async def pending_chunks(description: WorkflowExecutionDescription, converter: DataConverter) -> list[PendingChunk]:
    """Return the chunks by number. Raises PayloadError, KeysUnavailable."""
    found = []
    for item in description.raw_description.pending_activities:
        if item.activity_type.name != names.ACTIVITY_RUN_BATCH_CHUNK:
            continue
        number = item.activity_id.removeprefix(batches.CHUNK_ID_PREFIX).partition("-")[0]
        if not number.isdecimal():
            continue
        chunk = internal_pb2.EndedChunk(chunk=int(number))
        if item.heartbeat_details.payloads:
            details = await converter.decode(item.heartbeat_details.payloads)
            if (result := batches.result_in(details)) is not None:
                chunk.result.CopyFrom(result)
        waits = item.state == PendingActivityState.PENDING_ACTIVITY_STATE_SCHEDULED
        found.append(PendingChunk(chunk, not waits))
    return sorted(found, key=lambda pending: pending.ended.chunk)
