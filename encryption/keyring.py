"""Key-encryption keys in a JSON file: {"current": "<id>", "keys": {"<id>": "<32 bytes in base64>", …}}.

The current one wraps new data keys. The others are older and unwrap what they wrapped. The file is read at each use,
which is rare, so a change takes effect without a restart.
"""

import asyncio
import base64
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from encryption import durable_file
from encryption.cipher import KEY_BYTES, NONCE_BYTES
from encryption.errors import KeysUnavailable

_KIND: Final = "file"


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    current: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    keys: dict[str, SecretStr]


def with_new_key(keys: Mapping[str, str]) -> tuple[str, str]:
    """Return the id of a new key, and the text of a keyring with it, as the current one, and the keys given."""
    key_id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{os.urandom(2).hex()}"
    new = base64.b64encode(os.urandom(KEY_BYTES)).decode()
    return key_id, json.dumps({"current": key_id, "keys": {**keys, key_id: new}}, indent=2)


class Keyring:
    """A KeyWrapper by a file."""

    is_paid = False

    def __init__(self, path: Path) -> None:
        self._path = path

    async def wrap(self, secret: bytes, context: str) -> str:
        """See KeyWrapper."""
        file = await asyncio.to_thread(self._read)
        nonce = os.urandom(NONCE_BYTES)
        authenticated = f"{file.current}\0{context}".encode()
        data = nonce + self._aead(file, file.current).encrypt(nonce, secret, authenticated)
        return f"{_KIND}:{file.current}:{base64.b64encode(data).decode()}"

    async def unwrap(self, wrapped: str, context: str) -> bytes:
        """See KeyWrapper."""
        kind, _, rest = wrapped.partition(":")
        key_id, _, data = rest.partition(":")
        if kind != _KIND:
            raise KeysUnavailable(f"the data key {context} is wrapped by {kind!r}, not by a keyring")
        aead = self._aead(await asyncio.to_thread(self._read), key_id)
        try:
            raw = base64.b64decode(data)
            return aead.decrypt(raw[:NONCE_BYTES], raw[NONCE_BYTES:], f"{key_id}\0{context}".encode())
        except (InvalidTag, ValueError) as error:
            raise KeysUnavailable(f"the key-encryption key {key_id!r} is not the one that wrapped {context}") from error

    def check(self) -> None:
        """Raise KeysUnavailable for a file that cannot be used."""
        file = self._read()
        self._aead(file, file.current)

    def create(self) -> None:
        """Create a missing file, with one key. Raises KeysUnavailable for a file that is there and cannot be used."""
        if not self._path.exists():
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with durable_file.locked(self._path.parent):
                if not self._path.exists():
                    durable_file.replace(self._path, with_new_key({})[1])
        # Its folder may be read-only.
        self.check()

    def turn(self) -> str:
        """Add a new key-encryption key, which is current from now on, and return its id.

        Raises KeysUnavailable for a file that is missing or cannot be used, OSError for one that cannot be written.
        """
        self.check()
        with durable_file.locked(self._path.parent):
            keys = {name: key.get_secret_value() for name, key in self._read().keys.items()}
            key_id, text = with_new_key(keys)
            durable_file.replace(self._path, text)
        return key_id

    def _aead(self, file: _File, key_id: str) -> AESGCM:
        key = file.keys.get(key_id)
        if key is None:
            raise KeysUnavailable(f"the keyring {self._path} has no key-encryption key {key_id!r}")
        try:
            secret = base64.b64decode(key.get_secret_value(), validate=True)
        except ValueError:
            secret = b""
        if len(secret) != KEY_BYTES:
            raise KeysUnavailable(
                f"the key-encryption key {key_id!r} of {self._path} is no base64 of {KEY_BYTES} bytes"
            )
        return AESGCM(secret)

    def _read(self) -> _File:
        try:
            return _File.model_validate_json(self._path.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise KeysUnavailable(f"ENCRYPTION_KEYRING: the keyring cannot be read: {error}") from error
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise KeysUnavailable(
                f"the keyring {self._path} is not as docs/encryption.md says: {place}: {first['msg']}"
            ) from error
