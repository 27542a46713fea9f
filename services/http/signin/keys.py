"""The keys of sessions. They encrypt what a browser keeps for the front, and detect changes.

The cipher is Fernet of the library `cryptography`: AES-128-CBC and HMAC-SHA256, with the time of the encryption.
"""

import asyncio
import base64
import binascii
import json
import logging
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from runtime.files import Reloaded, want_usable
from runtime.health import Readiness

_log = logging.getLogger(__name__)
_KEY_BYTES: Final = 32
_LOOK_INTERVAL: Final = timedelta(seconds=1)
"""Interval at which the file is checked."""


class Sealed(NamedTuple):
    """What was encrypted."""

    value: dict[str, Any]
    at: int
    """When, in seconds since 1970."""


class SessionKeys:
    """Encrypts small JSON objects. An object of one kind cannot be used as another kind."""

    def __init__(self, path: Path | None, readiness: Readiness | None = None) -> None:
        """Without a file only this object can decrypt what it encrypts. `readiness` names the file while it cannot be
        used. Raises ValueError for an invalid file."""
        self._file: Reloaded[MultiFernet] | None = None
        self._own = MultiFernet([Fernet(Fernet.generate_key())])
        if path is not None:
            self._file = Reloaded([path], partial(read_keys, path), "session keys", _log, ValueError)
            if readiness is not None:
                want_usable(readiness, "HTTP_SESSION_KEY_FILE", self._file)
        else:
            _log.info(
                "sessions of the console are valid at this front only, until it ends: HTTP_SESSION_KEY_FILE is not set"
            )

    def seal(self, kind: str, value: dict[str, Any]) -> str:
        """Return the object encrypted, as letters, digits, `-` and `_`."""
        return self._keys().encrypt(json.dumps([kind, value], separators=(",", ":")).encode()).decode().rstrip("=")

    def unseal(self, kind: str, text: str) -> Sealed | None:
        """Return what seal() has encrypted; None for anything else."""
        keys = self._keys()
        text += "=" * (-len(text) % 4)
        try:
            found, value = json.loads(keys.decrypt(text))
            return Sealed(value, keys.extract_timestamp(text)) if found == kind else None
        except (InvalidToken, ValueError):
            return None

    async def follow(self) -> None:
        """Read the file whenever it has changed, until cancelled. Requests do not wait for it. Returns without a
        file."""
        while self._file is not None:
            await asyncio.sleep(_LOOK_INTERVAL.total_seconds())
            await asyncio.to_thread(self._file.current)

    def _keys(self) -> MultiFernet:
        return self._file.last if self._file is not None else self._own


def read_keys(path: Path) -> MultiFernet:
    """Return the keys of a file. Raises ValueError, which says what is wrong and shows no key."""
    try:
        lines = path.read_text("ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        words = error.strerror if isinstance(error, OSError) else "it is no ASCII"
        raise ValueError(f"{path} cannot be read: {words}") from None
    keys = []
    for number, line in enumerate(lines, 1):
        try:
            secret = base64.b64decode(line.replace("-", "+").replace("_", "/"), validate=True)
        except binascii.Error:
            secret = b""
        if len(secret) != _KEY_BYTES:
            raise ValueError(f"{path}: the key number {number} is not {_KEY_BYTES} bytes in base64")
        keys.append(Fernet(base64.urlsafe_b64encode(secret)))
    if not keys:
        raise ValueError(f"{path} holds no key: `openssl rand -base64 {_KEY_BYTES}` makes one")
    return MultiFernet(keys)
