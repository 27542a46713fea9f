"""LLMRedeliveryWorkflow: says that a job was sent again a moment ago, to whichever gateway wants to send it again.

Temporal accepts one open workflow of an id. The RPC Redeliver starts this one under an id of the job, with the minimum
time between two calls as its start delay. While it is open, no gateway can start another one.
"""

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from jobs import names


@workflow.defn(name=names.REDELIVERY_WORKFLOW_TYPE)
class LLMRedeliveryWorkflow:
    """Ends as soon as it runs: its start was delayed until the next Redeliver is allowed."""

    @workflow.run
    async def run(self) -> None:
        """Return immediately."""
