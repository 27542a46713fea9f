"""Which code of a pipeline undoes what was done: its compensations, and no task that its code has left running."""

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, Final

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from jobs import names

_undoing: Final = ContextVar("undoing", default=False)


async def undo(function: Callable[..., Awaitable[object]], *arguments: Any) -> None:
    """Call the function of a compensation in the present task. The tasks that it creates are a part of it."""
    _undoing.set(True)
    await function(*arguments)


def is_undoing() -> bool:
    """Return whether the running code is a part of a compensation. Call it only while compensations run."""
    return _undoing.get() or not workflow.patched(names.PATCH_LEFT_TASKS)
