"""Counts the jobs that wait and run, for metrics. No call waits for it, so it counts periodically.

Temporal's visibility store knows how many jobs of a model have not ended. The model's task queue knows how many of them
wait for a worker. Visibility accepts few requests (10 a second for all gateways by default), and List needs them, too.
So the models are counted in turn, at most one a second.
"""

import asyncio
import itertools
import logging
from collections.abc import Iterable
from datetime import timedelta
from typing import Final

from opentelemetry.metrics import CallbackOptions, Meter, Observation
from temporalio.api.workflowservice.v1 import CountWorkflowExecutionsRequest
from temporalio.client import Client
from temporalio.service import RPCError

from jobs import names
from services.gateway.models import Models
from services.gateway.settings import Model

_log = logging.getLogger(__name__)
_MIN_PAUSE: Final = timedelta(seconds=1)
_TIMEOUT: Final = timedelta(seconds=3)
"""Timeout of a count. It is short, because the last count stays until the next one has failed."""


class OpenJobs:
    """A gauge of the jobs that have not ended, by model and state. A model whose last count failed is absent."""

    def __init__(self, client: Client, models: Models, meter: Meter) -> None:
        self._client = client
        self._models = models
        self._counted: dict[str, tuple[int, int]] = {}
        """Number of queued jobs and of the others, by model."""
        meter.create_observable_gauge(
            "llm.job.open",
            [self._observe],
            "{job}",
            "Number of jobs that have not ended, queued or running. Every gateway counts all of them.",
        )

    async def keep_counting(self, interval: timedelta) -> None:
        """Count each model once per interval, until cancelled. An interval of zero counts none."""
        models = self._models.with_own_queue() if interval else []
        try:
            for model in itertools.cycle(models):
                await self._count(model)
                await asyncio.sleep(max(interval / len(models), _MIN_PAUSE).total_seconds())
        finally:
            self._counted.clear()

    async def _count(self, model: Model) -> None:
        jobs = f"WorkflowType = '{names.JOB_WORKFLOW_TYPE}' AND Model = '{model.name}' AND ExecutionStatus = 'Running'"
        try:
            # Not the client's count_workflows: that tries again for ten seconds.
            found = await self._client.workflow_service.count_workflow_executions(
                CountWorkflowExecutionsRequest(namespace=self._client.namespace, query=jobs), timeout=_TIMEOUT
            )
            queue = await self._models.queue_state(self._client, model.queue)
        except RPCError as error:
            if self._counted.pop(model.name, None) is not None:
                _log.warning("the open jobs of %s cannot be counted: %s %s", model.name, error.status.name, error)
            return
        # The queue still holds, for a while, jobs whose wait has timed out.
        queued = min(queue.backlog, found.count)
        self._counted[model.name] = (queued, found.count - queued)

    def _observe(self, _: CallbackOptions) -> Iterable[Observation]:
        for model, counts in [*self._counted.items()]:
            for state, count in zip(("queued", "running"), counts, strict=True):
                yield Observation(count, {"gen_ai.request.model": model, "llm.job.state": state})
