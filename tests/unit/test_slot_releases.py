"""The slot of a job that has ended is released, however slow Temporal is."""

import asyncio
from datetime import timedelta
from typing import Any, cast

import pytest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from llm_pb import internal_pb2
from services.gateway.quotas import ledgers
from services.gateway.quotas.ledgers import SlotReleases


class _Temporal:
    """Takes a signal when the test lets it."""

    def __init__(self, *failures: RPCStatusCode) -> None:
        self.failures = [*failures]
        self.released: list[str] = []
        self.may_end = asyncio.Semaphore(0)

    def get_workflow_handle(self, _: str) -> "_Temporal":
        return self

    async def signal(self, _: str, request: internal_pb2.ReleaseRequest, **__: Any) -> None:
        await self.may_end.acquire()
        if self.failures:
            raise RPCError("not now", self.failures.pop(0), b"")
        self.released += request.workflow_ids


async def test_a_slot_that_waits_for_its_group_is_released_after_its_job_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was dropped from the group with its job, and the tenant had a slot less for up to ten minutes."""
    monkeypatch.setattr(ledgers, "_RELEASE_TIMEOUT", timedelta(seconds=0.05))
    temporal = _Temporal()
    releases = SlotReleases(cast("Client", temporal))
    for number in range(3):
        await releases.release("ledger", f"job-{number}", 0)
    assert temporal.released == []
    # The first job's signal, and that of the group behind it.
    temporal.may_end.release()
    temporal.may_end.release()
    async with asyncio.timeout(60):
        while len(temporal.released) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert temporal.released == ["job-0", "job-1", "job-2"]


@pytest.mark.parametrize("failure", [RPCStatusCode.CANCELLED, RPCStatusCode.DEADLINE_EXCEEDED])
async def test_a_slot_is_released_though_the_call_took_longer_than_it_may(failure: RPCStatusCode) -> None:
    """All slots of its group were dropped, up to 500."""
    temporal = _Temporal(failure, failure)
    for _ in range(3):
        temporal.may_end.release()
    await SlotReleases(cast("Client", temporal)).release("ledger", "job", 0)
    assert temporal.released == ["job"]


async def test_a_slot_of_a_ledger_that_is_gone_is_asked_for_once(caplog: pytest.LogCaptureFixture) -> None:
    temporal = _Temporal(RPCStatusCode.NOT_FOUND)
    temporal.may_end.release()
    await SlotReleases(cast("Client", temporal)).release("ledger", "job", 0)
    assert temporal.released == []
    assert "the slot of job was not released" in caplog.text


async def test_a_release_that_no_ledger_takes_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was repeated for ever, and those of the ledger behind it waited. A check of the ledger frees the slot."""
    monkeypatch.setattr(ledgers, "_RETRY", timedelta(0))
    temporal = _Temporal(*[RPCStatusCode.UNAVAILABLE] * 1000)
    for _ in range(1001):
        temporal.may_end.release()
    await SlotReleases(cast("Client", temporal)).release("ledger", "job", 0)
    assert temporal.released == []
    assert len(temporal.failures) == 1000 - ledgers.RELEASE_TRIES
    assert "the slot of job was not released, ledger finds it later" in caplog.text
    # The next one is tried again.
    temporal.failures.clear()
    await SlotReleases(cast("Client", temporal)).release("ledger", "job", 0)
    assert temporal.released == ["job"]
