"""How a workflow is cancelled: by its signal Cancel or by Temporal itself, noted wherever it waits, acted upon once.

Only a workflow that Temporal was asked to cancel can close as cancelled. After a signal it has Temporal asked itself.
"""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from jobs import errors

from workflows import activities


class Cancellation:
    """The cancel of the workflow that makes it."""

    def __init__(self) -> None:
        self.error: errors.Cancelled | None = None
        """What the workflow ends with once it was asked to stop."""
        self.noted_at: datetime | None = None
        """When it was asked first."""

    def note(self, reason: str) -> None:
        """Note that the workflow was asked to stop. The first time counts."""
        if self.error is None:
            self.error = errors.Cancelled(reason or "cancelled on request")
            self.noted_at = workflow.now()

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Wait for the condition; a cancel from Temporal meanwhile is noted like one from the signal."""
        while not condition():
            try:
                await workflow.wait_condition(condition)
            except asyncio.CancelledError:
                self.note(workflow.cancellation_reason() or "")

    async def request(self) -> None:
        """Return once Temporal was asked to cancel the workflow: only then can it close as cancelled."""
        if _asked():
            return
        request = workflow.start_local_activity(activities.request_cancel, start_to_close_timeout=timedelta(seconds=10))
        await self.wait(request.done)
        await self.wait(_asked)


def _asked() -> bool:
    return workflow.cancellation_reason() is not None
