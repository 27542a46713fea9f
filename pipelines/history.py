"""What Temporal bounds of a pipeline's workflow: the history as a whole, and what one workflow task asks for."""

import asyncio
from datetime import timedelta
from typing import Final

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from google.rpc import code_pb2

    from jobs.pipelines import HISTORY_FULL, MAX_HISTORY_BYTES, MAX_HISTORY_EVENTS, failure
    from pipelines.errors import StepFailed

_MAX_TASK_BYTES: Final = 2 * 1024 * 1024
"""Size of what one workflow task asks for together, about. Temporal refuses a message of more than 4 MB."""
_NEXT_TASK: Final = timedelta(milliseconds=1)


class TaskRoom:
    """The room for commands in the workflow task that runs."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._task = 0
        """The length of the history with which the task began."""
        self._bytes = 0

    async def take(self, size: int) -> None:
        """Wait until there is room for so many bytes. A message that is too large would be refused for ever."""
        async with self._lock:
            if self._task != (task := workflow.info().get_current_history_length()):
                self._task, self._bytes = task, 0
            if self._bytes and self._bytes + size > _MAX_TASK_BYTES:
                # A timer ends the task.
                await workflow.sleep(_NEXT_TASK)
                self._task, self._bytes = workflow.info().get_current_history_length(), 0
            self._bytes += size


def require_history(path: str) -> None:
    """Raise StepFailed before Temporal would terminate the workflow, whose compensations could not run then."""
    info = workflow.info()
    size, events = info.get_current_history_size(), info.get_current_history_length()
    if size > MAX_HISTORY_BYTES or events > MAX_HISTORY_EVENTS:
        message = (
            f"the history of the pipeline has {size} bytes and {events} events; a step begins up to {MAX_HISTORY_BYTES}"
            f" bytes and {MAX_HISTORY_EVENTS} events: pass texts on as files, or split it into pipelines"
        )
        raise StepFailed(path, failure(HISTORY_FULL, message, code_pb2.RESOURCE_EXHAUSTED))
