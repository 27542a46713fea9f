"""The trace that a job belongs to, and the link to it from the trace of a later call."""

from contextlib import suppress
from typing import Final

from temporalio.client import WorkflowExecution

from encryption import KeysUnavailable
from jobs import names
from payload_converter import PayloadError
from runtime.telemetry import link_to

_WORKFLOW_ID: Final = "temporalWorkflowID"
"""Attribute of the link, as in Temporal's own spans."""


async def traceparent_of(execution: WorkflowExecution) -> str:
    """Return the W3C traceparent of the Submit that started the job; empty when it had none."""
    traceparent = await execution.memo_value(names.MEMO_TRACEPARENT, "")
    # A workflow that was started by hand may hold anything.
    return traceparent if isinstance(traceparent, str) else ""


async def link_call(execution: WorkflowExecution) -> None:
    """Link the span of the current call to the trace of the job, unless the trace cannot be decrypted."""
    with suppress(PayloadError, KeysUnavailable):
        link_to(await traceparent_of(execution), {_WORKFLOW_ID: execution.id})
