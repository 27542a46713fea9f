"""The stages of an attempt, and how long nothing may move in each of them."""

import time
from typing import Final

from services.gpu_worker.settings import GpuWorkerSettings

LOADING: Final = "loading"
PREFILL: Final = "prefill"
DECODE: Final = "decode"
DONE: Final = "done"


class Watchdog:
    """Tells whether an attempt hangs."""

    def __init__(self, settings: GpuWorkerSettings) -> None:
        self.stage = LOADING
        """LOADING, PREFILL, DECODE or DONE."""
        self.moved_at = time.monotonic()
        """When the attempt moved last, by the monotonic clock."""
        # A load has its limit elsewhere: it is the worker's, not the attempt's.
        self._limits = {PREFILL: settings.prefill_timeout, DECODE: settings.decode_timeout}

    def move(self, stage: str | None = None) -> None:
        """Note that the attempt has moved, to another stage if one is given."""
        self.moved_at = time.monotonic()
        self.stage = stage or self.stage

    @property
    def hangs(self) -> bool:
        """Whether nothing has moved for longer than it may in this stage."""
        limit = self._limits.get(self.stage)
        return limit is not None and time.monotonic() - self.moved_at > limit.total_seconds()
