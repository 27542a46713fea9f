"""The chunks of a batch that run or wait, from Temporal's description of its workflow."""

from collections.abc import Iterable
from typing import NamedTuple

from temporalio.api.enums.v1 import PendingActivityState
from temporalio.client import WorkflowExecutionDescription
from temporalio.converter import DataConverter

from jobs import batches, names
from llm_pb import internal_pb2


class PendingChunk(NamedTuple):
    """A chunk that has not ended."""

    ended: internal_pb2.EndedChunk
    """What it has done, as far as Temporal knows."""
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


def with_earlier(pending: Iterable[PendingChunk], begun: Iterable[internal_pb2.EndedChunk]) -> list[PendingChunk]:
    """Return the chunks by number, each with the most that it is known to have done.

    `begun` is what earlier activities have done. A chunk has none now while it waits for a lease, and the present one
    has sent no heartbeat yet while it waits for a worker.
    """
    found = {chunk.ended.chunk: chunk for chunk in pending}
    for earlier in begun:
        present = found.get(earlier.chunk, PendingChunk(internal_pb2.EndedChunk(), runs=False))
        ended = internal_pb2.EndedChunk(chunk=earlier.chunk, result=batches.later(present.ended.result, earlier.result))
        ended.result.counts.running = present.ended.result.counts.running
        found[earlier.chunk] = PendingChunk(ended, present.runs)
    return [found[number] for number in sorted(found)]
