"""What vLLM's schedulers report after each step: its load, and how many tokens the step had."""

from collections.abc import Callable
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats


class LatestStats(StatLoggerBase):  # type: ignore[misc]  # vllm is not there when types are checked
    """Keeps the statistics that a scheduler of vLLM's reports after each step."""

    def __init__(
        self, vllm_config: Any, engine_index: int, on_step: Callable[[int, int], None], logs_steps: bool
    ) -> None:
        self.latest = SchedulerStats()
        self._engine_index = engine_index
        self._on_step = on_step
        self._logs_steps = logs_steps

    def record(self, scheduler_stats: SchedulerStats | None, *_: Any, **__: Any) -> None:
        """Keep a step's statistics, which are None for a step without any."""
        if scheduler_stats is not None:
            self.latest = scheduler_stats
            details = scheduler_stats.iteration_details
            if not self._logs_steps:
                # vLLM's own logger, which is called next, writes a line for each.
                scheduler_stats.iteration_details = None
            self._on_step(self._engine_index, details.num_ctx_tokens + details.num_generation_tokens if details else 0)

    def log_engine_initialized(self) -> None:
        """Log nothing."""
