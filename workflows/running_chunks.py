"""The chunks of a batch that run or wait, and how long its steps are tried: see workflows.batch_chunks."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from temporalio import workflow
from temporalio.common import RetryPolicy

with workflow.unsafe.imports_passed_through():
    from jobs import batches
    from llm_pb import internal_pb2

STEP_RETRIES: Final = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=30))
"""Without a last attempt: a store or worker that is away delays the batch."""
STEP_TIMEOUT: Final = timedelta(minutes=2)


class RunningChunk:
    """A chunk that runs or waits."""

    def __init__(self, chunk: batches.Chunk) -> None:
        self.chunk = chunk
        self.starts = 0
        self.idle_starts = 0
        self.result = internal_pb2.ChunkResult()
        """What it has done, as far as that is known here."""
        self.handle: workflow.ActivityHandle[internal_pb2.ChunkResult] | None = None
        """None while it waits for a lease."""
        self.is_last = False
        """Whether it has all that is left of the batch's budget."""

    @property
    def has_ended(self) -> bool:
        """Whether its activity has ended."""
        return self.handle is not None and self.handle.done()


@dataclass
class Window:
    """The chunks of a kind, which run in the order of the plan."""

    first: int
    end: int
    next: int
    most: int
    """Maximum number of chunks that run or wait."""
