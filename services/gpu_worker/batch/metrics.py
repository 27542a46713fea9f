"""The metrics of chunks."""

from opentelemetry.metrics import Meter

from llm_pb import llm_pb2
from runtime.metrics import LONG_SECONDS


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

    def ended(self, state: "llm_pb2.JobState.ValueType") -> None:
        """Record that an item has ended."""
        name = llm_pb2.JobState.Name(state).removeprefix("JOB_STATE_").lower()
        self._items.add(1, {**self._model, "llm.job.state": name})

    def flushed(self, seconds: float) -> None:
        """Record that results are durable."""
        self._flushes.record(seconds, self._model)
