"""The stages of an attempt, and the maximum time without progress in each of them."""

import time

from jobs.stages import DECODE, LOADING, PREFILL
from services.gpu_worker.settings import GpuWorkerSettings


class Watchdog:
    """Detects an attempt that hangs."""

    def __init__(self, settings: GpuWorkerSettings) -> None:
        self.stage = LOADING
        """A stage of jobs.stages."""
        self.moved_at = time.monotonic()
        """When the attempt last made progress, by the monotonic clock."""
        # A load has no limit here, because it is the worker's and not the attempt's. Nor has a wait for a seat.
        self._limits = {PREFILL: settings.prefill_timeout, DECODE: settings.decode_timeout}

    def move(self, stage: str | None = None) -> None:
        """Note that the attempt has made progress, and is in another stage if one is given."""
        self.moved_at = time.monotonic()
        self.stage = stage or self.stage

    @property
    def hangs(self) -> bool:
        """Whether the attempt has made no progress for longer than its stage allows."""
        limit = self._limits.get(self.stage)
        return limit is not None and time.monotonic() - self.moved_at > limit.total_seconds()
