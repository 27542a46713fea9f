"""The cache of answers: what equal jobs have generated lately, and which of them generates now.

It is no feed, and nothing depends on it: an entry may be gone at any time. It uses the feed's connection and its keys.

Of equal jobs one generates: the one that holds the claim. A claim ends by itself unless it is renewed, so that a worker
that is lost delays the others by CLAIM_SECONDS at most.
"""

import hmac
import logging
from collections.abc import Awaitable
from datetime import timedelta
from hashlib import sha256
from typing import Final, NamedTuple, Protocol, TypeVar

from google.protobuf.message import DecodeError

from encryption import Encryption, KeysUnavailable, Unreadable
from encryption.cipher import KeyId
from llm_pb import internal_pb2

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
CLAIM_SECONDS: Final = 6
"""Time after which a claim that is not renewed ends."""
MAX_ANSWER_BYTES: Final = 512 * 1024
"""Maximum size of an answer in the cache. A broker accepts a megabyte, and answers in base64."""


class CacheUnavailable(Exception):
    """The cache does not answer now, or holds nothing that can be used."""


class Entry(NamedTuple):
    """What is under a key."""

    data: bytes | None
    """The last answer. None without one."""
    claimed: bool
    """Whether somebody generates one."""
    turn: int
    """The number of the claim, for `claim`."""


class AnswerStore(Protocol):
    """Where the entries are. All methods raise CacheUnavailable within a bounded time."""

    async def find(self, key: str) -> Entry:
        """Return what is under a key."""
        ...

    async def claim(self, key: str, turn: int) -> int | None:
        """Claim a key, or renew the claim of this turn; return the new turn.

        `turn` is the last one known. None: somebody else was faster, or holds the claim.
        """
        ...

    async def release(self, key: str, turn: int) -> None:
        """End the claim of this turn, if it still holds."""
        ...

    async def put(self, key: str, job_id: str, data: bytes, ttl: timedelta) -> None:
        """Store the answer of a job for a time."""
        ...

    async def forget(self, job_id: str) -> bool:
        """Remove the answers of a job; return whether none is left. Raises nothing."""
        ...


class Answers:
    """The answers of one tenant, encrypted where the feed is."""

    def __init__(self, store: AnswerStore, encryption: Encryption | None, tenant: str = "") -> None:
        self.store = store
        self._encryption = encryption
        self._tenant = tenant

    def of_tenant(self, tenant: str) -> "Answers":
        """Return the answers of a tenant. No tenant finds those of another one."""
        return Answers(self.store, self._encryption, tenant)

    async def key(self, digest: bytes) -> str:
        """Return the key of what has this digest. Raises CacheUnavailable.

        With encryption it is keyed, because whoever guesses a prompt could confirm it by a digest. It changes with the
        data key, once a month, so nothing is found over that.
        """
        data = sha256(self._tenant.encode()).digest() + digest
        if self._encryption is None or not self._encryption.write:
            return sha256(data).hexdigest()
        data_key = await _available(self._encryption.keys.current(self._tenant))
        return hmac.digest(data_key.derive("cache keys"), data, sha256).hex()

    async def find(self, key: str) -> tuple[internal_pb2.CachedAnswer | None, Entry]:
        """Return the answer under a key, and the entry. Raises CacheUnavailable."""
        entry = await self.store.find(key)
        if entry.data is None:
            return None, entry
        try:
            record = internal_pb2.CacheRecord.FromString(entry.data)
            if record.HasField("encrypted"):
                record = await self._decrypted(key, record.encrypted)
        except (Unreadable, DecodeError) as error:
            # It is generated and stored again.
            _log.warning("an answer in the cache cannot be read: %s", error)
            return None, entry
        return (record.answer if record.HasField("answer") else None), entry

    async def put(self, key: str, job_id: str, answer: internal_pb2.CachedAnswer, ttl: timedelta) -> None:
        """Store the answer of a job, unless it is too large. Raises CacheUnavailable."""
        if answer.ByteSize() > MAX_ANSWER_BYTES:
            return
        record = internal_pb2.CacheRecord(answer=answer)
        if self._encryption is not None and self._encryption.write:
            data_key = await _available(self._encryption.keys.current(self._tenant))
            encrypted = internal_pb2.EncryptedRecord(
                tenant=data_key.key_id.tenant,
                key=data_key.key_id.name,
                data=data_key.cipher(_purpose(key)).encrypt(record.SerializeToString()),
            )
            record = internal_pb2.CacheRecord(encrypted=encrypted)
        await self.store.put(key, job_id, record.SerializeToString(), ttl)

    async def _decrypted(self, key: str, encrypted: internal_pb2.EncryptedRecord) -> internal_pb2.CacheRecord:
        """Return the record. Raises Unreadable where the keys are not this tenant's or were deleted."""
        if self._encryption is None or encrypted.tenant != self._tenant:
            raise Unreadable("it is encrypted for another tenant, or this process has no keys")
        data_key = await _available(self._encryption.keys.get(KeyId.parse(encrypted.tenant, encrypted.key)))
        return internal_pb2.CacheRecord.FromString(data_key.cipher(_purpose(key)).decrypt(encrypted.data))


async def _available(getting: Awaitable[_T]) -> _T:
    try:
        return await getting
    except KeysUnavailable as error:
        raise CacheUnavailable(str(error)) from error


def _purpose(key: str) -> str:
    return f"cache {key}"
