"""Renews the credentials of sessions before they expire."""

import asyncio
import dataclasses
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple

from services.http.signin.issuer import GrantRefused, Issuer, IssuerUnavailable
from services.http.signin.session import Session

_log = logging.getLogger(__name__)
_REMEMBERED: Final = 30.0
"""Seconds for which the outcome of a renewal is remembered."""
_MAX_REMEMBERED: Final = 10_000


class _Renewal(NamedTuple):
    task: "asyncio.Task[Session]"
    began: float


class Renewals:
    """Renews sessions by their refresh tokens.

    A page makes several concurrent requests with the same refresh token, which a provider may accept only once. So they
    share one renewal. A request that arrives after it has ended gets its outcome, too.
    """

    def __init__(self, issuer: Issuer | None, fits: Callable[[Session], bool]) -> None:
        """Without an issuer no session is renewed. `fits` returns whether a browser can keep a session."""
        self._issuer = issuer
        self._fits = fits
        self._renewals: OrderedDict[bytes, _Renewal] = OrderedDict()

    async def renewed(self, session: Session) -> Session:
        """Return the session with a new credential if one is due and available, or else the session unchanged.

        The gateway says whether an old credential still counts.
        """
        if self._issuer is None or not session.refresh_token or time.time() < session.renew_at:
            return session
        # At some providers a new sign-in has the same refresh token.
        key = hashlib.sha256(f"{session.secret} {session.refresh_token}".encode()).digest()
        self._forget()
        if key not in self._renewals:
            task = asyncio.create_task(self._renew(self._issuer, session))
            self._renewals[key] = _Renewal(task, time.monotonic())
        return await asyncio.shield(self._renewals[key].task)

    async def _renew(self, issuer: Issuer, session: Session) -> Session:
        try:
            tokens = await issuer.refresh(session.refresh_token)
        except (IssuerUnavailable, GrantRefused) as error:
            _log.warning("a session cannot be renewed: %s", error)
            return session
        if tokens.subject not in ("", session.subject):
            _log.error("the OpenID provider has renewed a session with the token of somebody else")
            return session
        renewed = dataclasses.replace(
            session,
            credential=tokens.credential,
            refresh_token=tokens.refresh_token,
            renew_at=tokens.renew_at,
        )
        if not self._fits(renewed):
            _log.error("a session is not renewed: the OpenID provider's tokens have become too large for its cookies")
            return session
        return renewed

    def _forget(self) -> None:
        now = time.monotonic()
        while self._renewals and (
            len(self._renewals) >= _MAX_REMEMBERED or now >= next(iter(self._renewals.values())).began + _REMEMBERED
        ):
            self._renewals.popitem(last=False)
