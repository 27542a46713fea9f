"""The start of a step's workflow."""

import asyncio
from collections.abc import Coroutine, Generator
from functools import partial
from typing import Any, Generic, TypeVar

from temporalio import workflow
from temporalio.common import WorkflowIDReusePolicy

with workflow.unsafe.imports_passed_through():
    from google.protobuf.message import Message

    from jobs import names

from pipelines.step import Step

_T = TypeVar("_T")


async def start_child(
    step: Step, workflow_type: str, argument: Message, id_: str, result_type: type, *, resumed: bool, **start: Any
) -> workflow.ChildWorkflowHandle[Any, Any]:
    """Start the workflow of a step. A cancel that comes meanwhile cancels it, and is noted.

    `resumed`: whether it may have had an earlier run. Raises what the start raises.
    """
    reuse = WorkflowIDReusePolicy
    starting = _Noting(
        workflow.start_child_workflow(
            workflow_type,
            argument,
            id=id_,
            id_reuse_policy=reuse.ALLOW_DUPLICATE if resumed else reuse.REJECT_DUPLICATE,
            # What ends the pipeline by force must not take what its jobs have made.
            parent_close_policy=workflow.ParentClosePolicy.REQUEST_CANCEL,
            result_type=result_type,
            **start,
        )
    )
    try:
        return await starting
    finally:
        step.cancelled = starting.cancelled and workflow.patched(names.PATCH_KEEPS_CANCELS)


class _Noting(Generic[_T]):
    """Awaits a coroutine once, as it would be awaited by itself, and notes whether a cancel came.

    The SDK makes a cancel of a task that waits for the start of a child workflow the child's, and has the task forget
    it. Where the child ends well nevertheless, the task would go on.
    """

    def __init__(self, work: Coroutine[Any, Any, _T]) -> None:
        self._work = work
        self.cancelled = False
        """Whether a cancel has come."""

    def __await__(self) -> Generator[Any, Any, _T]:
        """Await the coroutine. Raises what it raises."""
        go_on = partial(self._work.send, None)
        while True:
            try:
                awaited = go_on()
            except StopIteration as end:
                value: _T = end.value
                return value
            try:
                yield awaited
                go_on = partial(self._work.send, None)
            except GeneratorExit:
                self._work.close()
                raise
            except BaseException as error:  # noqa: BLE001  # it is the coroutine's
                self.cancelled = self.cancelled or isinstance(error, asyncio.CancelledError)
                go_on = partial(self._work.throw, error)
