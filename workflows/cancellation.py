"""The cancellation of a workflow, by its signal Cancel or by Temporal itself.

A cancel is noted wherever the workflow waits, and acted upon once. Only a workflow that Temporal was asked to cancel
can close as cancelled, so after a signal the workflow asks Temporal itself.
"""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from jobs import errors, names

from workflows import activities


class Cancellation:
    """The cancellation of the workflow that creates it."""

    def __init__(self) -> None:
        self.error: errors.Cancelled | None = None
        """The error that the workflow ends with. None until it was asked to stop."""
        self.noted_at: datetime | None = None
        """When the workflow was first asked to stop."""
        self._requests: bool | None = None
        """Whether `request` asks Temporal. None in a workflow of an earlier version, which sees for itself."""

    def note(self, reason: str) -> None:
        """Note that the workflow was asked to stop. Only the first call counts."""
        if self.error is None:
            self.error = errors.Cancelled(reason or "cancelled on request")
            self.noted_at = workflow.now()

    @property
    def is_asked(self) -> bool:
        """Whether the workflow was asked to stop, be it noted or not."""
        return self.error is not None or _asked()

    def note_asked(self) -> None:
        """Note a cancel from Temporal that has come before the workflow waits for something."""
        if _asked():
            self.note(workflow.cancellation_reason() or "")

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Wait for the condition. A cancel from Temporal meanwhile is noted like one from the signal."""
        while not condition():
            try:
                await workflow.wait_condition(condition)
            except asyncio.CancelledError:
                self.note(workflow.cancellation_reason() or "")

    def decide(self) -> None:
        """Decide whether `request` will ask Temporal to cancel the workflow: unless it was asked before.

        To be called once the workflow is known to end as cancelled, before the local activities of its close. A cancel
        that comes beside the end of one may come after it in a replay.
        """
        if workflow.patched(names.PATCH_DECIDES_REQUEST):
            self._requests = not _asked()

    async def request(self) -> None:
        """Ask Temporal to cancel the workflow, if that was decided, and wait until it does."""
        requests = not _asked() if self._requests is None else self._requests
        if not requests:
            return
        request = workflow.start_local_activity(activities.request_cancel, start_to_close_timeout=timedelta(seconds=10))
        await self.wait(request.done)
        await self.wait(_asked)


def _asked() -> bool:
    return workflow.cancellation_reason() is not None
