"""How many jobs wait and run, for metrics: counted now and then, for no call waits for it.

Temporal's visibility store knows how many jobs of a model have not ended, the model's task queue how many of them no
worker has. Visibility takes few requests (10 a second for all gateways by default), and List needs them, too: so the
models are counted in turn, one a second at most.
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
_LEAST_PAUSE: Final = timedelta(seconds=1)
_TIMEOUT: Final = timedelta(seconds=3)
"""Short: what was counted last stands until the next answer is given up."""


class OpenJobs:
    """A gauge of the jobs that have not ended, by model and state. What could not be counted lately is absent."""

    def __init__(self, client: Client, models: Models, meter: Meter) -> None:
        self._client = client
        self._models = models
        self._counted: dict[str, tuple[int, int]] = {}
        """By model: how many are queued, and how many are not."""
        meter.create_observable_gauge(
            "llm.job.open",
            [self._observe],
            "{job}",
            "Number of jobs that have not ended, queued or running. Every gateway counts all of them.",
        )

    async def keep_counting(self, interval: timedelta) -> None:
        """Count each model once in an interval, until cancelled; never when it is zero."""
        models = self._models.with_own_queue() if interval else []
        try:
            for model in itertools.cycle(models):
                await self._count(model)
                await asyncio.sleep(max(interval / len(models), _LEAST_PAUSE).total_seconds())
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
        # The queue also holds, for a while, jobs that gave up waiting.
        queued = min(queue.backlog, found.count)
        self._counted[model.name] = (queued, found.count - queued)

    def _observe(self, _: CallbackOptions) -> Iterable[Observation]:
        for model, counts in [*self._counted.items()]:
            for state, count in zip(("queued", "running"), counts, strict=True):
                yield Observation(count, {"gen_ai.request.model": model, "llm.job.state": state})
