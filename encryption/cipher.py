"""Data keys and what encrypts with them: AES-256-GCM with a random nonce, of the library `cryptography`.

No data key encrypts anything itself. A cipher's key is derived from it by HKDF for one purpose: random nonces are good
for 2^32 messages of a key, which the tokens of a busy month exceed, and those of one job do not.
"""

import os
import re
from collections import OrderedDict
from datetime import UTC, datetime
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from encryption.errors import Unreadable

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
_CIPHERS: Final = 4096
"""Ciphers that a key keeps derived: one for each job that is written or read, and those of payloads."""
_TENANT: Final = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]{0,31})?")
_NAME: Final = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}")
_TIME: Final = "%Y%m%dT%H%M%SZ"


def checked_tenant(tenant: str) -> str:
    """Return the tenant. Raises Unreadable for a name that no tenant has."""
    if not _TENANT.fullmatch(tenant):
        raise Unreadable(f"no tenant has the name {tenant!r}")
    return tenant


class KeyId(NamedTuple):
    """Which data key: authenticated with everything that it encrypts."""

    tenant: str
    """Empty without tenants."""
    name: str
    """When the key was made, and a random part: the name of a deleted key never comes back."""

    @classmethod
    def new(cls, tenant: str, now: datetime) -> "KeyId":
        """Return the id of a new key of the tenant."""
        return cls(tenant, f"{now.astimezone(UTC).strftime(_TIME)}-{os.urandom(4).hex()}")

    @classmethod
    def parse(cls, tenant: str, name: str) -> "KeyId":
        """Return the id that a ciphertext names. Raises Unreadable for one that no key has."""
        key_id = cls(checked_tenant(tenant), name)
        try:
            if _NAME.fullmatch(name) and key_id.made_at:
                return key_id
        except ValueError:
            pass
        raise Unreadable(f"no data key has the id {key_id}")

    @property
    def made_at(self) -> datetime:
        """When the key was made."""
        return datetime.strptime(self.name.partition("-")[0], _TIME).replace(tzinfo=UTC)

    @property
    def month(self) -> str:
        """The key's month in UTC, as YYYY-MM."""
        return f"{self.name[:4]}-{self.name[4:6]}"

    def __str__(self) -> str:
        return f"{self.name!r} of tenant {self.tenant!r}"


class Cipher:
    """Encrypts and decrypts for one purpose by one data key."""

    def __init__(self, key: bytes, key_id: KeyId) -> None:
        self.key_id = key_id
        self._aead = AESGCM(key)
        self._authenticated = f"{key_id.tenant}\0{key_id.name}".encode()

    def encrypt(self, data: bytes) -> bytes:
        """Return the nonce (12 bytes), the ciphertext and the tag (16 bytes)."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._aead.encrypt(nonce, data, self._authenticated)

    def decrypt(self, data: bytes) -> bytes:
        """Return what was encrypted. Raises Unreadable for data that was cut, altered or made for another purpose."""
        try:
            return self._aead.decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], self._authenticated)
        except (InvalidTag, ValueError) as error:
            raise Unreadable(f"data encrypted by the key {self.key_id} was altered") from error


class DataKey:
    """An unwrapped data key."""

    def __init__(self, key_id: KeyId, secret: bytes) -> None:
        self.key_id = key_id
        self._secret = secret
        self._ciphers: OrderedDict[str, Cipher] = OrderedDict()

    def cipher(self, purpose: str) -> Cipher:
        """Return the cipher for a purpose: "payload", or "feed" and the job's run id."""
        cipher = self._ciphers.get(purpose)
        if cipher is None:
            derived = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=purpose.encode()).derive(self._secret)
            cipher = self._ciphers[purpose] = Cipher(derived, self.key_id)
            if len(self._ciphers) > _CIPHERS:
                self._ciphers.popitem(last=False)
        return cipher
