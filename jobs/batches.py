"""A batch between its workflow and those who read it: its chunks, its sums, why it stops."""

from collections.abc import Iterable
from datetime import timedelta
from typing import Final, NamedTuple

from google.rpc import code_pb2, status_pb2

from jobs.errors import error_info, make_status
from llm_pb import batch_pb2, common_pb2, internal_pb2, llm_pb2

MAX_CHUNKS: Final = 50
"""Default of the maximum number of chunks that run or wait at the same time."""
CHUNK_ITEMS: Final = 128
"""Default of the maximum number of items of a chunk."""
MANIFEST_CHUNKS: Final = 256
"""Default of the number of ended chunks from which on a manifest is written: a new run gets little of the last one."""
MAX_WATCHED: Final = 100
"""Default of the maximum number of items with "watch": true that run or wait at the same time."""
WATCHED_CHUNKS: Final = 4
"""Maximum number of chunks of such items that run or wait at the same time. Other chunks do not count."""
_MIN_CHUNK_ITEMS: Final = 16
_SPAN: Final = 16
"""Number of chunks by which a batch may be ahead of its maximum, while an early chunk takes long."""
MIN_JUDGED: Final = 100
"""Number of ended items from which on the share of failed ones counts."""
DEFAULT_WINDOW: Final = timedelta(hours=24)

FINAL_STATES: Final = frozenset(
    {
        batch_pb2.BATCH_STATE_SUCCEEDED,
        batch_pb2.BATCH_STATE_FAILED,
        batch_pb2.BATCH_STATE_CANCELLED,
        batch_pb2.BATCH_STATE_EXPIRED,
    }
)

CHUNK_ID_PREFIX: Final = "chunk-"
"""Begins the activity id of a chunk: `chunk-<number>-<times it was started>`."""

INVALID_INPUT: Final = "INVALID_INPUT"
INPUT_GONE: Final = "INPUT_GONE"
TOO_MANY_FAILURES: Final = "TOO_MANY_FAILURES"
BUDGET_SPENT: Final = "BUDGET_SPENT"
WINDOW_OVER: Final = "WINDOW_OVER"
CANCELLED: Final = "CANCELLED"
CHUNK_FAILED: Final = "CHUNK_FAILED"


def log_key(batch_id: str, chunk: int) -> str:
    """Return the key of a chunk's log in the feed."""
    return f"{batch_id}/{chunk}"


class Chunk(NamedTuple):
    """Items of one model that run as one activity."""

    number: int
    first: int
    """Place of the first item in the plan."""
    items: int
    group: internal_pb2.PlanGroup
    """The items of its model."""


class Stop(NamedTuple):
    """Why a batch ends before all its items have ended by themselves."""

    state: "batch_pb2.BatchState.ValueType"
    error: status_pb2.Status
    items: "llm_pb2.JobState.ValueType" = llm_pb2.JOB_STATE_CANCELLED
    """State of items that never began."""


def max_chunks(options: internal_pb2.BatchOptions, batch: batch_pb2.BatchRequest) -> int:
    """Return how many chunks may run or wait at the same time."""
    most = options.max_chunks or MAX_CHUNKS
    return min(most, -(-batch.max_concurrent // _MIN_CHUNK_ITEMS)) if batch.max_concurrent else most


def concurrent_items(
    options: internal_pb2.BatchOptions, batch: batch_pb2.BatchRequest, *, watched: bool = False
) -> int:
    """Return how many items of one chunk may run at the same time. 0: what the worker has free."""
    if watched:
        return max((options.max_watched or MAX_WATCHED) // WATCHED_CHUNKS, 1)
    return max(batch.max_concurrent // max_chunks(options, batch), 1) if batch.max_concurrent else 0


def span(options: internal_pb2.BatchOptions) -> int:
    """Return how many chunks there are at most from the first one that has not ended to the last one that has begun."""
    return (options.max_chunks or MAX_CHUNKS) + _SPAN


def chunks_of(plan: internal_pb2.BatchPlan, options: internal_pb2.BatchOptions) -> list[Chunk]:
    """Return the chunks of a plan. They are smaller where there are few items, so that many workers share them."""
    total = sum(group.count for group in plan.groups)
    shared = -(-total // (options.max_chunks or MAX_CHUNKS))
    size = min(options.chunk_items or CHUNK_ITEMS, max(shared, _MIN_CHUNK_ITEMS))
    chunks: list[Chunk] = []
    for group in plan.groups:
        for first in range(group.first, group.first + group.count, size):
            count = min(size, group.first + group.count - first)
            chunks.append(Chunk(len(chunks), first, count, group))
    return chunks


def done_count(result: internal_pb2.ChunkResult) -> int:
    """Return how many items of a chunk have ended."""
    return int.from_bytes(result.done, "little").bit_count()


def is_done(result: internal_pb2.ChunkResult, chunk: Chunk) -> bool:
    """Return whether every item of a chunk has ended."""
    return done_count(result) >= chunk.items


def later(one: internal_pb2.ChunkResult | None, other: internal_pb2.ChunkResult | None) -> internal_pb2.ChunkResult:
    """Return the one of two results of a chunk that has more."""
    known = [result for result in (one, other) if result is not None]
    return max(known, key=done_count, default=internal_pb2.ChunkResult())


def add_counts(total: common_pb2.WorkCounts, more: common_pb2.WorkCounts) -> None:
    """Add the numbers of ended items."""
    for name in ("succeeded", "failed", "cancelled", "expired"):
        setattr(total, name, getattr(total, name) + getattr(more, name))


def add_usage(total: common_pb2.Usage, more: common_pb2.Usage) -> None:
    """Add what pieces have used. The cost of tokens without a cost is unknown, and so is the sum then."""
    known = all(
        usage.HasField("cost_micros") or not (usage.prompt_tokens or usage.output_tokens) for usage in (total, more)
    )
    for name in ("prompt_tokens", "cached_prompt_tokens", "output_tokens", "wasted_tokens"):
        setattr(total, name, getattr(total, name) + getattr(more, name))
    if more.HasField("engine_time"):
        total.engine_time.FromTimedelta(total.engine_time.ToTimedelta() + more.engine_time.ToTimedelta())
    if not known:
        total.ClearField("cost_micros")
    elif more.HasField("cost_micros"):
        total.cost_micros += more.cost_micros


def add_ended(progress: internal_pb2.BatchProgress, chunk: internal_pb2.EndedChunk) -> None:
    """Add a chunk that has ended to what a batch has done, unless no item of it has ended."""
    result = chunk.result
    if not result.done.strip(b"\0"):
        return
    add_counts(progress.counts, result.counts)
    add_usage(progress.usage, result.usage)
    result.ClearField("counts")
    result.ClearField("usage")
    result.ClearField("needed")
    progress.recent.append(chunk)


def ended(counts: common_pb2.WorkCounts) -> int:
    """Return the number of ended items."""
    return counts.succeeded + counts.failed + counts.cancelled + counts.expired


def spent(batch: batch_pb2.BatchRequest, usage: common_pb2.Usage) -> str:
    """Return the name of the field of the budget that is spent; empty if none is."""
    budget = batch.budget
    used = {
        "output_tokens": usage.output_tokens,
        "prompt_tokens": usage.prompt_tokens - usage.cached_prompt_tokens,
        "cost_micros": usage.cost_micros,
    }
    for name, value in used.items():
        if 0 < getattr(budget, name) <= value:
            return name
    limit = budget.engine_time.ToNanoseconds()
    return "engine_time" if 0 < limit <= usage.engine_time.ToNanoseconds() else ""


def too_many_failures(batch: batch_pb2.BatchRequest, counts: common_pb2.WorkCounts) -> bool:
    """Return whether a larger share of the ended items has failed than the batch allows."""
    judged = ended(counts)
    return judged >= MIN_JUDGED and 0 < batch.max_failure_rate < counts.failed / judged


def stop_of_use(batch: batch_pb2.BatchRequest, progress: internal_pb2.BatchProgress) -> Stop | None:
    """Return why a batch must not go on for what it has used, or for what has failed; None if it may."""
    if field := spent(batch, progress.usage):
        return stop_spent(field)
    if too_many_failures(batch, progress.counts):
        message = f"{progress.counts.failed} of {ended(progress.counts)} items have failed"
        return stop_failed(TOO_MANY_FAILURES, message)
    return None


def describe(status: batch_pb2.BatchStatus, batch: batch_pb2.BatchRequest) -> None:
    """Write into the status what it repeats of the batch."""
    status.user_id, status.request_id, status.project_id = batch.user_id, batch.request_id, batch.project_id
    status.labels.update(batch.labels)
    status.input.CopyFrom(batch.input)


def stop_failed(reason: str, message: str) -> Stop:
    """Return the stop of a batch that cannot be done."""
    return Stop(batch_pb2.BATCH_STATE_FAILED, batch_error(code_pb2.FAILED_PRECONDITION, reason, message))


def stop_spent(field: str) -> Stop:
    """Return the stop of a batch that has used all that a field of its budget allows."""
    return stop_failed(BUDGET_SPENT, f"budget.{field} of the batch is spent")


def stop_never_fits() -> Stop:
    """Return the stop of a batch of which an item may use more than its tenant has a day."""
    return stop_failed("QUOTA_EXCEEDED", "an item may use more output tokens than its tenant has a day")


def stop_cancelled(message: str) -> Stop:
    """Return the stop of a batch that was cancelled."""
    return Stop(batch_pb2.BATCH_STATE_CANCELLED, batch_error(code_pb2.CANCELLED, CANCELLED, message))


def stop_expired() -> Stop:
    """Return the stop of a batch whose window is over."""
    error = batch_error(code_pb2.DEADLINE_EXCEEDED, WINDOW_OVER, "the window of the batch was over")
    return Stop(batch_pb2.BATCH_STATE_EXPIRED, error, llm_pb2.JOB_STATE_TIMED_OUT)


def batch_error(code: int, reason: str, message: str) -> status_pb2.Status:
    """Return the error of a batch."""
    return make_status(code, message, error_info(reason))


def result_in(details: Iterable[object]) -> internal_pb2.ChunkResult | None:
    """Return the result of a chunk among the details of a failure; None without one."""
    return next((detail for detail in details if isinstance(detail, internal_pb2.ChunkResult)), None)
