"""The metrics of a trainer: the speed and the loss of what it trains."""

from opentelemetry.metrics import Meter

from runtime.metrics import LONG_SECONDS


class TrainerMetrics:
    """The instruments of one trainer."""

    def __init__(self, meter: Meter) -> None:
        self._steps = meter.create_counter("llm.training.steps", "{step}", "Steps of optimizers that were done.")
        self._tokens = meter.create_counter("llm.training.tokens", "{token}", "Tokens that these steps have read.")
        self._loss = meter.create_gauge("llm.training.loss", "1", "Mean loss per token of the last steps.")
        self._checkpoint = meter.create_histogram(
            "llm.training.checkpoint.duration",
            "s",
            "Time to write a checkpoint to the store.",
            explicit_bucket_boundaries_advisory=LONG_SECONDS,
        )

    def advanced(self, steps: int, tokens: int, loss: float) -> None:
        """Record steps that were done."""
        self._steps.add(steps)
        self._tokens.add(tokens)
        self._loss.set(loss)

    def saved(self, seconds: float) -> None:
        """Record a checkpoint."""
        self._checkpoint.record(seconds)
