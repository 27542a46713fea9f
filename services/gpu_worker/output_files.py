"""Writes the outputs of attempts that are too large for a message to the store, before Temporal learns of their end."""

import asyncio
import logging
from datetime import timedelta
from typing import Final

from encryption import KeysUnavailable
from jobs.stages import DONE
from llm_pb import common_pb2
from services.gpu_worker.attempt import Attempt
from store.outputs import write_output
from store.store import Store, StoreUnavailable

_log = logging.getLogger(__name__)
PARTIAL_PATIENCE: Final = timedelta(seconds=20)
"""Maximum time to write a partial output. The feed has it, too, and a worker that stops has little time."""
_RETRY_SECONDS: Final = (0.5, 1, 2, 5)
"""Seconds before each further try. The last one repeats."""


class OutputFiles:
    """The outputs that this worker writes to the store."""

    def __init__(self, store: Store | None) -> None:
        """Without a store each output has to fit a message."""
        self._store = store

    def limit(self, max_output_bytes: int) -> int:
        """Return the maximum size of a job's output that may be a file; 0 where it may not. See RunRequest."""
        return max_output_bytes if self._store is not None else 0

    async def save(self, attempt: Attempt, job_id: str, within: timedelta | None = None) -> common_pb2.FileRef | None:
        """Write the attempt's output if it has to be a file, and return the file. That of an image is the attempt's.

        Waits for a store that is away, for the time `within` or, without one, as long as the activity may take. Raises
        TimeoutError.
        """
        image, is_large = attempt.image, attempt.output.is_large(attempt.max_inline_bytes)
        if self._store is None or not attempt.max_output_bytes or not (image or is_large):
            return None
        # Nothing is to be expected of the engine.
        attempt.watchdog.move(DONE)
        async with asyncio.timeout(within.total_seconds() if within is not None else None):
            tries = 0
            while True:
                try:
                    if image is not None:
                        attempt.image_file = await write_output(self._store, job_id, image.data, image.media_type)
                        return None
                    return await write_output(self._store, job_id, attempt.output.text)
                except (StoreUnavailable, KeysUnavailable) as error:
                    _log.warning("the output cannot be written to the store yet: %s", error)
                await asyncio.sleep(_RETRY_SECONDS[min(tries, len(_RETRY_SECONDS) - 1)])
                tries += 1
