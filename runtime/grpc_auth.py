"""Who calls: a Caller is made of each call's credential, before anything of its request is read.

A credential in the metadata (`authorization: Bearer …`) counts, and a client certificate only without one. What kinds
of credentials there are is for the Authenticators to say: see runtime.auth_keys, auth_jwt and auth_certificates.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NoReturn, Protocol

import grpc

from runtime import audit
from runtime.grpc_interceptor import OWN_SERVICES, Handler, Interceptor, behavior_of, with_behavior
from runtime.grpc_requests import ENDING, Ending, Unread
from runtime.tracebacks import forget_frames

_log = logging.getLogger(__name__)
_Context = grpc.aio.ServicerContext[Any, Any]
_CHECK_INTERVAL: Final = timedelta(seconds=1)
"""How often the credentials of running calls are checked, and authenticators refreshed."""
_MAX_UNREAD: Final = 100
"""Refusals that may be unread for longer than a moment."""
_METADATA_KEY: Final = "authorization"
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
    """Which credential it was: the id of an API key, the `kid` of a JWT, the SPIFFE id of a certificate."""
    user_id: str = ""
    """The one user whose jobs the caller may submit and read. Empty: those of all users of the tenant."""
    not_after: datetime | None = None
    """When the credential expires. None: never."""

    def may(self, scope: str) -> bool:
        """Return whether the caller has a scope, itself or by a wildcard: `admin:*` is every scope of `admin`."""
        return scope in self.scopes or f"{scope.partition(':')[0]}:*" in self.scopes

    def may_see(self, user_id: str) -> bool:
        """Return whether the jobs of a user are the caller's to see."""
        return self.user_id in ("", user_id)


@dataclass(frozen=True)
class Presented:
    """What a call has presented: a token, or else a client certificate, or neither."""

    token: str | None = None
    """What follows `Bearer` in the metadata."""
    certificate: bytes | None = None
    """In PEM. The TLS handshake has verified it."""


class Refusal(Exception):
    """A call that ends for who made it. The message is for the client: never a part of a credential."""

    def __init__(
        self, code: grpc.StatusCode, reason: str, message: str, about: Mapping[str, str] | None = None
    ) -> None:
        """`reason` and `about` are those of google.rpc.ErrorInfo."""
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.about = about or {}


def credential_missing(message: str) -> Refusal:
    """UNAUTHENTICATED: the call has no credential of its own."""
    return Refusal(grpc.StatusCode.UNAUTHENTICATED, "CREDENTIAL_MISSING", message)


def credential_invalid(message: str) -> Refusal:
    """UNAUTHENTICATED: the credential is not, or is no longer, one that counts here."""
    return Refusal(grpc.StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID", message)


def credential_expired() -> Refusal:
    """UNAUTHENTICATED: the credential was good."""
    return Refusal(
        grpc.StatusCode.UNAUTHENTICATED, "CREDENTIAL_EXPIRED", "the credential has expired; call with a new one"
    )


def scope_missing(*scopes: str) -> Refusal:
    """PERMISSION_DENIED: the credential is good, but not for this."""
    message = f"the credential lacks the scope {', '.join(scopes)}"
    return Refusal(grpc.StatusCode.PERMISSION_DENIED, "MISSING_SCOPE", message, {"scope": " ".join(scopes)})


def authentication_unavailable() -> Refusal:
    """UNAVAILABLE: whether the credential is good cannot be told now."""
    message = "the issuer's keys cannot be had, so that the JWT cannot be verified; call again"
    return Refusal(grpc.StatusCode.UNAVAILABLE, "AUTHENTICATION_UNAVAILABLE", message)


class Authenticator(Protocol):
    """One kind of credential."""

    hint: str
    """What to send, for a message: "an API key"."""

    async def authenticate(self, presented: Presented) -> Caller | None:
        """Return the caller. None when nothing of this kind is presented. Raises Refusal."""

    def check(self, caller: Caller) -> None:
        """Raise Refusal if the credential of a caller, whom authenticate() has returned, does not count any more."""

    async def refresh(self) -> None:
        """Learn what has changed: called every second. Logs what fails and goes on with what it knows."""


def check_expiry(caller: Caller, leeway: timedelta = timedelta(0)) -> None:
    """Raise Refusal if the caller's credential has expired for longer than the leeway."""
    if caller.not_after is not None and datetime.now(UTC) >= caller.not_after + leeway:
        raise credential_expired()


_caller: ContextVar[Caller] = ContextVar("caller")


def current_caller() -> Caller:
    """Return who makes the call that is being handled. Raises LookupError outside of a call.

    A task that outlives the call, or that works for several of them, must be given its caller instead.
    """
    return _caller.get()


class _Running:
    """The call that the current task handles."""

    def __init__(self, caller: Caller, authenticator: Authenticator) -> None:
        self._caller = caller
        self._authenticator = authenticator
        self._task = asyncio.current_task()
        self._cancelled = False
        self.ending = Ending()

    def check(self) -> None:
        """End the call if its credential does not count any more; after the message that is being sent."""
        try:
            self._authenticator.check(self._caller)
        except Refusal as refusal:
            self.ending.error = refusal
            if self._task is not None and not self.ending.sending and not self._cancelled:
                self._cancelled = True
                self._task.cancel()

    def reason_of_cancel(self) -> Exception | None:
        """Return why check() has cancelled the call; None if somebody else has, too: gRPC, for a client that left."""
        if self._task is None or not self._cancelled or self._task.uncancel():
            return None
        return self.ending.error


class AuthInterceptor(Interceptor):
    """Makes the Caller of each call, and refuses calls without one or without the scope of the method.

    Health and reflection are open to everybody. Belongs behind the telemetry, which measures refusals, and before all
    interceptors that read requests.
    """

    def __init__(
        self,
        authenticators: Sequence[Authenticator],
        anonymous: Caller | None,
        scopes: Mapping[str, str],
        details: Callable[[Refusal], Sequence[tuple[str, bytes]]],
    ) -> None:
        """`anonymous` makes the calls when there are no authenticators.

        `scopes`: the scope of each method by its path, /llm.v1.LlmService/Submit. A method without one is refused.
        `details`: the trailing metadata of a refusal.
        """
        self._authenticators = authenticators
        self._anonymous = anonymous
        self._scopes = scopes
        self._details = details
        self._running: set[_Running] = set()
        self.unread = Unread(_MAX_UNREAD)
        """The refusals."""

    def wrap(self, handler: Handler, call: grpc.HandlerCallDetails) -> Handler:
        """Wrap the handlers of all services but health and reflection."""
        if call.method.startswith(OWN_SERVICES):
            return handler
        method, handle = call.method, behavior_of(handler)
        tokens = [value for key, value in call.invocation_metadata or () if key == _METADATA_KEY]

        async def call_as(requests: Any, context: _Context) -> Any:
            try:
                authenticator, caller = await self._admit(method, tokens, context)
                if authenticator is None:
                    return await handle(requests, context)
                return await self._while_valid(_Running(caller, authenticator), handle(requests, context))
            except Refusal as refusal:
                await self._refuse(context, refusal)

        return with_behavior(handler, call_as)

    async def keep_current(self) -> None:
        """Refresh the authenticators, and end the calls whose credentials do not count any more, until cancelled."""
        await asyncio.gather(*map(self._keep_refreshing, self._authenticators), self._keep_checking())

    async def _admit(
        self, method: str, tokens: Sequence[str | bytes], context: _Context
    ) -> tuple[Authenticator | None, Caller]:
        authenticator, caller = await self._authenticate(tokens, context)
        audit.describe(tenant=caller.tenant, subject=caller.subject, key_id=caller.key_id)
        scope = self._scopes.get(method)
        if scope is None or not caller.may(scope):
            raise scope_missing(scope or "of this method, which nobody has")
        _caller.set(caller)
        return authenticator, caller

    async def _authenticate(
        self, tokens: Sequence[str | bytes], context: _Context
    ) -> tuple[Authenticator | None, Caller]:
        if not self._authenticators and self._anonymous is not None:
            return None, self._anonymous
        presented = _presented(tokens, context)
        for authenticator in self._authenticators:
            if (caller := await authenticator.authenticate(presented)) is not None:
                return authenticator, caller
        hints = " or ".join(authenticator.hint for authenticator in self._authenticators)
        if presented.token is not None:
            raise credential_invalid(f"no credential of this kind counts here; send {hints}")
        raise credential_missing(f"the call has no credential; send {hints}")

    async def _while_valid(self, running: _Running, handling: Awaitable[Any]) -> Any:
        """Return what handles a call; raises Refusal when its credential does not count any more."""
        self._running.add(running)
        ENDING.set(running.ending)
        try:
            return await handling
        except asyncio.CancelledError:
            if (reason := running.reason_of_cancel()) is None:
                raise
        finally:
            self._running.discard(running)
        raise reason

    async def _refuse(self, context: _Context, refusal: Refusal) -> NoReturn:
        self.unread.add(context)
        done: Any = self.unread.remove
        context.add_done_callback(done)
        trailers = [*self._details(refusal)]
        if refusal.code == grpc.StatusCode.UNAUTHENTICATED:
            # As HTTP has it: RFC 6750.
            bad = "" if refusal.reason == "CREDENTIAL_MISSING" else ' error="invalid_token"'
            trailers.append(("www-authenticate", f"Bearer{bad}"))  # type: ignore[arg-type]  # text is as good as bytes
        await audit.refuse(refusal.code.name, refusal.reason)
        try:
            await context.abort(refusal.code, str(refusal), tuple(trailers))
        except grpc.aio.AbortError as error:
            forget_frames(error)
            raise

    async def _keep_refreshing(self, authenticator: Authenticator) -> None:
        while True:
            await asyncio.sleep(_CHECK_INTERVAL.total_seconds())
            try:
                await authenticator.refresh()
            except Exception:  # noqa: BLE001  # whatever it was, revocations have to be seen from now on, too
                _log.exception("cannot refresh %s", type(authenticator).__name__)

    async def _keep_checking(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_INTERVAL.total_seconds())
            for running in tuple(self._running):
                running.check()


def _presented(tokens: Sequence[str | bytes], context: _Context) -> Presented:
    """Return what the call presents. Raises Refusal for metadata that is no credential of any kind."""
    if not tokens:
        about: Any = context.auth_context()
        (kind,) = about.get("transport_security_type", ()) or (b"",)
        certificates = about.get("x509_pem_cert", ()) if kind in (b"ssl", b"tls") else ()
        return Presented(certificate=bytes(certificates[0]) if certificates else None)
    if len(tokens) > 1:
        raise credential_invalid("the call has several credentials in its metadata; send one")
    scheme, _, token = str(tokens[0]).partition(" ")
    if scheme.lower() != _SCHEME or not token.strip():
        raise credential_invalid("the credential must be sent as `authorization: Bearer <credential>`")
    return Presented(token=token.strip())
