"""The batches of Client: AsyncBatches for code without asyncio."""

import os
from collections.abc import Generator
from typing import Any

from durable_llm._batches import AsyncBatches
from durable_llm._sync_files import Runner
from llm_pb import batch_pb2


class Batches:
    """AsyncBatches for code without asyncio."""

    def __init__(self, loop: Runner, batches: AsyncBatches) -> None:
        self._loop = loop
        self._batches = batches

    def create(self, batch: batch_pb2.BatchRequest | None = None, /, **fields: Any) -> batch_pb2.BatchStatus:
        """See AsyncBatches.create."""
        return self._loop.run(self._batches.create(batch, **fields))

    def start(self, path: str | os.PathLike[str], *, user_id: str, **fields: Any) -> batch_pb2.BatchStatus:
        """See AsyncBatches.start."""
        return self._loop.run(self._batches.start(path, user_id=user_id, **fields))

    def get(self, batch_id: str) -> batch_pb2.BatchStatus:
        """See AsyncBatches.get."""
        return self._loop.run(self._batches.get(batch_id))

    def watch(self, batch_id: str) -> Generator[batch_pb2.BatchStatus, None, None]:
        """See AsyncBatches.watch."""
        return self._loop.iterate(self._batches.watch(batch_id))

    def results(self, batch_id: str, cursor: str = "") -> Generator[batch_pb2.StreamBatchResultsResponse, None, None]:
        """See AsyncBatches.results."""
        return self._loop.iterate(self._batches.results(batch_id, cursor))

    def cancel(self, batch_id: str, reason: str = "") -> batch_pb2.BatchStatus:
        """See AsyncBatches.cancel."""
        return self._loop.run(self._batches.cancel(batch_id, reason))

    def list(self, **filters: Any) -> Generator[batch_pb2.BatchStatus, None, None]:
        """See AsyncBatches.list."""
        return self._loop.iterate(self._batches.list(**filters))
