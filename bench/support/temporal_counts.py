"""Temporal's own counts of calls of its API, and of writes of workflows to its database and to its visibility store."""

import asyncio
import re
from collections import Counter
from typing import Final, NamedTuple

import aiohttp
from temporalio.api.workflowservice.v1 import ListSchedulesRequest
from temporalio.client import Client

from deploy.local.stack import Stack

_LINE: Final = re.compile(
    r"^(?P<name>service|persistence|visibility_persistence)_requests\{(?P<labels>[^}]*)\} (?P<value>\S+)$", re.MULTILINE
)
_LABEL: Final = re.compile(r'(\w+)="([^"]*)"')
_WRITES: Final = ("CreateWorkflowExecution", "UpdateWorkflowExecution")
_VISIBILITY_WRITES: Final = (
    "RecordWorkflowExecutionStarted",
    "UpsertWorkflowExecution",
    "RecordWorkflowExecutionClosed",
)
_MARK: Final = "ListSchedules"
"""A call that only this module makes."""
_REPORTS_SECONDS: Final = 1.0
_PASSES: Final = 3
"""Number of marks. Once a second Temporal reports its counters, one after another in any order. A count from before a
mark may be missing in the pass that reports the mark, and come in the next pass. A third mark shows that this pass has
ended."""


class Counts(NamedTuple):
    """What a server has counted so far."""

    calls: Counter[str]
    """By operation."""
    writes: int
    """Transactions that create or change a workflow."""
    visibility_writes: int


class TemporalCounts:
    """The counts of the Temporal server of a stack."""

    def __init__(self, stack: Stack) -> None:
        self._url = stack.metrics_url("temporal")

    async def settled(self, client: Client) -> Counts:
        """Return the counts until now."""
        for _ in range(_PASSES):
            counts = await self._marked(client)
        del counts.calls[_MARK]
        return counts

    async def _marked(self, client: Client) -> Counts:
        """Make a call of _MARK, and return the counts that include it."""
        marked = (await self._read()).calls[_MARK]
        await client.workflow_service.list_schedules(ListSchedulesRequest(namespace=client.namespace))
        async with asyncio.timeout(20 * _REPORTS_SECONDS):
            while (counts := await self._read()).calls[_MARK] == marked:  # noqa: ASYNC110  # it is another process's
                await asyncio.sleep(_REPORTS_SECONDS / 4)
        return counts

    async def _read(self) -> Counts:
        async with aiohttp.ClientSession() as session, session.get(self._url) as answer:
            text = await answer.text()
        calls, writes, visibility_writes = Counter[str](), 0, 0
        for line in _LINE.finditer(text):
            labels = dict(_LABEL.findall(line["labels"]))
            if line["name"] == "service":
                if labels["service_name"] == "frontend" and labels["namespace"] == "default":
                    calls[labels["operation"]] += int(line["value"])
            elif labels["operation"] in _WRITES:
                writes += int(line["value"])
            elif labels["operation"] in _VISIBILITY_WRITES:
                visibility_writes += int(line["value"])
        return Counts(calls, writes, visibility_writes)
