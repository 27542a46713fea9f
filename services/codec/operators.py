"""What an operator of the codec server may do: decrypt and encrypt the payloads of the credential's tenant, or of all.

A payload in clear is nobody's: a caller gets back only what it has sent.
"""

import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from temporalio.api.common.v1 import Payload

from encryption import Encryption, KeysUnavailable
from payload_converter import PayloadError
from payload_converter.encryption import EncryptingCodec, encrypted_for
from runtime.auth import Caller, Code, Refusal, scope_missing
from runtime.scopes import ALL_TENANTS, CODEC
from services.codec.conversion import decode_payload, encode_payload

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Operator:
    """Who makes a request, and for which tenant."""

    caller: Caller
    tenant: str | None
    """The tenant whose payloads are decrypted; empty for payloads without a tenant. None: those of all tenants."""


@dataclass
class Work:
    """One request, and what was done for it."""

    operator: Operator
    encryption: Encryption | None
    """None: nothing is decrypted or encrypted."""
    decrypted: Counter[str] = field(default_factory=Counter)
    """The payloads that were decrypted, by tenant."""
    encrypted: Counter[str] = field(default_factory=Counter)
    """The payloads that were encrypted, by tenant."""
    withheld: int = 0
    """The payloads of tenants that are not the operator's."""


Convert = Callable[[Work, Payload], Awaitable[Payload]]
"""Converts one payload of a request."""


def operator(caller: Caller, tenant: str | None) -> Operator:
    """Return the operator. `tenant` is the one that the request names, if any. Raises Refusal."""
    if not caller.may(CODEC):
        raise scope_missing(CODEC)
    if caller.user_id:
        # A payload does not tell whose it is within its tenant.
        message = "the credential is bound to a user; an operator's is not"
        raise Refusal(Code.PERMISSION_DENIED, "USER_NOT_ALLOWED", message)
    if caller.may(ALL_TENANTS):
        return Operator(caller, tenant)
    if tenant not in (None, caller.tenant):
        raise scope_missing(ALL_TENANTS)
    return Operator(caller, caller.tenant)


async def decode(work: Work, payload: Payload) -> Payload:
    """Return the payload decrypted and as JSON.

    What stands for one of another tenant says so. One that cannot be decrypted is returned as it is.
    """
    tenant = encrypted_for(payload)
    if tenant is None or work.encryption is None:
        return decode_payload(payload)
    if work.operator.tenant not in (None, tenant):
        work.withheld += 1
        return _of_another_tenant(tenant)
    try:
        (payload,) = await EncryptingCodec(work.encryption, tenant).decode([payload])
    except (PayloadError, KeysUnavailable) as error:
        _log.warning("a payload is shown encrypted: %s", error)
    else:
        work.decrypted[tenant] += 1
    return decode_payload(payload)


async def encode(work: Work, payload: Payload) -> Payload:
    """Return the payload encoded and encrypted. Raises KeysUnavailable, and PayloadError for a large payload."""
    encoded = encode_payload(payload)
    if work.encryption is None:
        return encoded
    tenant = work.operator.tenant or ""
    (encoded,) = await EncryptingCodec(work.encryption, tenant).encode([encoded])
    if encrypted_for(encoded) is not None:
        work.encrypted[tenant] += 1
    return encoded


_WITHHELD: Final = "encrypted for tenant {!r}, whose payloads this credential does not decrypt"


def _of_another_tenant(tenant: str) -> Payload:
    # In the form of a failure's encrypted attributes, whose place it takes as well as that of a value.
    text = _WITHHELD.format(tenant) if tenant else "encrypted without a tenant, which this credential does not decrypt"
    return Payload(metadata={"encoding": b"json/plain"}, data=json.dumps({"message": text}).encode())
