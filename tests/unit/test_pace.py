"""A gateway that Temporal refuses asks less often: see services.gateway.pace."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from opentelemetry.metrics import NoOpMeterProvider
from temporalio.service import RPCError, RPCStatusCode

from services.gateway.open_work import OpenWork
from services.gateway.pace import Pace


def test_refusals_make_the_pause_longer_and_acceptance_shorter() -> None:
    """It doubles, up to a minute, and shrinks by a tenth, down to the interval."""
    pace = Pace(timedelta(seconds=15))
    assert [pace.after(accepted=False) for _ in range(3)] == [30, 60, 60]
    assert pace.after(accepted=True) == 54
    assert [pace.after(accepted=True) for _ in range(20)][-1] == 15


def test_an_interval_beyond_a_minute_does_not_grow() -> None:
    assert Pace(timedelta(minutes=5)).after(accepted=False) == 300


class Refusing:
    """A client of Temporal whose lists are refused."""

    def __init__(self, status: RPCStatusCode) -> None:
        self.status = status
        self.lists = 0

    def list_workflows(self, *_: Any, **__: Any) -> Any:
        self.lists += 1
        raise RPCError("scripted", self.status, b"")


@pytest.mark.parametrize("kind", ["batch", "pipeline"])
async def test_open_work_is_listed_less_often_while_it_is_refused(kind: str) -> None:
    """Because of a limit alone: a Temporal that is away is asked again after the interval."""
    lists = []
    for status in (RPCStatusCode.RESOURCE_EXHAUSTED, RPCStatusCode.UNAVAILABLE):
        client: Any = Refusing(status)
        work = OpenWork(client, NoOpMeterProvider().get_meter("test"), kind)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await work.keep_counting(timedelta(milliseconds=10))
        lists.append(client.lists)
    # 10 + 20 + 40 + 80 + 160 ms are more than 300 ms.
    assert lists[0] <= 5 < lists[1]
