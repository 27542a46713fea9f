"""Authentication of gRPC calls, before their requests are read.

A token in the metadata (`authorization: Bearer …`) takes precedence over a client certificate.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Final, NoReturn

import grpc

from runtime import audit
from runtime.auth import (
    CHECK_INTERVAL,
    Authenticator,
    Caller,
    Presented,
    Refusal,
    authenticate,
    bearer_token,
    challenge,
    keep_refreshing,
    scope_missing,
)
from runtime.grpc_interceptor import OWN_SERVICES, Handler, Interceptor, behavior_of, with_behavior
from runtime.grpc_requests import ENDING, Ending, Unread
from runtime.tracebacks import forget_frames

_Context = grpc.aio.ServicerContext[Any, Any]
_log = logging.getLogger(__name__)
_MAX_UNREAD: Final = 100
"""Maximum number of refusals that clients leave unread."""
_METADATA_KEY: Final = "authorization"


_caller: ContextVar[Caller] = ContextVar("caller")


def current_caller() -> Caller:
    """Return the caller of the call that is being handled. Raises LookupError outside of a call.

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
        """End the call if its credential is no longer valid, after the message that is being sent."""
        try:
            self._authenticator.check(self._caller)
        except Refusal as refusal:
            self.ending.error = refusal
            if self._task is not None and not self.ending.sending and not self._cancelled:
                self._cancelled = True
                self._task.cancel()

    def reason_of_cancel(self) -> Exception | None:
        """Return why check() has cancelled the call. None if gRPC has cancelled it, too, because the client has
        left."""
        if self._task is None or not self._cancelled or self._task.uncancel():
            return None
        return self.ending.error


class AuthInterceptor(Interceptor):
    """Authenticates each call, and refuses calls without a valid credential or without the scope of the method.

    Health and reflection are open to everybody. It comes after the telemetry, which measures refusals, and before all
    interceptors that read requests.
    """

    def __init__(
        self,
        authenticators: Sequence[Authenticator],
        anonymous: Caller | None,
        scopes: Mapping[str, str],
        details: Callable[[Refusal], Sequence[tuple[str, bytes]]],
    ) -> None:
        """`anonymous` is the caller of all calls when there are no authenticators.

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
        """Refresh the authenticators and end the calls whose credentials are no longer valid, until cancelled."""
        await asyncio.gather(keep_refreshing(self._authenticators), self._keep_checking())

    async def _admit(
        self, method: str, tokens: Sequence[str | bytes], context: _Context
    ) -> tuple[Authenticator | None, Caller]:
        authenticator, caller = await self._authenticate(tokens, context)
        audit.describe(tenant=caller.tenant, subject=caller.subject, key_id=caller.key_id)
        scope = self._scopes.get(method)
        if scope is None or not caller.may(scope):
            raise scope_missing(scope or "of this method, which nobody has", user_id=caller.user_id)
        _caller.set(caller)
        return authenticator, caller

    async def _authenticate(
        self, tokens: Sequence[str | bytes], context: _Context
    ) -> tuple[Authenticator | None, Caller]:
        if not self._authenticators and self._anonymous is not None:
            return None, self._anonymous
        return await authenticate(self._authenticators, _presented(tokens, context))

    async def _while_valid(self, running: _Running, handling: Awaitable[Any]) -> Any:
        """Await the handler of a call. Raises Refusal when its credential is no longer valid."""
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
        if (needed := challenge(refusal)) is not None:
            trailers.append(("www-authenticate", needed))  # type: ignore[arg-type]  # text is accepted, too
        await audit.refuse(refusal.code.name, refusal.reason)
        try:
            await context.abort(grpc.StatusCode[refusal.code.name], str(refusal), tuple(trailers))
        except grpc.aio.AbortError as error:
            forget_frames(error)
            raise

    async def _keep_checking(self) -> None:
        while True:
            await asyncio.sleep(CHECK_INTERVAL.total_seconds())
            for running in tuple(self._running):
                try:
                    running.check()
                except Exception:  # noqa: BLE001  # the other calls have to be checked after any failure
                    _log.exception("cannot check the credential of a running call")


def _presented(tokens: Sequence[str | bytes], context: _Context) -> Presented:
    """Return the credential of the call. Raises Refusal for metadata that is no credential."""
    if tokens:
        return Presented(token=bearer_token(tokens))
    about: Any = context.auth_context()
    (kind,) = about.get("transport_security_type", ()) or (b"",)
    certificates = about.get("x509_pem_cert", ()) if kind in (b"ssl", b"tls") else ()
    return Presented(certificate=bytes(certificates[0]) if certificates else None)
