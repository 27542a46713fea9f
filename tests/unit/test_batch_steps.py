"""The steps of a batch at the gateway: which failures pass, and which end the batch."""

import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from batches.objects import folder_of
from feed.memory import MemoryFeed
from jobs.batches import log_key
from llm_pb import common_pb2, internal_pb2
from services.gateway.batches.activities import BatchActivities
from services.gateway.batches.processes import Processes
from services.gateway.batches.work import PLAN
from services.gateway.errors import ApiError, file_not_found, temporal_unavailable
from store.objects import ObjectStore, open_objects
from store.settings import StoreSettings

BATCH = "llmbatch-u-r"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return (tmp_path / "store").as_uri()


@pytest.fixture
def store(url: str) -> ObjectStore:
    return open_objects(StoreSettings(url=url))


class Record:
    """Fails as the record of a file does."""

    def __init__(self, error: ApiError) -> None:
        self._error = error

    async def record(self, *_: object) -> Any:
        """See FileReader."""
        raise self._error


def activities(store: ObjectStore, feed: MemoryFeed, reader: Any = None) -> BatchActivities:
    nothing: Any = None
    return BatchActivities(nothing, store, feed, reader, nothing, nothing)


async def test_a_file_that_is_gone_ends_a_batch_and_one_that_does_not_answer_delays_it(store: ObjectStore) -> None:
    gone = activities(store, MemoryFeed(), Record(file_not_found("f")))
    with pytest.raises(ApplicationError) as error:
        await gone.plan_batch(internal_pb2.PlanRequest(batch_id=BATCH))
    assert (error.value.type, error.value.non_retryable) == ("INPUT_GONE", True)
    silent = activities(store, MemoryFeed(), Record(temporal_unavailable("it does not answer")))
    with pytest.raises(ApiError):
        await silent.plan_batch(internal_pb2.PlanRequest(batch_id=BATCH))


async def names_in(store: ObjectStore) -> list[str]:
    return [found.name async for found in store.list(folder_of(BATCH, ""))]


async def written(store: ObjectStore, content: bytes) -> common_pb2.FileRef:
    async def pieces() -> AsyncIterator[bytes]:
        yield content

    stored = await store.put(store.new_name(folder_of(BATCH, "")), pieces())
    return common_pb2.FileRef(file_id=stored.name, size_bytes=stored.size)


async def test_a_batch_ends_although_a_manifest_is_lost(store: ObjectStore) -> None:
    """What the manifest has named stays, because nobody knows what that was."""
    segment, manifest = await written(store, b"segment"), await written(store, b"manifest")
    progress = internal_pb2.BatchProgress(plan=internal_pb2.BatchPlan(bad_count=0), manifests=[manifest])
    progress.plan.plan.CopyFrom(await written(store, b"plan"))
    steps = activities(store, MemoryFeed())
    request = internal_pb2.CleanRequest(batch_id=BATCH, progress=progress)
    # It is no manifest.
    await steps.clean_batch(request)
    await store.delete([manifest.file_id])
    await steps.clean_batch(request)
    assert sorted(await names_in(store)) == sorted([segment.file_id, progress.plan.plan.file_id])
    progress.ClearField("manifests")
    await steps.clean_batch(internal_pb2.CleanRequest(batch_id=BATCH, progress=progress))
    assert await names_in(store) == [progress.plan.plan.file_id]


async def test_the_logs_of_chunks_that_nobody_goes_on_with_are_removed(store: ObjectStore) -> None:
    feed = MemoryFeed()
    for chunk in (3, 4):
        await feed.append(log_key(BATCH, chunk), internal_pb2.FeedRecord(writer="w"))
    await activities(store, feed).clean_batch(internal_pb2.CleanRequest(batch_id=BATCH, chunks=[3]))
    assert await writers(feed, 3) == []
    assert await writers(feed, 4) == ["w"]


async def writers(feed: MemoryFeed, chunk: int) -> list[str]:
    """Return who has written the records of a chunk's log."""
    found: list[str] = []

    def is_last(record: internal_pb2.FeedRecord) -> bool:
        found.append(record.writer)
        return record.writer == "end"

    await feed.append(log_key(BATCH, chunk), internal_pb2.FeedRecord(writer="end"))
    await feed.read(log_key(BATCH, chunk), is_last)
    return found[:-1]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("crashes", "fault", "is_last"),
    # The process ends for a reason that is not known: by an exception, or before it runs any code of ours.
    [((), "GATEWAY_BATCH_MAX_LINES", False), ((8,), "PYTHONIOENCODING", False), ((9,), "PYTHONIOENCODING", True)],
)
async def test_a_step_that_always_fails_ends_its_batch(
    url: str, monkeypatch: pytest.MonkeyPatch, crashes: tuple[int, ...], fault: str, *, is_last: bool
) -> None:
    monkeypatch.setenv("STORE_URL", url)
    monkeypatch.setenv(fault, "nonsense")
    environment, beats = ActivityEnvironment(), list[tuple[Any, ...]]()
    environment.info = dataclasses.replace(environment.info, heartbeat_details=crashes)
    environment.on_heartbeat = lambda *details: beats.append(details)
    with pytest.raises(ApplicationError) as error:
        await environment.run(Processes().run, PLAN, internal_pb2.PlanTask())
    assert (error.value.type, error.value.non_retryable) == ("STEP_FAILED", is_last)
    assert "Traceback" not in error.value.message
    assert beats[-1] == (sum(crashes) + 1,)
