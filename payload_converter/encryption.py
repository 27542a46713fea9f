"""A codec that encrypts payloads, and the data converter that uses it. Its keys come from the package `encryption`.

    client = await Client.connect("127.0.0.1:7233", data_converter=encrypting(encryption))

An encrypted payload has the encoding `binary/encrypted`, the name of its key in `encryption-key-id`, and its tenant, if
any, in `encryption-tenant`. Its data is the whole payload of the converter, compressed where that makes it smaller. A
payload of any other encoding is returned as it is, so a history may hold both kinds.

The package does not import this module: workflow sandboxes import the package again, and `cryptography` fails then.
"""

import asyncio
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Self

from google.protobuf.message import DecodeError
from temporalio.api.common.v1 import Payload
from temporalio.converter import DataConverter, PayloadCodec, SerializationContext, WithSerializationContext

from encryption import Encryption, Unreadable
from encryption.cipher import Cipher, KeyId
from payload_converter._converter import ENCRYPTED, EncryptedMessagePayloadConverter, data_converter
from payload_converter._errors import MAX_PAYLOAD_BYTES, PayloadError
from payload_converter._failures import EncodedFailureConverter

_KEY: Final = "encryption-key-id"
_TENANT: Final = "encryption-tenant"
_PURPOSE: Final = "payload"
_PLAIN, _ZLIB = b"\0", b"\1"
"""First byte of the plaintext: how the payload that follows is compressed."""
_WORTH_COMPRESSING: Final = 1024
"""Minimum size in bytes of a payload that is compressed."""
_FAST: Final = 1
"""Level of zlib. Higher ones take several times as long, and save a few per cent of a text."""
_MAX_PLAIN_BYTES: Final = 2 * MAX_PAYLOAD_BYTES
"""Maximum size of a payload before it is encrypted, and after it is decrypted."""
_IN_THREAD: Final = 64 * 1024
"""Maximum size in bytes of a payload that is encrypted on the event loop, which takes a millisecond."""


class EncryptingCodec(PayloadCodec, WithSerializationContext):
    """Encrypts each payload with its tenant's data key of the month, and decrypts with the key that it names.

    The tenant is that of the workflow in the SDK's context. Without a context it encrypts for the tenant without a
    name, and decrypts for all.
    """

    def __init__(self, encryption: Encryption, tenant: str | None = None) -> None:
        """`tenant` is None without a context."""
        self._encryption = encryption
        self._tenant = tenant

    def with_context(self, context: SerializationContext) -> Self:
        """Return the codec of the tenant to whom the context's workflow belongs."""
        workflow_id: str | None = getattr(context, "workflow_id", None)
        tenant = self._encryption.tenant_of(workflow_id) if workflow_id else ""
        return self if tenant == self._tenant else type(self)(self._encryption, tenant)

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        """Return the payloads encrypted, or as they are where this process only decrypts.

        Raises KeysUnavailable, and PayloadError for a payload over Temporal's limit.
        """
        if not self._encryption.write:
            return list(payloads)
        key = await self._encryption.patiently(partial(self._encryption.keys.current, self._tenant or ""))
        cipher = key.cipher(_PURPOSE)
        return [await _off_loop(payload.ByteSize(), _encrypted, payload, cipher) for payload in payloads]

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        """Return the payloads decrypted, those in clear as they are.

        Raises PayloadError for a payload that was altered, that belongs to another tenant than the workflow, or whose
        key was deleted; KeysUnavailable.
        """
        return [await self._decoded(payload) for payload in payloads]

    async def _decoded(self, payload: Payload) -> Payload:
        if payload.metadata.get("encoding") != ENCRYPTED:
            return payload
        try:
            key_id = KeyId.parse(_text(payload, _TENANT), _text(payload, _KEY))
            if self._tenant not in (None, key_id.tenant):
                raise Unreadable(f"the payload is of tenant {key_id.tenant!r}, the workflow of {self._tenant!r}")
            cipher = (await self._encryption.patiently(partial(self._encryption.keys.get, key_id))).cipher(_PURPOSE)
            return await _off_loop(len(payload.data), _decrypted, payload, cipher)
        except Unreadable as error:
            raise PayloadError(f"an encrypted payload cannot be read: {error}") from error


def encrypted_for(payload: Payload) -> str | None:
    """Return the tenant whose key encrypts the payload, None for one in clear. Only decrypting it proves the tenant."""
    return _text(payload, _TENANT) if payload.metadata.get("encoding") == ENCRYPTED else None


def key_of(payload: Payload) -> KeyId | None:
    """Return the id of the key that encrypts the payload, None for one in clear. Raises Unreadable for a bad id."""
    return None if encrypted_for(payload) is None else KeyId.parse(_text(payload, _TENANT), _text(payload, _KEY))


def encrypting(encryption: Encryption | None) -> DataConverter:
    """Return the suite's data converter with encryption; without it for None."""
    if encryption is None:
        return data_converter
    codec = EncryptingCodec(encryption)
    if not encryption.write:
        return DataConverter(payload_converter_class=data_converter.payload_converter_class, payload_codec=codec)
    return DataConverter(
        payload_converter_class=EncryptedMessagePayloadConverter,
        payload_codec=codec,
        failure_converter_class=EncodedFailureConverter,
    )


_Convert = Callable[[Payload, Cipher], Payload]


async def _off_loop(size: int, convert: _Convert, payload: Payload, cipher: Cipher) -> Payload:
    """Return what `convert` returns; in a thread if the payload is large."""
    if size > _IN_THREAD:
        return await asyncio.to_thread(convert, payload, cipher)
    return convert(payload, cipher)


def _encrypted(payload: Payload, cipher: Cipher) -> Payload:
    data = payload.SerializeToString()
    if len(data) > _MAX_PLAIN_BYTES:
        raise _too_large(len(data))
    packed = _PLAIN + data
    if len(data) >= _WORTH_COMPRESSING and len(smaller := zlib.compress(data, _FAST)) < len(data):
        packed = _ZLIB + smaller
    key_id = cipher.key_id
    metadata = {"encoding": ENCRYPTED, _KEY: key_id.name.encode()}
    if key_id.tenant:
        metadata[_TENANT] = key_id.tenant.encode()
    encrypted = Payload(metadata=metadata, data=cipher.encrypt(packed))
    if encrypted.ByteSize() > MAX_PAYLOAD_BYTES:
        raise _too_large(encrypted.ByteSize())
    return encrypted


def _decrypted(payload: Payload, cipher: Cipher) -> Payload:
    packed = cipher.decrypt(payload.data)
    data = packed[1:]
    try:
        if packed[:1] == _ZLIB:
            unpacking = zlib.decompressobj()
            data = unpacking.decompress(data, _MAX_PLAIN_BYTES)
            if not unpacking.eof:
                raise Unreadable("it is cut or too large")
        elif packed[:1] != _PLAIN:
            raise Unreadable("a newer version has written it")
        return Payload.FromString(data)
    except (zlib.error, DecodeError) as error:
        raise Unreadable(f"it holds no payload: {error}") from error


def _too_large(size: int) -> PayloadError:
    return PayloadError(f"a payload has {size} bytes, over the limit of {MAX_PAYLOAD_BYTES} once encrypted")


def _text(payload: Payload, key: str) -> str:
    return payload.metadata.get(key, b"").decode(errors="replace")
