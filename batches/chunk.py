"""A chunk as it stands: which of its items are durable, and what they have used."""

from collections.abc import Sequence

from jobs import batches
from jobs.usage import usage_of as used_by
from llm_pb import batch_pb2, common_pb2, internal_pb2, llm_pb2

_COUNTS = {
    llm_pb2.JOB_STATE_SUCCEEDED: "succeeded",
    llm_pb2.JOB_STATE_FAILED: "failed",
    llm_pb2.JOB_STATE_CANCELLED: "cancelled",
    llm_pb2.JOB_STATE_TIMED_OUT: "expired",
}


class Chunk:
    """What the chunk's heartbeats and its result say. It grows only: a bit that is set stays set."""

    def __init__(self, request: internal_pb2.ChunkRequest, earlier: internal_pb2.ChunkResult, attempt: int) -> None:
        """`earlier` is what earlier attempts have told Temporal; `attempt` is the number of this one."""
        self._size = request.count
        self._known = internal_pb2.ChunkResult()
        self._known.CopyFrom(earlier)
        self._known.attempts = attempt
        self._known.counts.total = request.count
        self._done = bytearray(earlier.done.ljust((request.count + 7) // 8, b"\0"))
        self._ended = batches.done_count(earlier)
        self._known.ClearField("needed")

    @property
    def usage(self) -> common_pb2.Usage:
        """What the durable items have used."""
        return self._known.usage

    @property
    def is_done(self) -> bool:
        """Whether every item is durable."""
        return self._ended >= self._size

    def todo(self) -> list[int]:
        """Return the places of the items that are not durable."""
        return [place for place in range(self._size) if not self._done[place // 8] >> place % 8 & 1]

    def add(self, ended: Sequence[tuple[int, batch_pb2.BatchItem]], segments: Sequence[common_pb2.FileRef]) -> None:
        """Note items that are durable, each with its place, and the segments that hold all of the chunk."""
        for place, item in ended:
            self._done[place // 8] |= 1 << place % 8
            batches.add_usage(self.usage, usage_of(item))
            self._ended += 1
            name = _COUNTS[item.state]
            setattr(self._known.counts, name, getattr(self._known.counts, name) + 1)
        del self._known.segments[:]
        self._known.segments.extend(segments)
        self._known.done = bytes(self._done)

    def need(self, grant: common_pb2.Budget) -> None:
        """Note the least grant with which the chunk can go on."""
        self._known.needed.CopyFrom(grant)

    def result(self, running: int = 0) -> internal_pb2.ChunkResult:
        """Return what Temporal is to know. `running` is the number of items that run."""
        result = internal_pb2.ChunkResult()
        result.CopyFrom(self._known)
        result.counts.running = running
        return result


def usage_of(item: batch_pb2.BatchItem) -> common_pb2.Usage:
    """Return what an item has used."""
    usage = used_by(item.result.metadata)
    if not item.HasField("result"):
        # A line that is no job costs nothing.
        usage.cost_micros = 0
    return usage
