"""What answers depend on, apart from the job: the model's name, its weights, the engine and its options."""

import asyncio
import json
import logging
import os
import threading
from hashlib import sha256
from pathlib import Path
from typing import Final

from services.gpu_worker.settings import GpuWorkerSettings

_log = logging.getLogger(__name__)
_PATIENCE_SECONDS: Final = 2.0
"""Maximum wait of a job for the digest. Jobs that come before it is known generate without the cache."""
_BLOCK: Final = 1 << 20


class Recipe:
    """The digest of the model and its options. Large weights take minutes to read, so only a job that asks begins."""

    def __init__(self, settings: GpuWorkerSettings, folder: str) -> None:
        """`folder` is the model's, or its name somewhere else."""
        self._settings = settings
        self._folder = folder
        self._reading: asyncio.Task[bytes | None] | None = None

    async def digest(self) -> bytes | None:
        """Return the digest; None while it is not known, and where the files cannot be read."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
        await asyncio.wait({self._reading}, timeout=_PATIENCE_SECONDS)
        return self._reading.result() if self._reading.done() else None

    async def _read(self) -> bytes | None:
        settings, digest, stopped = self._settings, sha256(), threading.Event()
        # An alias of a trained model names other weights one day, whatever the revision says.
        revision = "" if settings.is_trained else settings.model_revision
        try:
            weights = revision or await asyncio.to_thread(_digest_of, self._folder, stopped)
        except OSError as error:
            _log.warning("the cache of answers is not used: the files of the model cannot be read: %s", error)
            return None
        finally:
            # The process ends once its threads have.
            stopped.set()
        # A trained model is in a folder of another name each time.
        path = "" if settings.is_trained else settings.model_path
        for part in (
            settings.engine,
            settings.model,
            path,
            weights,
            json.dumps(settings.engine_options, sort_keys=True),
        ):
            digest.update(sha256(part.encode()).digest())
        return digest.digest()


def _digest_of(name: str, stopped: threading.Event) -> str:
    """Return a digest of the files of a folder; empty for what is no folder here. Raises OSError.

    It returns anything at all once it is `stopped`.
    """
    folder = Path(name)
    # The path of an empty name is the current folder.
    if not name or not folder.is_dir():
        return ""
    digest = sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        inner = path.relative_to(folder)
        if any(part.startswith(".") for part in inner.parts):
            continue
        digest.update(sha256(os.fsencode(inner)).digest())
        of_file = sha256()
        with path.open("rb") as file:
            while (block := file.read(_BLOCK)) and not stopped.is_set():
                of_file.update(block)
        digest.update(of_file.digest())
    return digest.hexdigest()
