"""Lists and counts of Temporal's visibility beyond what it accepts."""

import asyncio

from temporalio.api.workflowservice.v1 import CountWorkflowExecutionsRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode


async def until_lists_are_refused(address: str) -> None:
    """Count workflows until Temporal refuses it, as it does beyond its rate."""
    temporal = await Client.connect(address)
    request = CountWorkflowExecutionsRequest(namespace="default", query="WorkflowType = 'None'")
    errors: list[BaseException] = []
    async with asyncio.timeout(60):
        while not errors:
            counts = (temporal.workflow_service.count_workflow_executions(request) for _ in range(200))
            counted = await asyncio.gather(*counts, return_exceptions=True)
            errors = [one for one in counted if isinstance(one, BaseException)]
    assert {isinstance(one, RPCError) and one.status for one in errors} == {RPCStatusCode.RESOURCE_EXHAUSTED}
