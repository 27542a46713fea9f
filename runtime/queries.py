"""Queries of workflows. One that a gateway refuses because it came at the wrong moment is asked again."""

from typing import Any, Final

from temporalio.client import Interceptor, OutboundInterceptor, QueryWorkflowInput, WorkflowQueryFailedError

EARLY: Final = "the query came with events for which no workflow task has started"
"""The error of a query that services.gateway.workflow_runner refuses."""
_TRIES: Final = 8
"""A workflow gets the events with its next task, and answers with it."""


class AskingAgain(Interceptor):
    """Asks a workflow again that could not answer because of early events."""

    def intercept_client(self, next: OutboundInterceptor) -> OutboundInterceptor:  # noqa: A002
        """Return what asks."""
        return _Asking(next)


class _Asking(OutboundInterceptor):
    async def query_workflow(self, input: QueryWorkflowInput) -> Any:  # noqa: A002
        for _ in range(_TRIES - 1):
            try:
                return await super().query_workflow(input)
            except WorkflowQueryFailedError as error:
                if error.message != EARLY:
                    raise
        return await super().query_workflow(input)
