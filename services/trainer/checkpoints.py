"""Checkpoints in the store. Their names tell all that is to be known of them.

    training/checkpoints/<tenant, or ->/<recipe>/<run>/<step>-<size>-<SHA-256>/<random name>

The recipe is a hash of all that decides the weights, so a checkpoint of any run of the same recipe is one of this run.
An attempt that was killed leaves whole checkpoints or nothing, and no heartbeat has to arrive for them to be found. Two
attempts at the same time write the same weights.
"""

import hashlib
import re
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Final, NamedTuple

from encryption import Unreadable
from jobs.training import DEFAULT_LEARNING_RATE, DEFAULT_STEP_TOKENS
from llm_pb import internal_pb2
from services.trainer.adapters import adapter_of
from services.trainer.shards import TRAINING_FOLDER
from store.models import get_file, put_file
from store.store import ObjectMissing, Store

KEPT: Final = 2
"""Number of checkpoints of a run that are kept: should the last one be damaged, there is another."""
_FORMAT: Final = 1
"""Changes with what the trainer does to weights, so that no checkpoint of other code is gone on from."""
_NAME: Final = re.compile(r"(\d{8})-(\d+)-([0-9a-f]{64})/[^/]+")


class Checkpoint(NamedTuple):
    """A checkpoint in the store."""

    step: int
    file: internal_pb2.StoredFile


class Checkpoints:
    """The checkpoints of one training."""

    def __init__(self, store: Store, tenant: str, task: internal_pb2.TrainingTask) -> None:
        self._store = store.of_tenant(tenant)
        self._recipe = f"{TRAINING_FOLDER}checkpoints/{tenant or '-'}/{recipe_of(task)}/"
        self._own = f"{self._recipe}{hashlib.sha256(task.run.encode()).hexdigest()[:32]}/"

    async def own(self) -> list[Checkpoint]:
        """Return the checkpoints of this run, the last one first. Raises StoreUnavailable."""
        return await self._list(self._own)

    async def restore(self, path: Path, progressed: Callable[[], object]) -> Checkpoint | None:
        """Write the last whole checkpoint of the recipe to a path, and return it; None without one.

        Calls `progressed` for each piece. Raises StoreUnavailable, KeysUnavailable, OSError.
        """
        for checkpoint in await self._list(self._recipe):
            try:
                await get_file(self._store, checkpoint.file, path, progressed)
            except (ObjectMissing, Unreadable):
                # It was damaged, or another attempt has removed it meanwhile.
                continue
            return checkpoint
        return None

    def is_own(self, checkpoint: Checkpoint) -> bool:
        """Return whether a checkpoint is one of this run, and not of another one of the recipe."""
        return checkpoint.file.object.startswith(self._own)

    async def save(self, step: int, sha256: bytes, path: Path, progressed: Callable[[], object]) -> Checkpoint:
        """Write a checkpoint, and remove those of this run before the last two.

        Calls `progressed` for each piece. Raises the errors of the store.
        """
        size = path.stat().st_size  # noqa: ASYNC240  # of a file that was just written
        folder = f"{self._own}{step:08d}-{size}-{sha256.hex()}/"
        file = await put_file(self._store, folder, path, progressed)
        await self.remove_all_but(KEPT)
        return Checkpoint(step, file)

    async def remove_all_but(self, count: int) -> list[Checkpoint]:
        """Remove the checkpoints of this run but so many last ones; return these. Raises StoreUnavailable."""
        own = await self.own()
        # Two attempts may both have written a step.
        steps = sorted({checkpoint.step for checkpoint in own}, reverse=True)[:count]
        await self._store.delete([one.file.object for one in own if one.step not in steps])
        return [one for one in own if one.step in steps]

    async def _list(self, prefix: str) -> list[Checkpoint]:
        found: list[Checkpoint] = []
        async with aclosing(self._store.list(prefix)) as objects:
            async for item in objects:
                if (match := _NAME.search(item.name)) is not None:
                    step, size, sha256 = match.groups()
                    file = internal_pb2.StoredFile(object=item.name, size=int(size), sha256=bytes.fromhex(sha256))
                    found.append(Checkpoint(int(step), file))
        return sorted(found, key=lambda one: (one.step, one.file.object), reverse=True)


def recipe_of(task: internal_pb2.TrainingTask) -> str:
    """Return a hash of all that decides the weights of a training."""
    spec, whole = task.spec, hashlib.sha256()
    for part in (
        _FORMAT,
        task.report.base_sha256.hex(),
        *(shard.sha256.hex() for shard in task.dataset.shards),
        spec.steps,
        spec.seed,
        repr(spec.learning_rate or DEFAULT_LEARNING_RATE),
        spec.step_tokens or DEFAULT_STEP_TOKENS,
        # A training of all weights has the recipe that it had before there were adapters.
        *((adapter_of(spec),) if spec.lora_rank else ()),
    ):
        whole.update(f"{part}\n".encode())
    return whole.hexdigest()
