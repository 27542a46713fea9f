"""The encrypted form of an object: a header, and chunks of AES-256-GCM. Reading can start at any chunk.

    LLMS1 | tenant (32 bytes, NULs after it) | name of its data key (25) | salt (16) | chunk 0 | chunk 1 | …

A chunk is CHUNK_BYTES of content, the last one fewer or as many, and a tag of 16 bytes. HKDF derives a key for each
object from the data key, the salt and the object's name, so chunks cannot be moved between objects. A nonce is the
chunk's index and whether it is the last one, so chunks cannot be reordered, left out or cut off without notice: the
STREAM construction of Hoang, Reyhanitabar, Rogaway and Vizár (2015). The key is used for one object, which is written
once, so no nonce is used twice.
"""

import os
from io import BytesIO
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from encryption.cipher import DataKey, KeyId
from encryption.errors import Unreadable

CHUNK_BYTES: Final = 64 * 1024
"""Size of a chunk's content."""
_TAG_BYTES: Final = 16
STORED_CHUNK_BYTES: Final = CHUNK_BYTES + _TAG_BYTES
"""Size of a whole chunk in the store."""
_MAGIC: Final = b"LLMS1"
_SALT_BYTES: Final = 16
_INDEX_BYTES: Final = 11
_TENANT_BYTES: Final = 32
_KEY_NAME_BYTES: Final = 25
HEADER_BYTES: Final = len(_MAGIC) + _TENANT_BYTES + _KEY_NAME_BYTES + _SALT_BYTES


class Header(NamedTuple):
    """The beginning of an encrypted object."""

    key_id: KeyId
    salt: bytes

    @classmethod
    def new(cls, key_id: KeyId) -> "Header":
        """Return the header of a new object."""
        return cls(key_id, os.urandom(_SALT_BYTES))

    def encode(self) -> bytes:
        """Return the header as it is stored."""
        tenant, name = self.key_id.tenant.encode(), self.key_id.name.encode()
        return b"".join((_MAGIC, tenant.ljust(_TENANT_BYTES, b"\0"), name, self.salt))

    @classmethod
    def decode(cls, data: bytes) -> "Header":
        """Return the header of HEADER_BYTES. Raises Unreadable."""
        stream = BytesIO(data)
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise Unreadable("the object is not encrypted as its name says")
        try:
            tenant = stream.read(_TENANT_BYTES).rstrip(b"\0").decode("ascii")
            name = stream.read(_KEY_NAME_BYTES).decode("ascii")
        except UnicodeDecodeError as error:
            raise Unreadable("the header of an encrypted object was altered") from error
        return cls(KeyId.parse(tenant, name), stream.read(_SALT_BYTES))


class ChunkCipher:
    """Encrypts and decrypts the chunks of one object."""

    def __init__(self, key: DataKey, header: Header, name: str) -> None:
        """`name` is the name of the object."""
        self._aead = AESGCM(key.derive(f"object {header.salt.hex()} {name}"))
        self._name = name
        self._authenticated = header.encode()

    def encrypt(self, index: int, content: bytes, *, last: bool) -> bytes:
        """Return a chunk as it is stored."""
        return self._aead.encrypt(_nonce(index, last=last), content, self._authenticated)

    def decrypt(self, index: int, stored: bytes, *, last: bool) -> bytes:
        """Return the content of a chunk. Raises Unreadable for one that was altered, moved or cut off."""
        try:
            return self._aead.decrypt(_nonce(index, last=last), stored, self._authenticated)
        except (InvalidTag, ValueError) as error:
            raise Unreadable(f"chunk {index} of the object {self._name} was altered") from error


def stored_size(content_size: int) -> int:
    """Return the size of the stored chunks of an object's content. An empty one has one empty chunk."""
    chunks = max(-(-content_size // CHUNK_BYTES), 1)
    return content_size + chunks * _TAG_BYTES


def _nonce(index: int, *, last: bool) -> bytes:
    return index.to_bytes(_INDEX_BYTES, "big") + bytes([last])
