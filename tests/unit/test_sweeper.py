"""The sweepers of the store go on after whatever ends one of their sweeps."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batches.objects import folder_of
from jobs.ids import tenant_of
from services.gateway.batches.sweeping import BatchSweeper
from services.gateway.files.removal import Sweeper
from services.gateway.settings import GatewaySettings
from services.trainer.settings import TrainerSettings
from services.trainer.sweeping import TrainingSweeper
from store.objects import open_objects
from store.settings import StoreSettings
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


class _Batches:
    """A client of Temporal that lists batches."""

    def __init__(self, *ids: str) -> None:
        self._ids = ids

    async def list_workflows(self, query: str) -> AsyncGenerator[Any, None]:
        assert query == "WorkflowType = 'LLMBatchWorkflow'"
        for id_ in self._ids:
            yield SimpleNamespace(id=id_)


OFTEN = timedelta(milliseconds=10)
SWEEPERS: dict[str, Callable[[Any, Path], Any]] = {
    "files": lambda store, _: Sweeper(store, None, None, GatewaySettings(file_sweep_interval=OFTEN)),  # type: ignore[arg-type]
    "batches": lambda store, _: BatchSweeper(_Batches(), store, GatewaySettings(file_sweep_interval=OFTEN)),  # type: ignore[arg-type]
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


async def test_what_lies_in_the_store_for_batches_that_are_gone_is_removed(tmp_path: Path) -> None:
    """That of others stays, of whatever tenant or pipeline, and what may have been written just now."""
    known = ["llmbatch-u-1", "llmbatch--acme-u-1", "llmpipe-u-1/each"]
    gone = ["llmbatch-u-2", "llmbatch--acme-u-2", "llmbatch-u-3"]
    old = time.time() - 3700

    def write(batch_id: str, name: str, at: float) -> Path:
        path = tmp_path / folder_of(batch_id, tenant_of(batch_id)) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (at, at))
        return path

    kept = [write(id_, name, old) for id_ in known for name in ("plan", "segments/1")]
    kept.append(write("llmbatch-u-4", "plan", time.time()))
    # More than are removed at once.
    removed = [write(id_, f"segments/{number}", old) for id_ in gone for number in range(50)]
    store = open_objects(StoreSettings(url=tmp_path.as_uri()))
    sweeper = BatchSweeper(_Batches(*known), store, GatewaySettings())  # type: ignore[arg-type]
    assert await sweeper.sweep() == len(removed)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in removed)
