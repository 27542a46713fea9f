"""Data keys, and the ciphers derived from them: AES-256-GCM with a random nonce, by the library `cryptography`.

No data key encrypts anything itself. HKDF derives a key for each purpose from it: random nonces are safe for 2^32
messages of one key, which the tokens of a busy month exceed and those of one job do not.
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
from encryption.tenants import TENANT_PATTERN

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
_MAX_CIPHERS: Final = 4096
"""Maximum number of derived ciphers in memory: one for each job that is written or read, and one for payloads."""
_NAME: Final = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}")
_TIME: Final = "%Y%m%dT%H%M%SZ"


def checked_tenant(tenant: str) -> str:
    """Return the tenant, empty without tenants. Raises Unreadable for a name that no tenant can have."""
    if tenant and not TENANT_PATTERN.fullmatch(tenant):
        raise Unreadable(f"no tenant has the name {tenant!r}")
    return tenant


class KeyId(NamedTuple):
    """The id of a data key. It is authenticated with everything that the key encrypts."""

    tenant: str
    """Empty without tenants."""
    name: str
    """The time at which the key was created, and a random part. The name of a deleted key is never used again."""

    @classmethod
    def new(cls, tenant: str, now: datetime) -> "KeyId":
        """Return the id of a new key of the tenant."""
        return cls(tenant, f"{now.astimezone(UTC).strftime(_TIME)}-{os.urandom(4).hex()}")

    @classmethod
    def parse(cls, tenant: str, name: str) -> "KeyId":
        """Return the id in a ciphertext. Raises Unreadable for an id that no key can have."""
        key_id = cls(checked_tenant(tenant), name)
        try:
            if _NAME.fullmatch(name) and datetime.strptime(name.partition("-")[0], _TIME).replace(tzinfo=UTC):
                return key_id
        except ValueError:
            pass
        raise Unreadable(f"no data key has the id {key_id}")

    @property
    def month(self) -> str:
        """The month in which the key was created, in UTC, as YYYY-MM."""
        return f"{self.name[:4]}-{self.name[4:6]}"

    def __str__(self) -> str:
        return f"{self.name!r} of tenant {self.tenant!r}"


class Cipher:
    """Encrypts and decrypts for one purpose with one data key."""

    def __init__(self, key: bytes, key_id: KeyId) -> None:
        self.key_id = key_id
        self._aead = AESGCM(key)
        self._authenticated = f"{key_id.tenant}\0{key_id.name}".encode()

    def encrypt(self, data: bytes) -> bytes:
        """Return the nonce (12 bytes), the ciphertext and the tag (16 bytes)."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._aead.encrypt(nonce, data, self._authenticated)

    def decrypt(self, data: bytes) -> bytes:
        """Return the plaintext. Raises Unreadable for data that was cut, altered or encrypted for another purpose."""
        try:
            return self._aead.decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], self._authenticated)
        except (InvalidTag, ValueError) as error:
            raise Unreadable(f"data encrypted by the key {self.key_id} was altered") from error


class Ciphers:
    """The ciphers in memory, the least recently used of which are dropped. All data keys of a process share one."""

    def __init__(self) -> None:
        self._ciphers: OrderedDict[tuple[KeyId, str], Cipher] = OrderedDict()

    def get(self, key: "DataKey", purpose: str) -> Cipher:
        """Return the cipher, derived now if it is not in memory."""
        id_ = (key.key_id, purpose)
        cipher = self._ciphers.get(id_)
        if cipher is None:
            cipher = self._ciphers[id_] = Cipher(key.derive(purpose), key.key_id)
            if len(self._ciphers) > _MAX_CIPHERS:
                self._ciphers.popitem(last=False)
        else:
            self._ciphers.move_to_end(id_)
        return cipher


class DataKey:
    """An unwrapped data key. For one event loop."""

    def __init__(self, key_id: KeyId, secret: bytes, ciphers: Ciphers) -> None:
        self.key_id = key_id
        self._secret = secret
        self._ciphers = ciphers

    def derive(self, purpose: str) -> bytes:
        """Return the 32 bytes that HKDF-SHA256 derives for the purpose."""
        return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=purpose.encode()).derive(self._secret)

    def cipher(self, purpose: str) -> Cipher:
        """Return the cipher for a purpose: "payload", or "feed" and the job's key in the feed."""
        return self._ciphers.get(self, purpose)
