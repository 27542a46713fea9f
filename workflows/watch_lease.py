"""The lease of a job that somebody has to watch.

Gateways renew it by the signal Watched while a client watches the job: see services.gateway.streams.watch_lease.
Timers outlive every gateway, so the job is cancelled also when all of them have died.
"""

import asyncio
from datetime import timedelta
from typing import Final

from temporalio import workflow

from workflows.cancellation import Cancellation

_GRACE: Final = 4
"""Part of a lease, as its divisor, that is a timer of its own. After an outage of Temporal, in which no gateway could
renew the lease, the first timer fires immediately, and the second one leaves the gateways time."""


class WatchLease:
    """The lease of the workflow that creates it."""

    def __init__(self, cancellation: Cancellation, seconds: object) -> None:
        """`seconds` is what the memo holds: None for a job that runs unwatched."""
        # A workflow that was started by hand may hold anything.
        valid = isinstance(seconds, int | float) and 1 <= seconds < 1e9
        self._lease = timedelta(seconds=seconds) if valid else None  # type: ignore[arg-type]  # mypy loses the type
        self._cancellation = cancellation
        self._renewed_at = workflow.now()
        self._expiring: asyncio.Task[None] | None = None

    def renew(self) -> None:
        """Renew the lease: somebody watches."""
        self._renewed_at = workflow.now()

    def start(self) -> None:
        """Cancel the workflow when the lease expires, from now until stop()."""
        if self._lease is not None:
            self._expiring = asyncio.create_task(self._expire(self._lease))

    def stop(self) -> None:
        """Stop the expiry. From now on the workflow needs no watcher."""
        if self._expiring is not None:
            self._expiring.cancel()

    async def _expire(self, lease: timedelta) -> None:
        grace = lease / _GRACE
        while True:
            renewed_at = self._renewed_at
            left = renewed_at + lease - grace - workflow.now()
            await workflow.sleep(max(left, timedelta(0)))
            if self._renewed_at != renewed_at:
                continue
            await workflow.sleep(grace)
            if self._renewed_at == renewed_at:
                self._cancellation.note(f"nobody has watched the job for {lease.total_seconds():g} s")
                return
