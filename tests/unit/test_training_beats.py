"""The steps of a training beat while they read: no file is so large that they outlast their heartbeat timeout.

The tests import torch, and not the module, as those of test_training.
"""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import pytest
from temporalio.testing import ActivityEnvironment

from llm_pb import common_pb2, file_pb2, internal_pb2, pipeline_pb2
from services.trainer.base_models import BaseModels
from services.trainer.device import Device
from services.trainer.settings import TrainerSettings
from store.models import put_file
from store.store import Store, StoredObject
from tests.support.training import jsonl, sentences, write_tiny_model

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from pathlib import Path

    from services.trainer.steps import TrainingSteps

pytestmark = pytest.mark.heavy
PIECE: Final = 4096


class WatchedStore:
    """A store in memory that counts the pieces which were read without a heartbeat after the one before."""

    def __init__(self) -> None:
        self.beats = self.pieces = self.silent = self.at_put = 0
        self._objects: dict[str, bytes] = {}

    def of_tenant(self, tenant: str) -> WatchedStore:
        return self

    def new_name(self, prefix: str) -> str:
        return f"{prefix}{len(self._objects)}"

    async def put(self, name: str, pieces: AsyncIterator[bytes]) -> StoredObject:
        self.at_put = self.at_put or self.beats
        self._objects[name] = b"".join([piece async for piece in pieces])
        return StoredObject(name, len(self._objects[name]))

    async def read(self, stored: StoredObject, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None]:
        for at in range(0, stored.size, PIECE):
            before = self.beats
            yield self._objects[stored.name][at : at + PIECE]
            self.pieces += 1
            self.silent += self.beats == before

    async def list(self, prefix: str) -> AsyncGenerator[Any, None]:
        for item in ():
            yield item


def environment(store: WatchedStore) -> ActivityEnvironment:
    def count(*_: Any) -> None:
        store.beats += 1

    beating = ActivityEnvironment()
    beating.on_heartbeat = count
    return beating


def steps_of(store: Any, model: Path, client: Any = None) -> TrainingSteps:
    from services.trainer.steps import TrainingSteps

    settings = TrainerSettings(base_models={"tiny": str(model)}, device="cpu", work_dir=model.parent)
    return TrainingSteps(client, store, BaseModels(client, store, settings), Device(), settings)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


async def put(store: Store, content: bytes, folder: Path) -> internal_pb2.StoredFile:
    (folder / "content").write_bytes(content)
    return await put_file(store, "files/", folder / "content", lambda: None)


async def test_a_data_set_is_read_with_heartbeats(tiny: Path, tmp_path: Path) -> None:
    """From the store, and twice from the disk: once to know the documents, once for their tokens."""
    store: Any = WatchedStore()
    # Equal documents are read, and are not tokenized.
    content = jsonl(sentences(2)) + jsonl(["rain " * 13_000] * 40)
    assert len(content) > 2 * 1024 * 1024
    file = await put(store, content, tmp_path)
    record = internal_pb2.FileRecord(segments=[internal_pb2.FileSegment(name=file.object, size=file.size)])
    record.file.state = file_pb2.FILE_STATE_READY
    record.file.ref.MergeFrom(common_pb2.FileRef(size_bytes=file.size, sha256=file.sha256))

    async def query(*_: Any, **__: Any) -> internal_pb2.FileRecord:
        return record

    steps = steps_of(store, tiny, SimpleNamespace(get_workflow_handle=lambda _: SimpleNamespace(query=query)))
    task = internal_pb2.TrainingTask(spec=pipeline_pb2.TrainingSpec(base_model="tiny", dataset=record.file.ref))
    task.report.base_model = "tiny"
    store.at_put = 0
    made = await environment(store).run(steps.tokenize, task)
    assert (made.summary.documents, made.summary.held_out_documents, made.summary.duplicates) == (2, 1, 39)
    assert (store.pieces > 500, store.silent) == (True, 0)
    assert store.at_put >= store.pieces + 4, "it is silent while it reads from the disk"


async def test_a_model_is_compared_with_heartbeats(tiny: Path, tmp_path: Path) -> None:
    from services.trainer.training import Recipe, TrainingRun

    store: Any = WatchedStore()
    tokens = array("i", [1, 2, 3, 4] * 500).tobytes()
    run = TrainingRun(tiny, Recipe(1, 0, 1e-2, 64), bytearray(tokens), "cpu")
    run.advance(1, 600)
    run.save(tmp_path / "checkpoint")
    task = internal_pb2.TrainingTask(spec=pipeline_pb2.TrainingSpec(base_model="tiny", min_improvement=100))
    task.report.base_model = "tiny"
    task.dataset.held_out_shards.append(await put(store, tokens, tmp_path))
    task.trained.file.CopyFrom(await put(store, (tmp_path / "checkpoint").read_bytes(), tmp_path))
    evaluation = await environment(store).run(steps_of(store, tiny).evaluate, task)
    assert 0 < evaluation.loss < evaluation.base_loss
    assert (store.pieces > 100, store.silent) == (True, 0)
