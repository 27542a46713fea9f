"""The OpenID provider: where it is, and the tokens that it gives for a code or a refresh token.

OpenID Connect Core 1.0 and Discovery 1.0: the authorization code flow with PKCE (RFC 7636).
"""

import base64
import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote_plus, urlencode, urlsplit

from runtime.addresses import is_confidential
from runtime.auth_jwt import TokenError, claims_of
from runtime.bounded_fetch import FetchError, fetch
from runtime.health import Readiness
from runtime.shared_calls import SharedCalls
from runtime.tls import client_context
from services.http.signin.settings import SignInSettings, read_secret

_log = logging.getLogger(__name__)
_TIMEOUT: Final = timedelta(seconds=10)
_MAX_ANSWER: Final = 256 * 1024
"""Maximum size of an answer of the provider, in bytes."""
_RETRY_INTERVAL: Final = 5.0
"""Seconds after which metadata that could not be read are requested again."""
_MARGIN: Final = 60.0
"""A token is renewed this many seconds before it expires, but not in the first half of its life."""
_MAX_USER: Final = 100
CALLBACK: Final = "/console/signin/oidc/callback"
"""The path to which the provider sends a browser back."""


class IssuerUnavailable(Exception):
    """The provider cannot be reached or its answer is invalid. The message is for the log of the front."""


class GrantRefused(Exception):
    """The provider refuses the grant, or its tokens are invalid. The message is for the log of the front."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of the provider, and what they say of their owner."""

    credential: str
    """The token for the gateway."""
    subject: str
    """The subject (`sub`). Empty after a refresh without an id token."""
    user: str
    """A name to show."""
    refresh_token: str
    """Empty: there is none."""
    renew_at: float
    """When to renew them, in seconds since 1970."""


@dataclass(frozen=True)
class _Metadata:
    authorization_endpoint: str
    token_endpoint: str
    in_body: bool
    """Whether the client's secret is sent in the body, because the provider accepts it only there."""


class Issuer:
    """The provider of the settings."""

    def __init__(
        self,
        settings: SignInSettings,
        readiness: Readiness | None = None,
        *,
        metadata_lifetime: timedelta = timedelta(minutes=10),
    ) -> None:
        """The provider's metadata are read again every `metadata_lifetime`.

        `readiness` names the file of the CAs while it cannot be used.

        Raises OSError, ValueError for a file that cannot be used.
        """
        self._settings = settings
        self._metadata_lifetime = metadata_lifetime.total_seconds()
        secret = settings.oidc_client_secret_file
        self._secret = read_secret(secret) if secret is not None else ""
        tls = settings.oidc_tls
        self._ssl = client_context(tls, readiness) if tls is not None else True
        self._redirect_uri = settings.public_url + CALLBACK
        self._metadata: _Metadata | None = None
        self._read_next = 0.0
        """Time of the monotonic clock at which the metadata are read again."""
        self._problem = ""
        """Why the metadata could not be read the last time; empty if they could."""
        self._reading = SharedCalls()

    @property
    def issuer(self) -> str:
        """The name of the provider in its tokens."""
        return self._settings.oidc_issuer

    @property
    def name(self) -> str:
        """The name of the provider, to be shown."""
        return urlsplit(self._settings.oidc_issuer).hostname or ""

    async def authorization_url(self, state: str, nonce: str, verifier: str) -> str:
        """Return the URL to which the browser is redirected. Raises IssuerUnavailable."""
        metadata = await self._discover()
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")
        query = {
            "response_type": "code",
            "client_id": self._settings.oidc_client_id,
            "redirect_uri": self._redirect_uri,
            "scope": self._settings.oidc_scopes,
            "state": state,
            "nonce": nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        separator = "&" if urlsplit(metadata.authorization_endpoint).query else "?"
        return f"{metadata.authorization_endpoint}{separator}{urlencode(query)}"

    async def exchange(self, code: str, verifier: str, nonce: str) -> Tokens:
        """Return the tokens for a code. Raises IssuerUnavailable, GrantRefused."""
        answer = await self._grant(
            {
                "grant_type": "authorization_code",
                "code": code,
                "redirect_uri": self._redirect_uri,
                "code_verifier": verifier,
            }
        )
        claims = self._claims(answer)
        if claims.get("nonce") != nonce:
            raise GrantRefused("the id token's nonce is another one")
        return self._tokens(answer, claims, "")

    async def refresh(self, refresh_token: str) -> Tokens:
        """Return new tokens. Raises IssuerUnavailable, GrantRefused."""
        answer = await self._grant({"grant_type": "refresh_token", "refresh_token": refresh_token})
        claims = self._claims(answer) if "id_token" in answer else {}
        return self._tokens(answer, claims, refresh_token)

    def _claims(self, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the claims of the id token.

        It came from the provider itself, by TLS, so that its signature need not be verified (OpenID Connect Core,
        3.1.3.7, 6). The gateway verifies what goes to the gateway.
        """
        client_id = self._settings.oidc_client_id
        try:
            claims = claims_of(str(answer.get("id_token", "")), self._settings.oidc_issuer, client_id)
        except TokenError as error:
            raise GrantRefused(f"the id token is invalid: {error}") from None
        if claims.get("azp", client_id) != client_id:
            raise GrantRefused("the id token is for another client")
        return claims

    def _tokens(self, answer: Mapping[str, Any], claims: Mapping[str, Any], refresh_token: str) -> Tokens:
        name = f"{self._settings.oidc_token}_token"
        credential, refreshed = answer.get(name), answer.get("refresh_token", refresh_token)
        if not (isinstance(credential, str) and credential.isascii() and credential.isprintable() and credential):
            raise GrantRefused(f"the answer holds no {name}")
        now, life = time.time(), answer.get("expires_in")
        if self._settings.oidc_token == "id":  # noqa: S105  # which kind it is
            life = float(claims["exp"]) - now
        # A token without a known expiry is not renewed. The person signs in again once the gateway refuses it.
        life = float(life) if isinstance(life, int | float) else 0.0
        user = next((claims[key] for key in ("email", "preferred_username", "sub") if key in claims), "")
        return Tokens(
            credential,
            str(claims.get("sub", "")),
            str(user)[:_MAX_USER],
            refreshed if isinstance(refreshed, str) and life > 0 else "",
            now + max(life - _MARGIN, life / 2),
        )

    async def _grant(self, form: dict[str, str]) -> Mapping[str, Any]:
        """Return the answer of the token endpoint to a grant. Raises IssuerUnavailable, GrantRefused."""
        metadata, client_id = await self._discover(), self._settings.oidc_client_id
        headers = {}
        if not self._secret:
            form["client_id"] = client_id
        elif metadata.in_body:
            form |= {"client_id": client_id, "client_secret": self._secret}
        else:
            # RFC 6749, 2.3.1: both are encoded as in a form.
            client = f"{quote_plus(client_id)}:{quote_plus(self._secret)}"
            headers["Authorization"] = f"Basic {base64.b64encode(client.encode()).decode()}"
        status, answer = await self._send("POST", metadata.token_endpoint, data=form, headers=headers)
        if status == HTTPStatus.OK:
            return answer
        # A 5xx of the provider says nothing of the grant.
        error = GrantRefused if HTTPStatus.BAD_REQUEST <= status < HTTPStatus.TOO_MANY_REQUESTS else IssuerUnavailable
        raise error(f"the token endpoint answers {status}: {str(answer.get('error', ''))[:100]}")

    async def _discover(self) -> _Metadata:
        """Return the provider's metadata, or the last valid ones while they cannot be read. Raises
        IssuerUnavailable."""
        if time.monotonic() >= self._read_next:
            await self._reading.joined("metadata", self._renew_metadata)
        if self._metadata is None:
            raise IssuerUnavailable(self._problem)
        return self._metadata

    async def _renew_metadata(self) -> None:
        try:
            self._metadata, self._problem = await self._read_metadata(), ""
        except IssuerUnavailable as error:
            self._problem = str(error)
            if self._metadata is not None:
                _log.warning("the OpenID provider's metadata stay as they were: %s", error)
        self._read_next = time.monotonic() + (_RETRY_INTERVAL if self._problem else self._metadata_lifetime)

    async def _read_metadata(self) -> _Metadata:
        """Request the provider's metadata and return them. Raises IssuerUnavailable."""
        issuer = self._settings.oidc_issuer
        status, found = await self._send("GET", f"{issuer.rstrip('/')}/.well-known/openid-configuration")
        if status != HTTPStatus.OK:
            raise IssuerUnavailable(f"its metadata is answered with {status}")
        endpoints = [found.get(name) for name in ("authorization_endpoint", "token_endpoint")]
        if found.get("issuer") != issuer:
            raise IssuerUnavailable(f"its metadata is of another issuer than {issuer}")
        if not all(isinstance(url, str) and is_confidential(url) for url in endpoints):
            raise IssuerUnavailable("its metadata lacks an endpoint with an https URL")
        methods = found.get("token_endpoint_auth_methods_supported", ("client_secret_basic",))
        return _Metadata(str(endpoints[0]), str(endpoints[1]), "client_secret_basic" not in methods)

    async def _send(self, method: str, url: str, **more: Any) -> tuple[int, Mapping[str, Any]]:
        """Return the status and the JSON object of an answer. Raises IssuerUnavailable."""
        try:
            answer = await fetch(method, url, within=_TIMEOUT, max_bytes=_MAX_ANSWER, ssl=self._ssl, **more)
            found = json.loads(answer.body)
        except FetchError as error:
            raise IssuerUnavailable(str(error)) from None
        except (ValueError, RecursionError):
            raise IssuerUnavailable(f"{url} answers {answer.status}, without JSON") from None
        if not isinstance(found, dict):
            raise IssuerUnavailable(f"{url} answers {answer.status}, without an object of JSON")
        return answer.status, found
