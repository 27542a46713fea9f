"""What a deletion removes from the store: see services.gateway.files.outputs."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from batches.objects import segments_folder
from jobs.ids import tenant_of
from llm_pb import internal_pb2
from services.gateway.files.outputs import OutputPart
from store.objects import open_objects
from store.outputs import write_output
from store.settings import StoreSettings
from store.store import Store


async def written(store: Store, id_: str) -> None:
    """Write what a batch and what a job of this id leave."""

    async def content() -> AsyncIterator[bytes]:
        yield b"a segment"

    await store.put(store.new_name(segments_folder(id_, tenant_of(id_))), content())
    await write_output(store, id_, b"an output")


async def names(store: Store) -> set[str]:
    return {item.name for prefix in ("batches/", "outputs/") async for item in store.list(prefix)}


@pytest.mark.parametrize("id_", ["llmpipe-user-request/step", "llmpipe--acme--user-request/group/step"])
async def test_of_a_step_of_a_pipeline_both_are_removed(tmp_path: Path, id_: str) -> None:
    """Its id does not say whether it is a job or a batch. What others have stays."""
    store = open_objects(StoreSettings(url=f"file://{tmp_path}"))
    await written(store, f"{id_}-2")
    others = await names(store)
    await written(store, id_)
    assert len(await names(store)) == len(others) + 2
    assert await OutputPart(store).remove(internal_pb2.JobRemains(workflow_id=id_))
    assert await names(store) == others
