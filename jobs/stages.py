"""The stages of an attempt, as JobProgress.stage names them."""

from typing import Final

from llm_pb import llm_pb2

LOADING: Final = "loading"
QUEUED: Final = "queued"
PREFILL: Final = "prefill"
DECODE: Final = "decode"
PAUSED: Final = "paused"
DONE: Final = "done"

_WITHOUT_SEAT: Final = frozenset({QUEUED, PAUSED})


def waits_for_seat(progress: llm_pb2.JobProgress) -> bool:
    """Return whether the job waits for a seat: at the worker that the progress names, or in the queue if it names
    none."""
    return progress.stage in _WITHOUT_SEAT
