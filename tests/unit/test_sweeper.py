"""The sweepers of the store go on after whatever ends one of their sweeps."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from datetime import datetime, timedelta
from typing import Any

import pytest

from services.gateway.batches.sweeping import BatchSweeper
from services.gateway.files.removal import Sweeper
from services.gateway.settings import GatewaySettings
from store.store import ListedObject, StoredObject


class _Broken:
    """A store whose first list ends with an error that nobody expects."""

    def __init__(self) -> None:
        self.lists = 0
        self.listed_again = asyncio.Event()

    def of_tenant(self, tenant: str) -> "_Broken":
        return self

    def new_name(self, prefix: str) -> str:
        raise NotImplementedError

    async def put(self, name: str, pieces: AsyncIterator[bytes]) -> StoredObject:
        raise NotImplementedError

    def read(self, stored: StoredObject, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None]:
        raise NotImplementedError

    async def delete(self, names: Iterable[str]) -> None:
        assert not [*names]

    async def remove_drafts(self, prefix: str, before: datetime) -> None:
        pass

    async def list(self, prefix: str) -> AsyncGenerator[ListedObject, None]:
        self.lists += 1
        if self.lists == 1:
            raise ZeroDivisionError("of a library")
        self.listed_again.set()
        for item in ():
            yield item


class _Temporal:
    """A client whose Temporal has no batches."""

    async def list_workflows(self, query: str) -> AsyncGenerator[Any, None]:
        for item in ():
            yield item


SETTINGS = GatewaySettings(file_sweep_interval=timedelta(milliseconds=10))


@pytest.mark.parametrize("of", ["files", "batches"])
async def test_an_error_that_nobody_expects_is_logged_and_the_next_sweep_comes(
    of: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The gateway would end with its sweeper."""
    store = _Broken()
    sweeper: Sweeper | BatchSweeper = (
        Sweeper(store, None, None, SETTINGS)  # type: ignore[arg-type]
        if of == "files"
        else BatchSweeper(_Temporal(), store, SETTINGS)  # type: ignore[arg-type]
    )
    sweeping = asyncio.create_task(sweeper.keep_sweeping())
    waiting = asyncio.create_task(store.listed_again.wait())
    await asyncio.wait({sweeping, waiting}, timeout=60, return_when=asyncio.FIRST_COMPLETED)
    assert not sweeping.done(), "the sweeper has ended"
    assert store.listed_again.is_set()
    assert "of a library" in caplog.text
    sweeping.cancel()
    await asyncio.gather(sweeping, return_exceptions=True)
