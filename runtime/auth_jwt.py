"""JSON Web Tokens of an issuer, verified with the public keys of its JSON Web Key Set.

The only module that imports jwt. Only asymmetric algorithms count: with a symmetric one, whoever knows the public key
could sign.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, Literal

import aiohttp
import jwt

from runtime.auth import (
    Caller,
    Presented,
    authentication_unavailable,
    check_expiry,
    credential_expired,
    credential_invalid,
)
from runtime.tenants import check_tenant

_log = logging.getLogger(__name__)
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
_ASYMMETRIC: Final = ("RSA", "EC", "OKP")
"""The key types (`kty`) that count."""
_UNKNOWN_INTERVAL: Final = timedelta(minutes=1)
"""How often it is fetched at most because a token names a key that is not in it."""
_FETCH_TIMEOUT: Final = timedelta(seconds=5)
_TOTAL: Final = aiohttp.ClientTimeout(total=_FETCH_TIMEOUT.total_seconds())
_MAX_WAITING: Final = 100
"""Maximum number of calls that wait for a fetch. An issuer that hangs would hold all calls with forged tokens."""
_MAX_SET_BYTES: Final = 1024 * 1024
_MAX_SUBJECT: Final = 256
ANY_USER: Final = re.compile(".*", re.DOTALL)
_LEEWAY: Final = timedelta(minutes=1)
"""How far the clocks of this process and an issuer may differ."""
_NEVER: Final = float("-inf")


class KeySetError(Exception):
    """The key set cannot be had. The message says why."""


class TokenError(Exception):
    """A token does not count. The message says why."""


def claims_of(token: str, issuer: str, audience: str) -> Mapping[str, Any]:
    """Return the claims of a token that the issuer itself has handed over. Its signature is not verified.

    Raises TokenError for one of another issuer or audience, and for one that has expired.
    """
    try:
        return jwt.decode(
            token,
            audience=audience,
            issuer=issuer,
            leeway=_LEEWAY,
            options={
                "verify_signature": False,
                "verify_exp": True,
                "verify_aud": True,
                "verify_iss": True,
                "require": ["exp", "sub", "iss", "aud"],
            },
        )
    except (jwt.PyJWTError, RecursionError, OverflowError) as error:
        raise TokenError(_problem(error)) from None


class KeySet:
    """The keys of an issuer: the last good ones while it is away."""

    def __init__(
        self,
        source: str,
        *,
        lifetime: timedelta = timedelta(minutes=5),
        retry_interval: timedelta = timedelta(seconds=10),
    ) -> None:
        """`source`: a URL, or the path of a file.

        It is read every `lifetime`: a key that the issuer has withdrawn counts no longer than that; and every
        `retry_interval` while the issuer is away.
        """
        self._source = source
        self._lifetime = lifetime
        self._retry_interval = retry_interval
        self._keys: Mapping[str, jwt.PyJWK] = {}
        self._due_at = _NEVER
        self._asked_at = _NEVER
        self._failing = True
        self._fetching: asyncio.Task[None] | None = None
        self._waiting = 0
        # Fetches have no thread of those that refresh API keys, which an issuer that hangs would take one by one.
        self._thread = ThreadPoolExecutor(1, "jwt-keys")
        self._reading: asyncio.Future[dict[str, jwt.PyJWK]] | None = None

    async def key(self, kid: str) -> jwt.PyJWK:
        """Return the key. Raises Refusal for one that is not in the set."""
        if kid not in self._keys:
            await self._look_for_new_keys()
        if (key := self._keys.get(kid)) is not None:
            return key
        # The issuer may have a key by now that is not known here.
        raise authentication_unavailable() if self._failing else credential_invalid("the JWT's key is unknown")

    async def refresh(self) -> None:
        """Fetch the set if it is due. Logs what fails."""
        if time.monotonic() < self._due_at:
            return
        await asyncio.shield(self._fetching or self._begin())

    async def _look_for_new_keys(self) -> None:
        """Fetch the set if that is allowed now, or wait for the fetch that runs. Raises Refusal when too many wait."""
        if self._fetching is None:
            if time.monotonic() - self._asked_at < _UNKNOWN_INTERVAL.total_seconds():
                return
            self._asked_at = time.monotonic()
            self._begin()
        elif self._failing and self._due_at != _NEVER:
            # The fetch will probably fail, too.
            return
        if self._waiting >= _MAX_WAITING:
            raise authentication_unavailable()
        self._waiting += 1
        try:
            await asyncio.shield(self._fetching or self._begin())
        finally:
            self._waiting -= 1

    def _begin(self) -> asyncio.Task[None]:
        self._fetching = asyncio.create_task(self._fetch())
        return self._fetching

    async def _fetch(self) -> None:
        try:
            self._keys = await self._read()
        except KeySetError as error:
            if not self._failing or self._due_at == _NEVER:
                _log.error("the keys of JWTs stay as they were: %s", error)
            self._failing, wait = True, self._retry_interval
        else:
            if self._failing:
                _log.info("read %d keys of JWTs", len(self._keys))
            self._failing, wait = False, self._lifetime
        finally:
            self._fetching = None
        self._due_at = time.monotonic() + wait.total_seconds()

    async def _read(self) -> dict[str, jwt.PyJWK]:
        """Return the keys that the issuer has. Raises KeySetError, within a bounded time."""
        if self._reading is None:
            self._reading = asyncio.get_running_loop().run_in_executor(self._thread, _read, self._source)
        # A thread cannot be cancelled. One that still hangs, in a look-up of a name say, is waited for again next time.
        done, _ = await asyncio.wait([self._reading], timeout=2 * _FETCH_TIMEOUT.total_seconds())
        if not done:
            raise KeySetError(f"{self._source}: no answer in time")
        reading, self._reading = self._reading, None
        return reading.result()


@dataclass(frozen=True)
class JwtRules:
    """Which tokens count, and what their claims mean."""

    issuer: str
    """The claim `iss`."""
    audience: str
    """The claim `aud`, or one of its values."""
    algorithms: tuple[Algorithm, ...]
    leeway: timedelta
    """How far the clocks of issuer and gateway may differ."""
    scopes_claim: str
    """A text of scopes with spaces between, or a list of them. Others than the known ones are overlooked."""
    tenant_claim: str
    """The caller's tenant; a token without the claim is refused. Empty: no caller has a tenant."""
    user_claim: str
    """The one user whose jobs the caller may submit and read. Empty: no such bound."""
    user_form: re.Pattern[str] = ANY_USER
    """What the whole of the user claim must match. A user that no job can have would be refused at each call."""


class Jwts:
    """The Authenticator of an issuer's tokens."""

    hint = "a JWT as `authorization: Bearer …`"

    def __init__(self, rules: JwtRules, keys: KeySet, known_scopes: Collection[str]) -> None:
        self._rules = rules
        self._keys = keys
        self._known_scopes = frozenset(known_scopes)

    async def authenticate(self, presented: Presented) -> Caller | None:
        """See Authenticator. Takes every token: belongs behind those that know theirs by a prefix."""
        if presented.token is None:
            return None
        try:
            header = jwt.get_unverified_header(presented.token)
            if header.get("alg") not in self._rules.algorithms:
                raise credential_invalid(f"the JWT's algorithm must be {' or '.join(self._rules.algorithms)}")
            if not isinstance(kid := header.get("kid"), str):
                raise credential_invalid("the JWT must name its key (kid)")
            claims = jwt.decode(
                presented.token,
                await self._keys.key(kid),
                algorithms=self._rules.algorithms,
                audience=self._rules.audience,
                issuer=self._rules.issuer,
                leeway=self._rules.leeway,
                options={"require": ["exp", "sub", "iss", "aud"], "enforce_minimum_key_length": True},
            )
        except jwt.ExpiredSignatureError:
            raise credential_expired() from None
        except (jwt.PyJWTError, RecursionError, OverflowError) as error:
            # The last two: brackets within brackets, numbers without end.
            raise credential_invalid(_problem(error)) from None
        return self._caller(claims, kid)

    def check(self, caller: Caller) -> None:
        """See Authenticator. A token cannot be revoked, it expires."""
        check_expiry(caller, self._rules.leeway)

    async def refresh(self) -> None:
        """See Authenticator."""
        await self._keys.refresh()

    def _caller(self, claims: Mapping[str, Any], kid: str) -> Caller:
        rules = self._rules
        try:
            not_after = datetime.fromtimestamp(int(claims["exp"]), UTC)
        except (ValueError, OverflowError, OSError):
            raise credential_invalid("the JWT's claim exp is no time") from None
        try:
            tenant = check_tenant(_text(claims, rules.tenant_claim)) if rules.tenant_claim else ""
        except ValueError:
            raise credential_invalid(f"the JWT's claim {rules.tenant_claim} is no tenant's name") from None
        user_id = _text(claims, rules.user_claim) if rules.user_claim else ""
        if user_id and not rules.user_form.fullmatch(user_id):
            raise credential_invalid(f"the JWT's claim {rules.user_claim} is no user_id: see llm.proto")
        return Caller(tenant, _text(claims, "sub"), self._scopes(claims), kid, user_id, not_after)

    def _scopes(self, claims: Mapping[str, Any]) -> frozenset[str]:
        claim = claims.get(self._rules.scopes_claim, ())
        named = claim.split() if isinstance(claim, str) else claim if isinstance(claim, list) else ()
        return self._known_scopes & {scope for scope in named if isinstance(scope, str)}


def _problem(error: Exception) -> str:
    """Return what is wrong with a token. The library's own texts may repeat what the token says."""
    match error:
        case jwt.InvalidSignatureError():
            return "the JWT's signature is not that of the key it names"
        case jwt.InvalidAudienceError():
            return "the JWT is for another audience (aud)"
        case jwt.InvalidIssuerError():
            return "the JWT is of another issuer (iss)"
        case jwt.ImmatureSignatureError():
            return "the JWT is not valid yet (nbf, iat)"
        case jwt.MissingRequiredClaimError():
            return f"the JWT lacks the claim {error.claim}"
        case jwt.DecodeError():
            return "the token is no JWT"
        case _:
            return "the JWT cannot be verified"


def _text(claims: Mapping[str, Any], name: str) -> str:
    value = claims.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_SUBJECT:
        raise credential_invalid(f"the JWT's claim {name} must be a text of 1 to {_MAX_SUBJECT} characters")
    return value


def _read(source: str) -> dict[str, jwt.PyJWK]:
    """Return the keys of a set by their names. Raises KeySetError."""
    try:
        # In an event loop of its own, so that this thread has the look-up of the name as well.
        data = asyncio.run(_download(source)) if "://" in source else Path(source).read_bytes()
        if len(data) > _MAX_SET_BYTES:
            raise KeySetError(f"{source} has more than {_MAX_SET_BYTES} bytes")
        found = jwt.PyJWKSet.from_dict(json.loads(data))
    except TimeoutError as error:
        raise KeySetError(f"{source}: no answer within {_FETCH_TIMEOUT.total_seconds():g} s") from error
    except (OSError, aiohttp.ClientError, ValueError, AttributeError, jwt.PyJWTError, RecursionError) as error:
        # AttributeError: it is JSON, but no object.
        raise KeySetError(f"{source} is no key set that can be had: {error}") from error
    return {
        key.key_id: key
        for key in found
        if key.key_id and key.key_type in _ASYMMETRIC and key.public_key_use in (None, "sig")
    }


async def _download(url: str) -> bytes:
    """Return the answer, cut after a few bytes more than a set may have."""
    data = bytearray()
    async with (
        aiohttp.ClientSession(timeout=_TOTAL, trust_env=True, raise_for_status=True) as session,
        # A redirect could lead from TLS to none.
        session.get(url, allow_redirects=False) as answer,
    ):
        if answer.status != HTTPStatus.OK:
            raise KeySetError(f"{url} answers with the status {answer.status}")
        async for piece in answer.content.iter_any():
            data += piece
            if len(data) > _MAX_SET_BYTES:
                break
    return bytes(data)
