"""The sweepers of the store go on after whatever ends one of their sweeps."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from services.gateway.batches.sweeping import BatchSweeper
from services.gateway.files.removal import Sweeper
from services.gateway.settings import GatewaySettings
from services.trainer.settings import TrainerSettings
from services.trainer.sweeping import TrainingSweeper
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


class _NoBatches:
    """A client of Temporal that lists no workflow."""

    async def list_workflows(self, query: str) -> AsyncGenerator[Any, None]:
        for item in ():
            yield item


OFTEN = timedelta(milliseconds=10)
SWEEPERS: dict[str, Callable[[Any, Path], Any]] = {
    "files": lambda store, _: Sweeper(store, None, None, GatewaySettings(file_sweep_interval=OFTEN)),  # type: ignore[arg-type]
    "batches": lambda store, _: BatchSweeper(_NoBatches(), store, GatewaySettings(file_sweep_interval=OFTEN)),  # type: ignore[arg-type]
    "trainings": lambda store, folder: TrainingSweeper(
        None,  # type: ignore[arg-type]
        store,
        TrainerSettings(sweep_interval=OFTEN, work_dir=folder),
    ),
}


@pytest.mark.parametrize("kind", SWEEPERS)
async def test_an_error_that_nobody_expects_is_logged_and_the_next_sweep_comes(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One in the sweep of batches ended the gateway, one in that of trainings the trainer."""
    store = _Broken()
    sweeping = asyncio.create_task(SWEEPERS[kind](store, tmp_path).keep_sweeping())
    waiting = asyncio.create_task(store.listed_again.wait())
    await asyncio.wait({sweeping, waiting}, timeout=60, return_when=asyncio.FIRST_COMPLETED)
    assert not sweeping.done(), "the sweeper has ended"
    assert store.listed_again.is_set()
    assert "of a library" in caplog.text
    sweeping.cancel()
    await asyncio.gather(sweeping, return_exceptions=True)
