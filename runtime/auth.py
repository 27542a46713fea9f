"""Authentication without a protocol: an Authenticator turns a credential into a Caller.

A token (`authorization: Bearer …`) takes precedence over a client certificate. Each kind of credential has an
Authenticator: see runtime.auth_keys, auth_jwt and auth_certificates. runtime.grpc_auth, services.codec and
runtime.health, which serves metrics, read credentials from the requests of their protocols.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from typing import Final, Protocol

_log = logging.getLogger(__name__)
CHECK_INTERVAL: Final = timedelta(seconds=1)
"""Interval at which authenticators are refreshed and the credentials of running calls are checked."""
_SCHEME: Final = "bearer"


@dataclass(frozen=True)
class Caller:
    """Who makes a call, and what they may do."""

    tenant: str
    """Empty: the installation itself, whose jobs have ids without a tenant."""
    subject: str
    """The name of the caller within the tenant. Empty: anonymous."""
    scopes: frozenset[str]
    key_id: str = ""
    """Id of the credential: that of an API key, the `kid` of a JWT, the SPIFFE id of a certificate."""
    user_id: str = ""
    """The one user whose jobs the caller may submit and read. Empty: those of all users of the tenant."""
    not_after: datetime | None = None
    """When the credential expires. None: never."""

    def may(self, scope: str) -> bool:
        """Return whether the caller has a scope, itself or by a wildcard: `admin:*` is every scope of `admin`."""
        return scope in self.scopes or f"{scope.partition(':')[0]}:*" in self.scopes

    def may_see(self, user_id: str) -> bool:
        """Return whether the caller may see the jobs of a user."""
        return self.user_id in ("", user_id)


@dataclass(frozen=True)
class Presented:
    """The credential of a call: a token, or else a client certificate, or neither."""

    token: str | None = None
    """What follows `Bearer` in the metadata."""
    certificate: bytes | None = None
    """In PEM. The TLS handshake has verified it."""


class Code(Enum):
    """What is wrong with a credential, by the names of google.rpc.Code."""

    UNAUTHENTICATED = auto()
    """There is none, or none that is valid here."""
    PERMISSION_DENIED = auto()
    """It is valid, but does not allow this."""
    UNAVAILABLE = auto()
    """It cannot be verified now."""


class Refusal(Exception):
    """A call is refused because of its credential. The message is for the client and holds no part of a credential."""

    def __init__(self, code: Code, reason: str, message: str, about: Mapping[str, str] | None = None) -> None:
        """`reason` and `about` are those of google.rpc.ErrorInfo."""
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.about = about or {}


def credential_missing(message: str) -> Refusal:
    """UNAUTHENTICATED: the call has no credential of its own."""
    return Refusal(Code.UNAUTHENTICATED, "CREDENTIAL_MISSING", message)


def credential_invalid(message: str) -> Refusal:
    """UNAUTHENTICATED: the credential is not, or no longer, valid here."""
    return Refusal(Code.UNAUTHENTICATED, "CREDENTIAL_INVALID", message)


def credential_expired() -> Refusal:
    """UNAUTHENTICATED: the credential was valid and has expired."""
    return Refusal(Code.UNAUTHENTICATED, "CREDENTIAL_EXPIRED", "the credential has expired; call with a new one")


def scope_missing(*scopes: str, user_id: str = "") -> Refusal:
    """PERMISSION_DENIED: the credential is valid, but lacks the scopes. `user_id` is the user whom it is bound to."""
    message = f"the credential lacks the scope {', '.join(scopes)}"
    bound = {"user_id": user_id} if user_id else {}
    return Refusal(Code.PERMISSION_DENIED, "MISSING_SCOPE", message, {"scope": " ".join(scopes), **bound})


def authentication_unavailable() -> Refusal:
    """UNAVAILABLE: the credential cannot be verified now."""
    message = "the JWT cannot be verified, because the issuer's keys are unavailable; call again"
    return Refusal(Code.UNAVAILABLE, "AUTHENTICATION_UNAVAILABLE", message)


class Authenticator(Protocol):
    """One kind of credential."""

    hint: str
    """What to send, for a message: "an API key"."""

    async def authenticate(self, presented: Presented) -> Caller | None:
        """Return the caller. None when nothing of this kind is presented. Raises Refusal."""

    def check(self, caller: Caller) -> None:
        """Raise Refusal if the credential of a caller that authenticate() has returned is no longer valid."""

    async def refresh(self) -> None:
        """Read what has changed. It is called every second. A failure is logged and leaves everything as it was."""


def check_expiry(caller: Caller, leeway: timedelta = timedelta(0)) -> None:
    """Raise Refusal if the caller's credential has expired for longer than the leeway."""
    if caller.not_after is not None and datetime.now(UTC) - leeway >= caller.not_after:
        raise credential_expired()


def challenge(refusal: Refusal) -> str | None:
    """Return the value of `www-authenticate` for a refusal, by RFC 6750; None where it needs none."""
    if refusal.code is not Code.UNAUTHENTICATED:
        return None
    return "Bearer" if refusal.reason == "CREDENTIAL_MISSING" else 'Bearer error="invalid_token"'


def bearer_token(values: Sequence[str | bytes]) -> str | None:
    """Return the token in the values of `authorization`, in ASCII; None without a value.

    Raises Refusal for several values and for a value that is no token.
    """
    if not values:
        return None
    if len(values) > 1:
        raise credential_invalid("the call has several credentials; send one")
    scheme, _, token = str(values[0]).partition(" ")
    if scheme.lower() != _SCHEME or not token.strip():
        raise credential_invalid("the credential must be sent as `authorization: Bearer <credential>`")
    if not token.isascii():
        raise credential_invalid("the credential must consist of ASCII characters")
    return token.strip()


async def authenticate(authenticators: Sequence[Authenticator], presented: Presented) -> tuple[Authenticator, Caller]:
    """Return the caller, and the authenticator that knows them. Raises Refusal."""
    for authenticator in authenticators:
        if (caller := await authenticator.authenticate(presented)) is not None:
            return authenticator, caller
    hints = " or ".join(authenticator.hint for authenticator in authenticators)
    if presented.token is not None:
        raise credential_invalid(f"this kind of credential is not accepted here; send {hints}")
    raise credential_missing(f"the call has no credential; send {hints}")


async def keep_refreshing(authenticators: Sequence[Authenticator]) -> None:
    """Refresh the authenticators every second, each by itself, until cancelled."""
    await asyncio.gather(*map(_keep_refreshing, authenticators))


async def _keep_refreshing(authenticator: Authenticator) -> None:
    while True:
        await asyncio.sleep(CHECK_INTERVAL.total_seconds())
        try:
            await authenticator.refresh()
        except Exception:  # noqa: BLE001  # revocations have to be noticed after any failure
            _log.exception("cannot refresh %s", type(authenticator).__name__)
