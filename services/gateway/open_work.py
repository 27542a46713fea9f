"""Counts the batches and pipelines that have not ended, for metrics: see services.gateway.open_jobs.

Each kind is one list of visibility per interval, of up to 1,000 workflows a page.
"""

import asyncio
import logging
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final

from opentelemetry.metrics import CallbackOptions, Meter, Observation
from temporalio.client import Client, WorkflowExecution
from temporalio.service import RPCError, RPCStatusCode

from encryption import KeysUnavailable
from jobs import names
from jobs.memo import time_from_memo
from payload_converter import PayloadError
from runtime.temporal import RPC_TIMEOUT
from services.gateway.pace import Pace

_log = logging.getLogger(__name__)
_WORKFLOW_TYPES: Final = {"batch": names.BATCH_WORKFLOW_TYPE, "pipeline": names.PIPELINE_WORKFLOW_TYPE}


class OpenWork:
    """Gauges of the batches or the pipelines that have not ended. They are absent while Temporal does not list them."""

    def __init__(self, client: Client, meter: Meter, kind: str) -> None:
        """`kind` is "batch" or "pipeline"."""
        self._client = client
        self._query = f"WorkflowType = '{_WORKFLOW_TYPES[kind]}' AND ExecutionStatus = 'Running'"
        self._name = {"batch": "batches", "pipeline": "pipelines"}[kind]
        self._created: list[datetime] | None = None
        """When each of them was created."""
        meter.create_observable_gauge(
            f"llm.{kind}.open",
            [self._observe_open],
            f"{{{kind}}}",
            f"Number of {self._name} that have not ended. Every gateway counts all of them.",
        )
        meter.create_observable_gauge(
            f"llm.{kind}.oldest.age",
            [self._observe_age],
            "s",
            f"Time since the oldest of the {self._name} that have not ended was created. 0 without one.",
        )

    async def keep_counting(self, interval: timedelta) -> None:
        """Count once per interval, until cancelled, and less often while Temporal refuses it.

        An interval of zero counts none.
        """
        pace = Pace(interval)
        while interval:
            accepted = True
            try:
                listed = self._client.list_workflows(self._query, page_size=1000, rpc_timeout=RPC_TIMEOUT)
                self._created = [await _created(execution) async for execution in listed]
            except RPCError as error:
                _log.warning("the open %s cannot be counted: %s %s", self._name, error.status.name, error)
                self._created = None
                accepted = error.status != RPCStatusCode.RESOURCE_EXHAUSTED
            await asyncio.sleep(pace.after(accepted=accepted))

    def _observe_open(self, _: CallbackOptions) -> Iterable[Observation]:
        if self._created is not None:
            yield Observation(len(self._created))

    def _observe_age(self, _: CallbackOptions) -> Iterable[Observation]:
        if self._created is not None:
            now = datetime.now(UTC)
            yield Observation(max((now - min(self._created, default=now)).total_seconds(), 0.0))


async def _created(execution: WorkflowExecution) -> datetime:
    """Return when a batch or pipeline was created. A long batch has run in several runs of its workflow."""
    try:
        created = time_from_memo(await execution.memo_value(names.MEMO_CREATE_TIME, None))
    except (PayloadError, KeysUnavailable):
        created = None
    return execution.start_time if created is None else created.ToDatetime(UTC)
