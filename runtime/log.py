"""The log of a process: one line on stderr for each event, with the trace and the job that it belongs to.

Everything that is logged by `logging` is written here, and `extra` becomes fields. A line names the trace in which it
was written and, inside a workflow or an activity, the job and the attempt. No line of the suite holds a prompt, an
output or a secret.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Final, Literal

from opentelemetry import trace
from pydantic_settings import BaseSettings, SettingsConfigDict
from temporalio import activity, workflow
from temporalio.exceptions import ApplicationError
from temporalio.runtime import LogForwardingConfig, LoggingConfig

_NO_FIELDS: Final = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "temporal_log"})
"""Attributes of every record, and the one in which Temporal's core repeats its message."""


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
    logging.getLogger(activity.logger.logger.name).addFilter(_shorten_failure)
    # The fields have what they would add to the message.
    workflow.logger.workflow_info_on_message = workflow.logger.workflow_info_on_extra = False
    activity.logger.activity_info_on_message = activity.logger.activity_info_on_extra = False


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


def core_logging() -> LoggingConfig:
    """Return the settings that forward the log of Temporal's core, which is not Python, to `logging`."""
    forwarding = LogForwardingConfig(logging.getLogger("temporalio.core"), prepend_target_on_message=False)
    return LoggingConfig(filter=LoggingConfig.default.filter, forwarding=forwarding)


def _shorten_failure(record: logging.LogRecord) -> bool:
    """Remove the traceback from what Temporal's library logs about an activity that has failed on purpose.

    Such a failure is an outcome: the model's device was out of memory, for example. Any other exception is a fault and
    keeps its traceback.
    """
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, ApplicationError):
        record.msg, record.args = f"{record.msg}: {error.type}: {error.message}", None
        record.exc_info = None
    return True


class JsonFormatter(logging.Formatter):
    """One JSON object: time, level, logger, message, the fields, and the traceback of an exception as one text."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        line = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """A line of text for people: the fields follow the message, a traceback has lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        line = f"{_time(record)} {record.levelname} {record.name}: {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        fields["trace_id"] = trace.format_trace_id(span.trace_id)
    if activity.in_activity():
        run = activity.info()
        fields |= {"workflow_id": run.workflow_id, "run_id": run.workflow_run_id, "attempt": run.attempt}
    elif workflow.in_workflow():
        info = workflow.info()
        fields |= {"workflow_id": info.workflow_id, "run_id": info.run_id}
    given = {name: value for name, value in vars(record).items() if name not in _NO_FIELDS and name[0] != "_"}
    return fields | given
