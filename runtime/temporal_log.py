"""What Temporal adds to the log of a process: the fields of the run that logs, and the records of its library."""

import logging
from collections.abc import Mapping
from typing import Any, Final

from temporalio import activity, workflow
from temporalio.exceptions import ApplicationError
from temporalio.runtime import LogForwardingConfig, LoggingConfig

from runtime import log


def configure() -> None:
    """Add the job and the attempt to what is logged inside a workflow or an activity, and shorten known failures."""
    logging.getLogger(activity.logger.logger.name).addFilter(_SHORTENING)
    # The fields have what they would add to the message.
    workflow.logger.workflow_info_on_message = workflow.logger.workflow_info_on_extra = False
    activity.logger.activity_info_on_message = activity.logger.activity_info_on_extra = False
    log.add_fields(_fields)


def core_logging() -> LoggingConfig:
    """Return the settings that forward the log of Temporal's core, which is not Python, to `logging`."""
    forwarding = LogForwardingConfig(logging.getLogger("temporalio.core"), prepend_target_on_message=False)
    return LoggingConfig(filter=LoggingConfig.default.filter, forwarding=forwarding)


class _Shortening(logging.Filter):
    """Removes the traceback from what Temporal's library logs about an activity that has failed on purpose.

    Such a failure is an outcome: the model's device was out of memory, for example. Any other exception is a fault and
    keeps its traceback.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """See logging.Filter."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, ApplicationError):
            message = "" if log.redacts_errors() else f": {error.message}"
            record.msg, record.args = f"{record.msg}: {error.type}{message}", None
            record.exc_info = None
        return True


_SHORTENING: Final = _Shortening()


def _fields() -> Mapping[str, Any]:
    if activity.in_activity():
        run = activity.info()
        return {"workflow_id": run.workflow_id, "run_id": run.workflow_run_id, "attempt": run.attempt}
    if workflow.in_workflow():
        info = workflow.info()
        return {"workflow_id": info.workflow_id, "run_id": info.run_id}
    return {}
