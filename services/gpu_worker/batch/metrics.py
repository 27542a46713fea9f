"""The metrics of chunks."""

from typing import Final

from opentelemetry.metrics import Meter

from llm_pb import llm_pb2
from runtime.metrics import LONG_SECONDS

FINAL_STATES: Final = (
    llm_pb2.JOB_STATE_SUCCEEDED,
    llm_pb2.JOB_STATE_FAILED,
    llm_pb2.JOB_STATE_CANCELLED,
    llm_pb2.JOB_STATE_TIMED_OUT,
)


class ChunkMetrics:
    """The instruments of one worker."""

    def __init__(self, meter: Meter, model: str) -> None:
        self._model = {"gen_ai.request.model": model}
        self._items = meter.create_counter("llm.batch.items", "{item}", "Items of batches that have ended.")
        self._flushes = meter.create_histogram(
            "llm.batch.flush.duration",
            "s",
            "Time in which results of batches are written to the store.",
            explicit_bucket_boundaries_advisory=LONG_SECONDS,
        )
        for state in FINAL_STATES:
            self._items.add(0, self._labels(state))

    def ended(self, state: "llm_pb2.JobState.ValueType") -> None:
        """Record that an item has ended."""
        self._items.add(1, self._labels(state))

    def flushed(self, seconds: float) -> None:
        """Record that results are durable."""
        self._flushes.record(seconds, self._model)

    def _labels(self, state: "llm_pb2.JobState.ValueType") -> dict[str, str]:
        return {**self._model, "llm.job.state": llm_pb2.JobState.Name(state).removeprefix("JOB_STATE_").lower()}
