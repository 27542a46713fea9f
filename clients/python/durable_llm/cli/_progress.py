"""How a job stands, on standard error: a live line on a terminal, otherwise a line for each change."""

import logging
import os
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from durable_llm._enums import name_of
from durable_llm.cli._stdout import on_terminal
from durable_llm.cli._text import say, visible

if TYPE_CHECKING:
    from llm_pb.llm_pb2 import JobStatus


class Progress(logging.Handler):
    """Shows a job's states, and what the client logs of broken connections, while the context is open."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__(logging.INFO)
        self._quiet = quiet
        self._state = ""
        self._gave_way = False
        self._said: set[str] = set()
        """What was said of tries that have failed since the service last answered."""
        self._live: Any = None
        if not quiet and sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
            from rich.console import Console

            self._live = Console(stderr=True, highlight=False).status("")

    def __enter__(self) -> Self:
        logger = logging.getLogger("durable_llm")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        if not self._quiet:
            logger.addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger("durable_llm").removeHandler(self)
        if self._live is not None:
            self._live.stop()

    def show(self, status: "JobStatus") -> None:
        """Show how the job stands."""
        if self._quiet:
            return
        state = _describe(status)
        if self._gave_way:
            # Text that waits for a worker again would look as if the command hung.
            if state != self._state and state_name(status.state) == "QUEUED":
                say("\n" + visible(_details(status, state)))
        elif self._live is not None:
            from rich.markup import escape

            self._live.update(escape(visible(_details(status, state))))
            self._live.start()
        elif state != self._state:
            say(state)
        self._state = state

    def give_way(self) -> None:
        """Show no more states, but that the job is queued again, if they and its text mix on a terminal."""
        if not (on_terminal() and sys.stderr.isatty()):
            return
        if self._live is not None:
            self._live.stop()
        self._gave_way = True

    def answered(self) -> None:
        """Note that the service has answered: what breaks from here on is said again."""
        self._said.clear()

    def emit(self, record: logging.LogRecord) -> None:
        """Show what the client logs of a try that has failed, once until the service has answered."""
        what, line = _in_words(record)
        if what in self._said:
            return
        self._said.add(what)
        # The text may have left the cursor in the middle of a line.
        say("\n" * self._gave_way + visible(line))


def _in_words(record: logging.LogRecord) -> tuple[str, str]:
    """Return what has failed, and a line with what follows. gRPC's own errors are for developers."""
    from durable_llm.errors import ApiError

    match record.args:
        case (ApiError(reason="") as error, then, _) if error.retry_delay is None:
            what = "the service does not answer"
            return what, f"{what}; {then} once it does"
        case (error, *_):
            return str(error), record.getMessage()
    return record.msg, record.getMessage()


def state_name(state: Any) -> str:
    """Return the short name of a JobState."""
    from llm_pb.llm_pb2 import JobState

    return name_of(JobState, state, "JOB_STATE_")


def class_name(job_class: Any) -> str:
    """Return the short name of a JobClass."""
    from llm_pb.common_pb2 import JobClass

    return name_of(JobClass, job_class, "JOB_CLASS_")


def _describe(status: "JobStatus") -> str:
    name = state_name(status.state)
    return f"{name}, attempt {status.attempt}" if name == "RUNNING" and status.attempt else name


def _details(status: "JobStatus", state: str) -> str:
    if status.HasField("queue") and status.queue.backlog:
        return f"{state}, {status.queue.backlog} in the queue"
    progress = status.progress
    if progress.output_tokens:
        state = f"{state}, {progress.stage}" if progress.stage == "paused" else state
        return f"{state}, {progress.output_tokens} tokens, {progress.percent:.0f} %"
    return f"{state}, {progress.stage}" if progress.stage else state
