"""The rates of the models' task queues: how many jobs a second Temporal gives to all workers together.

A class has a rate at each gateway: see services.gateway.quotas.class_rates. Temporal keeps one for a queue, so that
of a queue is the sum of its classes'. Where one of them has no rate, neither has the queue.
"""

import asyncio
import logging
from collections.abc import Mapping
from datetime import timedelta
from math import isclose
from typing import Final

from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest, UpdateTaskQueueConfigRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from jobs.classes import NAMES, queue_of
from runtime.temporal import RPC_TIMEOUT
from services.gateway.settings import GatewaySettings

_log = logging.getLogger(__name__)
REASON: Final = "GATEWAY_CLASSES"
"""Reason that Temporal keeps with a gateway's rate. A rate with another reason is an operator's, and stays."""

_INTERVAL: Final = timedelta(seconds=30)
"""Interval of further tries."""
_REFUSALS: Final = (RPCStatusCode.UNIMPLEMENTED, RPCStatusCode.PERMISSION_DENIED, RPCStatusCode.INVALID_ARGUMENT)
"""A server that knows no rates, or does not let the gateway set them, will not do so later."""


async def set_queue_rates(client: Client, settings: GatewaySettings) -> None:
    """Set the rates of all queues; remove those that the settings had before. What fails is tried again."""
    left = dict(queue_rates(settings))
    while left:
        for queue, rate in tuple(left.items()):
            try:
                await _set(client, queue, rate)
            except RPCError as error:
                # The gateways keep their own rates. Temporal's are a second line.
                _log.warning("the rate of the queue %s cannot be set: %s %s", queue, error.status.name, error)
                if error.status not in _REFUSALS:
                    continue
            del left[queue]
        if left:
            await asyncio.sleep(_INTERVAL.total_seconds())


def queue_rates(settings: GatewaySettings) -> Mapping[str, float | None]:
    """Return the rate of each queue, None for one without."""
    rates: dict[str, float | None] = {}
    for model in settings.models:
        for queue in {queue_of(model.queue, job_class) for job_class in NAMES}:
            of_classes = [settings.classes.of(one).rate for one in NAMES if queue_of(model.queue, one) == queue]
            known = [rate for rate in of_classes if rate is not None]
            rates[queue] = sum(known) if len(known) == len(of_classes) else None
    return rates


async def _set(client: Client, queue: str, rate: float | None) -> None:
    kind = TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY
    described = await client.workflow_service.describe_task_queue(
        DescribeTaskQueueRequest(
            namespace=client.namespace, task_queue=TaskQueue(name=queue), task_queue_type=kind, report_config=True
        ),
        retry=True,
        timeout=RPC_TIMEOUT,
    )
    present = described.config.queue_rate_limit
    has = present.rate_limit.requests_per_second if present.HasField("rate_limit") else None
    # Temporal keeps a float of 32 bits.
    same = has is rate is None or (has is not None and rate is not None and isclose(has, rate, rel_tol=1e-6))
    if same or (has is not None and present.metadata.reason != REASON):
        return
    request = UpdateTaskQueueConfigRequest(
        namespace=client.namespace, identity=client.identity, task_queue=queue, task_queue_type=kind
    )
    request.update_queue_rate_limit.reason = REASON
    if rate is not None:
        request.update_queue_rate_limit.rate_limit.requests_per_second = rate
    await client.workflow_service.update_task_queue_config(request, retry=True, timeout=RPC_TIMEOUT)
    _log.info("the rate of the queue %s is %s", queue, "not limited" if rate is None else f"{rate:g} a second")
