"""The log of a process: one line on stderr for each event, with the trace and the job that it belongs to.

Everything that is logged by `logging` is written here, and `extra` becomes fields. A line names the trace in which it
was written and, inside a workflow or an activity, the job and the attempt: see runtime.temporal_log. No line of the
suite holds a prompt, an output or a secret.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from traceback import format_tb
from typing import Any, Final, Literal

from opentelemetry import trace
from pydantic_settings import BaseSettings, SettingsConfigDict

_NO_FIELDS: Final = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "temporal_log"})
"""Attributes of every record, and the one in which Temporal's core repeats its message."""
_added: Final[list[Callable[[], Mapping[str, Any]]]] = []
"""What add_fields has added."""


class LogSettings(BaseSettings):
    """The log of every process of the suite, on stderr."""

    model_config = SettingsConfigDict(env_prefix="LOG_", frozen=True, use_attribute_docstrings=True)

    format: Literal["auto", "json", "text"] = "auto"
    """`json` for one JSON object a line, `text` for people. `auto` is text on a terminal and JSON anywhere else."""
    level: Literal["INFO", "WARNING", "ERROR"] = "INFO"
    """Minimum level of what is logged: INFO, WARNING or ERROR. DEBUG is not allowed, because libraries log what they
    send there: outputs, passwords."""


def configure(settings: LogSettings) -> None:
    """Log everything of this process, Python's warnings included, to stderr in the format of the settings."""
    logging.basicConfig(level=settings.level, handlers=[new_handler(settings)])
    logging.captureWarnings(True)


def redact_errors() -> None:
    """From now on log the type of an exception and where it was raised, without its message: it may quote content."""
    for formatter in _formatters():
        formatter.redacts = True


def redacts_errors() -> bool:
    """Return whether the log leaves out the messages of exceptions: see redact_errors."""
    return any(formatter.redacts for formatter in _formatters())


def add_fields(fields: Callable[[], Mapping[str, Any]]) -> None:
    """From now on add what `fields()` returns to every line. A call with the same function adds nothing."""
    if fields not in _added:
        _added.append(fields)


def new_handler(settings: LogSettings | None = None) -> logging.Handler:
    """Return a handler that writes to stderr in the format of the settings, by default those of the environment.

    It is also for libraries that log in processes of their own: see services/gpu_worker/engines/vllm_logging.json.
    """
    settings = settings or LogSettings()
    as_json = settings.format == "json" or (settings.format == "auto" and not sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(settings.level)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    return handler


class _Formatter(logging.Formatter):
    redacts = False
    """Whether the messages of exceptions are left out."""

    def message(self, record: logging.LogRecord) -> str:
        """Return the record's message."""
        text = record.getMessage()
        for error in _chain(record.exc_info[1] if self.redacts and record.exc_info else None):
            text = text.replace(str(error), type(error).__qualname__) if str(error) else text
        return text

    def formatException(self, ei: Any) -> str:  # noqa: N802  # the name that logging calls
        """See logging.Formatter."""
        if not self.redacts:
            return super().formatException(ei)
        return "\n".join(
            f"{type(error).__module__}.{type(error).__qualname__}\n{''.join(format_tb(error.__traceback__))}".rstrip()
            for error in _chain(ei[1])
        )


def _formatters() -> Iterator[_Formatter]:
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, _Formatter):
            yield handler.formatter


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the exception, what caused it, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


class JsonFormatter(_Formatter):
    """One JSON object: time, level, logger, message, the fields, and the traceback of an exception as one text."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        line = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": self.message(record),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(_Formatter):
    """A line of text for people: the fields follow the message, a traceback has lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        line = f"{_time(record)} {record.levelname} {record.name}: {self.message(record)}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        fields["trace_id"] = trace.format_trace_id(span.trace_id)
    for add in _added:
        fields |= add()
    given = {name: value for name, value in vars(record).items() if name not in _NO_FIELDS and name[0] != "_"}
    return fields | given
