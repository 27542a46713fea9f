"""What Temporal bounds of a pipeline's workflow: the history as a whole, and what one workflow task asks for.

Both are counted here. What the SDK tells of the history may differ between a run and its replay, where local activities
took long, and no command may depend on it.
"""

import asyncio
from datetime import timedelta
from typing import Final

from google.protobuf.message import Message
from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from google.rpc import code_pb2

    from jobs import names
    from jobs.pipelines import HISTORY_FULL, MAX_HISTORY_BYTES, failure
    from pipelines.errors import StepFailed

_MAX_TASK_BYTES: Final = 2 * 1024 * 1024
"""Size of what one workflow task asks for together, about. Temporal refuses a message of more than 4 MB."""
_MAX_TASK_STEPS: Final = 200
"""Maximum number of steps that begin in one workflow task."""
_NEXT_TASK: Final = timedelta(milliseconds=1)


class HistoryRoom:
    """The room in the history of a pipeline."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._since_timer = 0
        self._total = 0
        self._turns = asyncio.Lock()
        self._begun = 0

    async def turn(self) -> None:
        """Wait until a step may begin: only so many begin in one workflow task.

        The SDK takes a workflow task that needs more than 2 s for a deadlock, and gives the workflow up.
        """
        if self._begun >= _MAX_TASK_STEPS and workflow.patched(names.PATCH_STEP_TURNS):
            async with self._turns:
                if self._begun >= _MAX_TASK_STEPS:
                    # A timer ends the task.
                    await workflow.sleep(_NEXT_TASK)
                    self._begun = 0
        self._begun += 1

    async def take(self, value: object) -> None:
        """Count what a step is called with. Wait until it has room in a workflow task.

        A message that is too large would be refused for ever.
        """
        size = _size(value)
        async with self._lock:
            if self._since_timer and self._since_timer + size > _MAX_TASK_BYTES:
                # A timer ends the task.
                await workflow.sleep(_NEXT_TASK)
                self._since_timer = 0
            self._since_timer += size
            self._total += size

    def add(self, value: object) -> None:
        """Count what a step has returned."""
        self._total += _size(value)

    def require(self, path: str) -> None:
        """Raise StepFailed before Temporal would terminate the workflow, whose compensations could not run then."""
        if self._total > MAX_HISTORY_BYTES:
            message = (
                f"the steps of the pipeline have been called with and have returned {self._total} bytes; a step begins"
                f" up to {MAX_HISTORY_BYTES}: pass texts on as files, or split it into pipelines"
            )
            raise StepFailed(path, failure(HISTORY_FULL, message, code_pb2.RESOURCE_EXHAUSTED))


def _size(value: object) -> int:
    # JSON writes a character that is not ASCII as an escape sequence.
    return value.ByteSize() if isinstance(value, Message) else len(ascii(value))
