"""API keys: `llmk_<id>_<secret>`. A file holds only their SHA-256.

The secret has 256 random bits, so a fast hash is enough. The file is read again whenever it has changed.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import string
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Final

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from encryption import durable_file
from runtime.auth import Caller, Presented, check_expiry, credential_invalid
from runtime.files import Reloaded, want_usable
from runtime.health import Readiness
from runtime.scopes import SCOPES
from runtime.tenants import TenantOrNone

_log = logging.getLogger(__name__)
PREFIX: Final = "llmk_"
_BASE62: Final = string.ascii_letters + string.digits
_ID_CHARACTERS: Final = 12
_SECRET_CHARACTERS: Final = 43
"""256 bits: 62 to the power of 43 is more than 2 to that of 256."""
_NO_DIGEST: Final = "0" * 64


class ApiKey(BaseModel):
    """The entry of a key in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    id: str = Field(pattern=r"^[A-Za-z0-9]{1,32}$")
    """The part of the key that is no secret."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """The SHA-256 of the whole key in hexadecimal."""
    tenant: TenantOrNone = ""
    """The tenant whose jobs the key is for. Empty: the jobs without a tenant."""
    scopes: tuple[str, ...]
    user_id: str = ""
    """The one user whose jobs the key is for. Empty: all users of the tenant."""
    not_after: AwareDatetime | None = None
    """When the key expires. None: never."""

    def caller(self) -> Caller:
        """Return the caller that has the key."""
        return Caller(self.tenant, f"{PREFIX}{self.id}", frozenset(self.scopes), self.id, self.user_id, self.not_after)


_FILE: Final = TypeAdapter(tuple[ApiKey, ...])


class KeyFileError(Exception):
    """The file of the keys cannot be used. The message says why and quotes nothing of the file."""


def make_key() -> tuple[str, str, str]:
    """Return a new key, its id and its SHA-256."""
    id_ = "".join(secrets.choice(_BASE62) for _ in range(_ID_CHARACTERS))
    key = f"{PREFIX}{id_}_{''.join(secrets.choice(_BASE62) for _ in range(_SECRET_CHARACTERS))}"
    return key, id_, _sha256(key)


def read_keys(path: Path, known_scopes: Collection[str]) -> dict[str, ApiKey]:
    """Return the keys of a file by their ids. Raises KeyFileError."""
    try:
        keys = _FILE.validate_json(path.read_bytes())
    except OSError as error:
        raise KeyFileError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first, *others = error.errors(include_url=False, include_input=False, include_context=False)
        place = ".".join(map(str, first["loc"]))
        more = f", and {len(others)} more" if others else ""
        raise KeyFileError(f"{path}: {place or 'the file'}: {first['msg']}{more}") from None
    by_id = {key.id: key for key in keys}
    if len(by_id) < len(keys):
        raise KeyFileError(f"{path}: two keys have the same id")
    if unknown := sorted({scope for key in keys for scope in key.scopes} - {*known_scopes}):
        raise KeyFileError(f"{path}: there is no scope {', '.join(unknown)}")
    return by_id


def _usable(path: Path) -> Path:
    try:
        read_keys(path, SCOPES)
    except KeyFileError as error:
        # Settings report a ValueError as theirs.
        raise ValueError(str(error)) from None
    return path


KeysFile = Annotated[Path, AfterValidator(_usable)]
"""The type of a setting that names a file of API keys."""


def write_keys(path: Path, keys: Iterable[ApiKey]) -> None:
    """Replace the file atomically. Only its owner can read a new one. Raises OSError."""
    data = json.dumps([key.model_dump(mode="json", exclude_defaults=True) for key in keys], indent=2)
    durable_file.replace(path, data + "\n")


class ApiKeys:
    """The Authenticator of the keys in a file."""

    hint = "an API key as `authorization: Bearer llmk_…`"

    def __init__(self, path: Path, known_scopes: Collection[str]) -> None:
        """Read the file. Raises KeyFileError."""
        self._file = Reloaded([path], partial(read_keys, path, known_scopes), "API keys", _log, KeyFileError)

    def want_usable(self, readiness: Readiness, name: str) -> None:
        """Report the file as degraded while it cannot be used."""
        want_usable(readiness, name, self._file)

    async def authenticate(self, presented: Presented) -> Caller | None:
        """See Authenticator."""
        return self.find(presented.token) if presented.token is not None else None

    def find(self, token: str) -> Caller | None:
        """Return the caller with a key, None for a token of another kind. Raises Refusal. Any thread may call it."""
        if not token.startswith(PREFIX):
            return None
        key = self._file.last.get(token.removeprefix(PREFIX).partition("_")[0])
        # An unknown id takes as long as a wrong secret.
        same = hmac.compare_digest(_sha256(token), key.sha256 if key is not None else _NO_DIGEST)
        if key is None or not same:
            raise credential_invalid("the API key is unknown or revoked")
        caller = key.caller()
        check_expiry(caller)
        return caller

    def check(self, caller: Caller) -> None:
        """See Authenticator. A change of scopes, user or expiry ends the running calls of the key."""
        key = self._file.last.get(caller.key_id)
        if key is None or key.caller() != caller:
            raise credential_invalid("the API key has been revoked or changed")
        check_expiry(caller)

    async def refresh(self) -> None:
        """See Authenticator."""
        await asyncio.to_thread(self.reload)

    def reload(self) -> None:
        """Read the file if it has changed; log once what is wrong with it, and keep the keys as they were."""
        self._file.current()


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
