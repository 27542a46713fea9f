"""The operator's settings of encryption at rest, and what a process makes of them."""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from encryption.data_keys import DataKeys
from encryption.errors import KeysUnavailable
from encryption.key_store import KeyStore
from encryption.key_wrapper import KeyWrapper
from encryption.keyring import Keyring
from encryption.search_hash import SearchHash

KEY_PATIENCE: Final = timedelta(seconds=20)
"""Maximum wait of a worker for an unavailable key. It is less than the heartbeat timeout."""
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_ARN: Final = re.compile(r"arn:[^:]+:kms:[a-z0-9-]+:[0-9]*:.+")
_RETRY: Final = timedelta(seconds=1)

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class EncryptionSettings(BaseSettings):
    """Encryption at rest, the same for every service."""

    model_config = SettingsConfigDict(env_prefix="ENCRYPTION_", frozen=True, use_attribute_docstrings=True)

    key_store: Path | None = None
    """Folder of the wrapped data keys, on a volume that all services share. Unset: nothing is encrypted, and encrypted
    content cannot be read."""
    keyring: Path | None = None
    """File of the key-encryption keys. `python -m encryption init` creates a missing file."""
    kms_key: str | None = None
    """ARN of a key of AWS KMS that wraps data keys, instead of a keyring."""
    kms_url: str | None = None
    """URL of another service with the API of KMS, https or on loopback: data keys are sent to it. Unset: AWS's own, in
    the region of the key."""
    write: bool = True
    """Whether this process encrypts. `false`: it only decrypts, until all services have the keys."""
    search_attributes: Literal["clear", "hashed"] = "clear"
    """Form of the search attributes `UserID`, `RequestID` and `ProjectId` of new jobs. `hashed`: keyed hashes, which
    still match the filters of List."""

    @field_validator("key_store", "keyring", mode="before")
    @classmethod
    def _is_named(cls, path: Any) -> Any:
        # An empty variable may be a mistake, and pydantic takes it for the working folder.
        if path == "":
            raise ValueError("is empty: name a path, or leave it unset")
        return path

    @field_validator("kms_key")
    @classmethod
    def _can_be_called(cls, key: str | None) -> str | None:
        if key is not None and _ARN.fullmatch(key) is None:
            raise ValueError("must be the ARN of a key, such as arn:aws:kms:eu-central-1:111122223333:key/mrk-1234")
        if key and find_spec("botocore") is None:
            raise ValueError("needs the extra kms, which is not installed")
        return key

    @field_validator("kms_url")
    @classmethod
    def _is_confidential(cls, url: str | None) -> str | None:
        parts = urlsplit(url or "")
        here = parts.scheme == "http" and parts.hostname in _LOOPBACK
        if url and parts.scheme != "https" and not here:
            raise ValueError("must be an https URL, or an http URL of localhost, 127.0.0.1 or ::1")
        return url

    @model_validator(mode="after")
    def _complete(self) -> Self:
        wrappers = [value for value in (self.keyring, self.kms_key) if value is not None]
        if len(wrappers) != (self.key_store is not None):
            raise ValueError(
                "ENCRYPTION_KEY_STORE: set it and either ENCRYPTION_KEYRING or ENCRYPTION_KMS_KEY, or none of them"
            )
        if self.search_attributes == "hashed" and self.key_store is None:
            raise ValueError("ENCRYPTION_SEARCH_ATTRIBUTES: `hashed` needs ENCRYPTION_KEY_STORE")
        return self


def _no_tenant(_workflow_id: str) -> str:
    return ""


@dataclass(frozen=True)
class Encryption:
    """Encryption at rest in this process."""

    keys: DataKeys
    write: bool = True
    """Whether it encrypts. It decrypts in any case."""
    tenant_of: Callable[[str], str] = _no_tenant
    """Returns the tenant to whom a workflow belongs, by its id. Empty without tenants."""
    hashes: bool = False
    """Whether it hashes the search attributes of new jobs."""
    patience: timedelta = timedelta(0)
    """How long the codec waits for an unavailable key."""

    async def search_hash(self, tenant: str) -> SearchHash | None:
        """Return the hash for the search attributes of a new job, None where they stay in clear.

        Raises KeysUnavailable.
        """
        if not (self.write and self.hashes):
            return None
        key = await self.keys.search_key(tenant, create=True)
        return SearchHash(key) if key is not None else None

    async def known_search_hash(self, tenant: str) -> SearchHash | None:
        """Return the hash that jobs of the tenant may have, None if none can. Raises KeysUnavailable."""
        key = await self.keys.search_key(tenant, create=False)
        return SearchHash(key) if key is not None else None

    async def patiently(self, get_key: Callable[[], Awaitable[_T]]) -> _T:
        """Return what `get_key` returns, tried again for the patience. Raises KeysUnavailable."""
        now = asyncio.get_running_loop().time
        end = now() + self.patience.total_seconds()
        while True:
            try:
                return await get_key()
            except KeysUnavailable:
                if now() >= end:
                    raise
            await asyncio.sleep(_RETRY.total_seconds())

    async def wait_for_store(self) -> None:
        """Wait while the keys of the store cannot be used. Makes none: the store may be another one."""
        await self._wait_while(self.keys.present_problem)

    async def wait_for_keys(self) -> None:
        """Wait until there is a key to encrypt with. A worker without one would fail each task that it takes."""

        async def has_none() -> KeysUnavailable | None:
            try:
                await self.keys.current("")
            except KeysUnavailable as error:
                return error
            return None

        await self._wait_while(has_none)

    async def _wait_while(self, problem: Callable[[], Awaitable[object]]) -> None:
        """Wait while there is a problem with the keys, if this process encrypts. Logs the first one."""
        waiting = False
        while self.write and (found := await problem()):
            if not waiting:
                _log.warning("waits for data keys: %s", found)
            waiting = True
            await asyncio.sleep(_RETRY.total_seconds())


def open_encryption(
    tenant_of: Callable[[str], str] = _no_tenant,
    settings: EncryptionSettings | None = None,
    *,
    patience: timedelta = timedelta(0),
) -> Encryption | None:
    """Return how this process encrypts, by default by the settings of the environment; None when it does not.

    Raises NoKeyStore when the folder is no key store, or cannot be read.
    """
    settings = settings or EncryptionSettings()
    if settings.key_store is None:
        return None
    store = KeyStore(settings.key_store)
    store.check()
    keys = DataKeys(store, key_wrapper(settings))
    return Encryption(keys, settings.write, tenant_of, settings.search_attributes == "hashed", patience)


def key_wrapper(settings: EncryptionSettings) -> KeyWrapper:
    """Return the wrapper of data keys."""
    if settings.keyring is not None:
        return Keyring(settings.keyring)
    # Only its users have its library.
    from encryption.kms import Kms

    return Kms(settings.kms_key or "", settings.kms_url)
