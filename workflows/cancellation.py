"""The cancellation of a workflow, by its signal Cancel or by Temporal itself.

A cancel is noted wherever the workflow waits, and acted upon once. Only a workflow that Temporal was asked to cancel
can close as cancelled, so after a signal the workflow asks Temporal itself.
"""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from jobs import errors

from workflows import activities


class Cancellation:
    """The cancellation of the workflow that creates it."""

    def __init__(self) -> None:
        self.error: errors.Cancelled | None = None
        """The error that the workflow ends with. None until it was asked to stop."""
        self.noted_at: datetime | None = None
        """When the workflow was first asked to stop."""

    def note(self, reason: str) -> None:
        """Note that the workflow was asked to stop. Only the first call counts."""
        if self.error is None:
            self.error = errors.Cancelled(reason or "cancelled on request")
            self.noted_at = workflow.now()

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Wait for the condition. A cancel from Temporal meanwhile is noted like one from the signal."""
        while not condition():
            try:
                await workflow.wait_condition(condition)
            except asyncio.CancelledError:
                self.note(workflow.cancellation_reason() or "")

    async def request(self) -> None:
        """Ask Temporal to cancel the workflow, unless it was asked before, and wait until it does."""
        if _asked():
            return
        request = workflow.start_local_activity(activities.request_cancel, start_to_close_timeout=timedelta(seconds=10))
        await self.wait(request.done)
        await self.wait(_asked)


def _asked() -> bool:
    return workflow.cancellation_reason() is not None
