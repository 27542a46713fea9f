"""How tests wait for deliveries."""

import asyncio
from collections.abc import Callable

from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub

QUICK = {"max_tokens": 1}


async def deliveries(stub: LlmServiceStub, workflow_id: str) -> list[llm_pb2.Delivery]:
    request = llm_pb2.ListDeliveriesRequest(workflow_id=workflow_id)
    return [*(await stub.ListDeliveries(request)).deliveries]


async def until(
    stub: LlmServiceStub, workflow_id: str, holds: Callable[[list[llm_pb2.Delivery]], bool]
) -> list[llm_pb2.Delivery]:
    """Return the delivery log once the condition holds. This polls, because nothing but the receiver is notified."""
    async with asyncio.timeout(90):
        while not holds(log := await deliveries(stub, workflow_id)):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    return log


def settled(log: list[llm_pb2.Delivery]) -> bool:
    return all(item.state != llm_pb2.NOTIFY_STATE_PENDING for item in log)


async def exists(temporal: Client, workflow_id: str) -> bool:
    try:
        await temporal.get_workflow_handle(workflow_id).describe()
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise
        return False
    return True
