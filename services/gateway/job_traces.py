"""The trace that a job belongs to, and the link to it from a later call's own."""

from typing import Final

from temporalio.client import WorkflowExecution

from jobs import names
from runtime.telemetry import link_to

_WORKFLOW_ID: Final = "temporalWorkflowID"
"""The attribute that Temporal's own spans have, too."""


async def traceparent_of(execution: WorkflowExecution) -> str:
    """Return the W3C traceparent of the Submit that started the job; empty for a job without."""
    traceparent = await execution.memo_value(names.MEMO_TRACEPARENT, "")
    # Whoever starts a workflow by hand may have written anything.
    return traceparent if isinstance(traceparent, str) else ""


async def link_call(execution: WorkflowExecution) -> None:
    """Link the current call's span to the job's trace, where its own is another one."""
    link_to(await traceparent_of(execution), {_WORKFLOW_ID: execution.id})
