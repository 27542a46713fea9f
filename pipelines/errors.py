"""What a step raises in the code of its pipeline."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from google.protobuf.message import Message
from google.rpc import code_pb2, status_pb2
from temporalio import workflow
from temporalio.exceptions import (
    ActivityError,
    ApplicationError,
    ChildWorkflowError,
    TerminatedError,
    TimeoutError,  # noqa: A004  # the one of Temporal
    is_cancelled_exception,
)

from jobs import names
from jobs.application_errors import from_application_error
from jobs.errors import (
    BY_REASON,
    EngineFailed,
    Terminated,
    TotalTimeout,
    reason_of,
    to_status,
)
from jobs.pipelines import CANCELLED, PROGRAM_ERROR, failure

_T = TypeVar("_T")


class Incomplete(Exception):
    """The pipeline has a part of its result. Raised by its code, it ends the pipeline as failed, with that part."""

    def __init__(self, result: Message, why: str) -> None:
        """`result` is of the type that the pipeline was registered with. `why` names what is missing."""
        super().__init__(why)
        self.result = result


class PipelineNotHere(RuntimeError):
    """The pipeline is not installed at this gateway, and may be at others. It fails the workflow task."""


class StepFailed(Exception):
    """A step has failed, or was cancelled. A pipeline that does not catch it ends with its error."""

    def __init__(self, path: str, status: status_pb2.Status) -> None:
        super().__init__(f"{path}: {status.message}")
        self.path = path
        """The step's path."""
        self.status = status
        """Why, as StepStatus.error but whole."""

    @property
    def reason(self) -> str:
        """The reason, such as RUN_TIMEOUT or BUDGET_SPENT."""
        return reason_of(self.status)


def status_of(error: BaseException) -> status_pb2.Status:
    """Return the status of what has ended a step."""
    if isinstance(error, StepFailed):
        return error.status
    if is_cancelled_exception(error):
        return failure(CANCELLED, "the step was cancelled", code_pb2.CANCELLED)
    cause = _cause(error)
    if isinstance(cause, TimeoutError):
        return to_status(TotalTimeout("the step's time was over"))
    if isinstance(cause, TerminatedError):
        return to_status(Terminated("an operator has terminated the step"))
    if isinstance(cause, ApplicationError):
        if isinstance(error, ChildWorkflowError) and error.workflow_type == names.JOB_WORKFLOW_TYPE:
            return to_status(from_application_error(cause, EngineFailed))
        if (known := BY_REASON.get(cause.type or "")) is not None:
            return to_status(known(cause.message))
        return failure(cause.type or PROGRAM_ERROR, cause.message)
    return failure(PROGRAM_ERROR, described(error))


def is_timeout(error: BaseException) -> bool:
    """Return whether Temporal has ended a step because it took too long."""
    return isinstance(_cause(error), TimeoutError)


def _cause(error: BaseException) -> BaseException | None:
    return error.cause if isinstance(error, ActivityError | ChildWorkflowError) else error


def described(error: BaseException) -> str:
    """Return the class and the words of what the code of a pipeline has raised. Those of its own class may fail."""
    try:
        words = str(error)
    except Exception as second:  # noqa: BLE001  # it is the code's
        words = f"its text cannot be read ({type(second).__name__})"
    return f"{type(error).__name__}: {words}"


async def contained(work: Awaitable[_T]) -> _T:
    """Return what the code of a pipeline returns. Raises RuntimeError for what would end the process: sys.exit()."""
    try:
        return await work
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(described(error)) from error


@asynccontextmanager
async def failing_as(path: str, was_cancelled: Callable[[], bool] = lambda: False) -> AsyncIterator[None]:
    """Raise StepFailed for whatever the body raises, CancelledError if it was cancelled by the pipeline itself.

    A job or an activity that ends well although it was cancelled swallows the cancel. It is raised here.
    `was_cancelled` returns whether there was a cancel that the task no longer tells of.
    """
    before = cancels()
    try:
        yield
    except (Exception, asyncio.CancelledError) as error:
        if is_cancelled_exception(error) and (cancels() > before or was_cancelled()):
            raise asyncio.CancelledError from error
        raise StepFailed(path, status_of(error)) from error
    if cancels() > before or was_cancelled():
        raise asyncio.CancelledError


async def quietly(work: Callable[[], Awaitable[object]]) -> None:
    """Do something whose failure changes nothing, and is seen elsewhere: in the tree, or by who checks later."""
    try:
        await work()
    except Exception as error:  # noqa: BLE001  # see above
        workflow.logger.error("a last step of a pipeline has failed: %s at %s", type(error).__name__, places(error))


def places(error: BaseException) -> str:
    """Return where an exception was raised, the innermost frame last."""
    found, traceback = [], error.__traceback__
    while traceback is not None:
        found.append(f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    return ", ".join(found)


def cancels() -> int:
    """Return how often the current task was cancelled."""
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0
