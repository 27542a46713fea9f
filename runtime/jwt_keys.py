"""The public keys of an issuer: its JSON Web Key Set, fetched again and again."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import jwt

from runtime.auth import authentication_unavailable, credential_invalid
from runtime.bounded_fetch import FetchError, fetch

_log = logging.getLogger(__name__)
_ASYMMETRIC: Final = ("RSA", "EC", "OKP")
"""The key types (`kty`) that count."""
_USES: Final = (None, "sig")
"""The uses of a key (`use`) that count."""
_UNKNOWN_INTERVAL: Final = timedelta(minutes=1)
"""How often it is fetched at most because a token names a key that is not in it."""
_FETCH_TIMEOUT: Final = timedelta(seconds=5)
_MAX_WAITING: Final = 100
"""Maximum number of calls that wait for a fetch. An issuer that hangs would hold all calls with forged tokens."""
_MAX_SET_BYTES: Final = 1024 * 1024
_NEVER: Final = float("-inf")


class KeySetError(Exception):
    """The key set cannot be had. The message says why."""


class KeySet:
    """The keys of an issuer: the last good ones while it is away."""

    def __init__(
        self,
        source: str,
        *,
        lifetime: timedelta = timedelta(minutes=5),
        retry_interval: timedelta = timedelta(seconds=10),
    ) -> None:
        """`source`: a URL, or the path of a file.

        It is read every `lifetime`: a key that the issuer has withdrawn counts no longer than that; and every
        `retry_interval` while the issuer is away.
        """
        self._source = source
        self._lifetime = lifetime
        self._retry_interval = retry_interval
        self._keys: Mapping[str, jwt.PyJWK] = {}
        self._due_at = _NEVER
        self._asked_at = _NEVER
        self._failing = True
        self._fetching: asyncio.Task[None] | None = None
        self._waiting = 0
        # Fetches have no thread of those that refresh API keys, which an issuer that hangs would take one by one.
        self._thread = ThreadPoolExecutor(1, "jwt-keys")
        self._reading: asyncio.Future[dict[str, jwt.PyJWK]] | None = None

    @property
    def usable(self) -> bool:
        """Whether the set could be read at the last fetch."""
        return not self._failing

    async def key(self, kid: str) -> jwt.PyJWK:
        """Return the key. Raises Refusal for one that is not in the set."""
        if kid not in self._keys:
            await self._look_for_new_keys()
        if (key := self._keys.get(kid)) is not None:
            return key
        # The issuer may have a key by now that is not known here.
        raise authentication_unavailable() if self._failing else credential_invalid("the JWT's key is unknown")

    async def refresh(self) -> None:
        """Fetch the set if it is due. Logs what fails."""
        if time.monotonic() < self._due_at:
            return
        await asyncio.shield(self._fetching or self._begin())

    async def _look_for_new_keys(self) -> None:
        """Fetch the set if that is allowed now, or wait for the fetch that runs. Raises Refusal when too many wait."""
        if self._fetching is None:
            if time.monotonic() - self._asked_at < _UNKNOWN_INTERVAL.total_seconds():
                return
            self._asked_at = time.monotonic()
            self._begin()
        elif self._failing and self._due_at != _NEVER:
            # The fetch will probably fail, too.
            return
        if self._waiting >= _MAX_WAITING:
            raise authentication_unavailable()
        self._waiting += 1
        try:
            await asyncio.shield(self._fetching or self._begin())
        finally:
            self._waiting -= 1

    def _begin(self) -> asyncio.Task[None]:
        self._fetching = asyncio.create_task(self._fetch())
        return self._fetching

    async def _fetch(self) -> None:
        try:
            self._keys = await self._read()
        except KeySetError as error:
            if not self._failing or self._due_at == _NEVER:
                _log.error("the keys of JWTs stay as they were: %s", error)
            self._failing, wait = True, self._retry_interval
        else:
            if self._failing:
                _log.info("read %d keys of JWTs", len(self._keys))
            self._failing, wait = False, self._lifetime
        finally:
            self._fetching = None
        self._due_at = time.monotonic() + wait.total_seconds()

    async def _read(self) -> dict[str, jwt.PyJWK]:
        """Return the keys that the issuer has. Raises KeySetError, within a bounded time."""
        if self._reading is None:
            self._reading = asyncio.get_running_loop().run_in_executor(self._thread, read_key_set, self._source)
        # A thread cannot be cancelled. One that still hangs, in a look-up of a name say, is waited for again next time.
        done, _ = await asyncio.wait([self._reading], timeout=2 * _FETCH_TIMEOUT.total_seconds())
        if not done:
            raise KeySetError(f"{self._source}: no answer in time")
        reading, self._reading = self._reading, None
        return reading.result()


def read_key_set(source: str) -> dict[str, jwt.PyJWK]:
    """Return the usable keys of a set by their names. Raises KeySetError for a set that cannot be read or has none.

    `source`: a URL, or the path of a file. Blocks.
    """
    try:
        # In an event loop of its own, so that this thread has the look-up of the name as well.
        data = asyncio.run(_download(source)) if "://" in source else Path(source).read_bytes()
        if len(data) > _MAX_SET_BYTES:
            raise KeySetError(f"{source} has more than {_MAX_SET_BYTES} bytes")
        keys = json.loads(data)["keys"]
    except FetchError as error:
        raise KeySetError(str(error)) from error
    except OSError as error:
        raise KeySetError(f"{source} cannot be read: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        # LookupError and TypeError: it is JSON, but no object with keys.
        raise KeySetError(f"{source} is no key set that can be had: {error!r}") from error
    found = [key for item in (keys if isinstance(keys, list) else []) if (key := _key(item)) is not None]
    if not found:
        raise KeySetError(f"{source} has no key that can be used")
    return {
        key.key_id: key
        for key in found
        if isinstance(key.key_id, str) and key.key_id and key.key_type in _ASYMMETRIC and key.public_key_use in _USES
    }


def _key(item: Any) -> jwt.PyJWK | None:
    """Return a key of a set; None for one that cannot be used here, which spoils no other (RFC 7517, 5)."""
    try:
        return jwt.PyJWK(item)
    except Exception:  # noqa: BLE001  # besides its own errors the library raises TypeError or NotImplementedError, say
        return None


async def _download(url: str) -> bytes:
    """Return the key set at a URL. Raises FetchError, and KeySetError for another status than 200."""
    answer = await fetch("GET", url, within=_FETCH_TIMEOUT, max_bytes=_MAX_SET_BYTES)
    if answer.status != HTTPStatus.OK:
        raise KeySetError(f"{url} answers with the status {answer.status}")
    return answer.body
