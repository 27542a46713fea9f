"""JSON Web Tokens of an issuer, verified with the public keys of its JSON Web Key Set.

Only asymmetric algorithms are accepted: with a symmetric one, whoever knows the public key could sign.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

import jwt

from runtime.auth import (
    Caller,
    Presented,
    check_expiry,
    credential_expired,
    credential_invalid,
)
from runtime.jwt_keys import KeySet
from runtime.tenants import check_tenant

Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
_MAX_SUBJECT: Final = 256
ANY_USER: Final = re.compile(".*", re.DOTALL)
_LEEWAY: Final = timedelta(minutes=1)
"""Maximum difference between the clocks of this process and an issuer."""


class TokenError(Exception):
    """A token is not accepted. The message says why."""


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


@dataclass(frozen=True)
class JwtRules:
    """Which tokens are accepted, and what their claims mean."""

    issuer: str
    """The claim `iss`."""
    audience: str
    """The claim `aud`, or one of its values."""
    algorithms: tuple[Algorithm, ...]
    leeway: timedelta
    """Maximum difference between the clocks of issuer and service."""
    scopes_claim: str
    """Scopes, as a text with spaces between them or as a list. Unknown scopes are ignored."""
    tenant_claim: str
    """The caller's tenant; a token without the claim is refused. Empty: no caller has a tenant."""
    user_claim: str
    """The one user whose jobs the caller may submit and read. Empty: those of all users of the tenant."""
    user_form: re.Pattern[str] = ANY_USER
    """Regular expression for the whole user claim. A user that no job can have would be refused at each call."""


class Jwts:
    """The Authenticator of an issuer's tokens."""

    hint = "a JWT as `authorization: Bearer …`"

    def __init__(self, rules: JwtRules, keys: KeySet, known_scopes: Collection[str]) -> None:
        self._rules = rules
        self._keys = keys
        self._known_scopes = frozenset(known_scopes)

    async def authenticate(self, presented: Presented) -> Caller | None:
        """See Authenticator. It takes every token, so Authenticators that know theirs by a prefix come before it."""
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
            # The last two come from deeply nested brackets and from very long numbers.
            raise credential_invalid(_problem(error)) from None
        return self._caller(claims, kid)

    def check(self, caller: Caller) -> None:
        """See Authenticator. A token cannot be revoked. It expires."""
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
    """Return what is wrong with a token. The library's own messages may quote the token."""
    match error:
        case jwt.InvalidSignatureError():
            return "the JWT's signature does not match the key that it names"
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
