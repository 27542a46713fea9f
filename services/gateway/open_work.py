"""Counts the batches and pipelines that have not ended, for metrics: see services.gateway.open_jobs.

Each kind is one page of visibility's list per interval, of up to 1,000 workflows. Where more have not ended, a count
says how many, and the pages of one interval after the other lead to the oldest: visibility lists those first whose
present runs began last. The age is that of the oldest on the last page, so it is too low until the walk has ended, and
of a batch that has gone on in a new run since.
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
_MOST: Final = 1000
_WORKFLOW_TYPES: Final = {"batch": names.BATCH_WORKFLOW_TYPE, "pipeline": names.PIPELINE_WORKFLOW_TYPE}


class OpenWork:
    """Gauges of the batches or the pipelines that have not ended. They are absent while Temporal does not list them."""

    def __init__(self, client: Client, meter: Meter, kind: str, most: int = _MOST) -> None:
        """`kind` is "batch" or "pipeline", `most` the size of a page."""
        self._client = client
        self._query = f"WorkflowType = '{_WORKFLOW_TYPES[kind]}' AND ExecutionStatus = 'Running'"
        self._name = {"batch": "batches", "pipeline": "pipelines"}[kind]
        self._most = most
        self._count: int | None = None
        self._oldest: datetime | None = None
        """When the oldest of those that were seen last was created; None without one."""
        self._started_until: datetime | None = None
        """Only those whose runs started until then are listed. None: all are."""
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
            f"Time since the oldest of the {self._name} that have not ended was created; where more than {most:,} have "
            f"not, the oldest of {most:,}: each interval looks at earlier ones. 0 without one.",
        )

    async def keep_counting(self, interval: timedelta) -> None:
        """Count once per interval, until cancelled, and less often while Temporal refuses it.

        An interval of zero counts none.
        """
        pace = Pace(interval)
        while interval:
            accepted = True
            try:
                await self._look()
            except RPCError as error:
                _log.warning("the open %s cannot be counted: %s %s", self._name, error.status.name, error)
                self._count = None
                accepted = error.status != RPCStatusCode.RESOURCE_EXHAUSTED
            await asyncio.sleep(pace.after(accepted=accepted))

    async def _look(self) -> None:
        """Count all, and find the oldest among a page of them. Raises RPCError."""
        if not (found := await self._page()) and self._started_until is not None:
            # All of them have ended.
            self._started_until = None
            found = await self._page()
        created = [await _created(execution) for execution in found]
        if self._started_until is None and len(found) < self._most:
            count = len(found)
        else:
            count = (await self._client.count_workflows(self._query, rpc_timeout=RPC_TIMEOUT)).count
        self._count, self._oldest = count, min(created, default=None)
        if count < self._most:
            self._started_until = None
        elif len(found) == self._most:
            # Temporal's times are finer than Python's.
            self._started_until = min(execution.start_time for execution in found) + timedelta(milliseconds=1)

    async def _page(self) -> list[WorkflowExecution]:
        query = self._query
        if self._started_until is not None:
            query += f" AND StartTime <= '{self._started_until.isoformat()}'"
        listed = self._client.list_workflows(query, page_size=self._most, limit=self._most, rpc_timeout=RPC_TIMEOUT)
        return [execution async for execution in listed]

    def _observe_open(self, _: CallbackOptions) -> Iterable[Observation]:
        if self._count is not None:
            yield Observation(self._count)

    def _observe_age(self, _: CallbackOptions) -> Iterable[Observation]:
        if self._count is not None:
            now = datetime.now(UTC)
            yield Observation(max((now - (self._oldest or now)).total_seconds(), 0.0))


async def _created(execution: WorkflowExecution) -> datetime:
    """Return when a batch or pipeline was created. A long batch has run in several runs of its workflow."""
    try:
        created = time_from_memo(await execution.memo_value(names.MEMO_CREATE_TIME, None))
    except (PayloadError, KeysUnavailable):
        created = None
    return execution.start_time if created is None else created.ToDatetime(UTC)
