"""An OpenID provider whose people agree at once: authorization code flow with PKCE, and refresh tokens."""

import base64
import hashlib
import secrets
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_plus, urlencode

from aiohttp import web

from runtime.scopes import SCOPES
from tests.support.credentials import AUDIENCE, Issuer

CLIENT_ID = "console"
CLIENT_SECRET = "a secret: of/ours"
KID = "provider-1"


@dataclass
class OpenIdProvider:
    """The provider. Tests change how it behaves."""

    scheme: str = "http"
    port: int = 0
    life: float = 3600
    """Seconds for which its tokens count."""
    refreshes: bool = False
    """Whether it gives refresh tokens. It takes each once."""
    claims: dict[str, Any] = field(default_factory=dict)
    """Claims of its id tokens that differ."""
    refused: bool = False
    """Whether the person does not agree."""
    padding: str = ""
    """A claim of its access tokens, which makes them longer."""
    issuer: Issuer = field(default_factory=lambda: Issuer(KID))
    asked: list[dict[str, str]] = field(default_factory=list)
    """The queries of its authorization endpoint."""
    broken: bool = False
    """Whether it answers 500 instead of its metadata."""
    described: int = 0
    """How often it was asked for its metadata."""
    granted: list[str] = field(default_factory=list)
    """The kinds of grants that it was asked for."""
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    refresh_tokens: set[str] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def gateway(self) -> dict[str, str]:
        """The settings of a gateway that takes its access tokens."""
        return {
            "GATEWAY_JWT_ISSUER": self.url,
            "GATEWAY_JWT_AUDIENCE": AUDIENCE,
            "GATEWAY_JWT_KEYS": f"{self.url}/keys",
            "GATEWAY_JWT_LEEWAY": "PT0S",
        }

    @asynccontextmanager
    async def serving(self, context: ssl.SSLContext | None = None) -> AsyncIterator[None]:
        """Serve while the context is open, at the same address each time."""
        app = web.Application()
        app.router.add_get("/.well-known/openid-configuration", self._metadata)
        app.router.add_get("/authorize", self._authorize)
        app.router.add_post("/token", self._token)
        app.router.add_get("/keys", self._keys)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, ssl_context=context)
        await site.start()
        self.port = runner.addresses[0][1]
        try:
            yield
        finally:
            await runner.cleanup()

    async def _metadata(self, _: web.Request) -> web.Response:
        self.described += 1
        if self.broken:
            return web.json_response({}, status=500)
        return web.json_response(
            {
                "issuer": self.url,
                "authorization_endpoint": f"{self.url}/authorize",
                "token_endpoint": f"{self.url}/token",
                "jwks_uri": f"{self.url}/keys",
            }
        )

    async def _keys(self, _: web.Request) -> web.Response:
        return web.Response(body=self.issuer.key_set(), content_type="application/json")

    async def _authorize(self, request: web.Request) -> web.Response:
        query = dict(request.query)
        self.asked.append(query)
        assert (query["response_type"], query["client_id"]) == ("code", CLIENT_ID)
        assert query["code_challenge_method"] == "S256"
        answer = {"state": query["state"], "iss": self.url}
        if self.refused:
            answer["error"] = "access_denied"
        else:
            answer["code"] = secrets.token_urlsafe(16)
            self.codes[answer["code"]] = query
        raise web.HTTPFound(f"{query['redirect_uri']}?{urlencode(answer)}")

    async def _token(self, request: web.Request) -> web.Response:
        scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
        client = [unquote_plus(part) for part in base64.b64decode(credentials).decode().split(":")]
        if scheme != "Basic" or client != [CLIENT_ID, CLIENT_SECRET]:
            return web.json_response({"error": "invalid_client"}, status=401)
        form = dict(await request.post())
        self.granted.append(str(form["grant_type"]))
        if form["grant_type"] == "refresh_token":
            if form["refresh_token"] not in self.refresh_tokens:
                return web.json_response({"error": "invalid_grant"}, status=400)
            self.refresh_tokens.remove(str(form["refresh_token"]))
            return web.json_response(self._tokens({}))
        asked = self.codes.pop(str(form["code"]), None)
        challenge = hashlib.sha256(str(form["code_verifier"]).encode()).digest()
        if (
            asked is None
            or asked["redirect_uri"] != form["redirect_uri"]
            or asked["code_challenge"] != base64.urlsafe_b64encode(challenge).decode().rstrip("=")
        ):
            return web.json_response({"error": "invalid_grant"}, status=400)
        return web.json_response(self._tokens({"nonce": asked["nonce"]}))

    def _tokens(self, claims: dict[str, Any]) -> dict[str, Any]:
        person = {"iss": self.url, "sub": "ada", "email": "ada@example.org"}
        given = {
            "token_type": "Bearer",
            "expires_in": self.life,
            "access_token": self.issuer.token(
                KID, SCOPES, ends_in=self.life, **person, aud=AUDIENCE, jti=secrets.token_hex(8), padding=self.padding
            ),
            "id_token": self.issuer.token(
                KID, SCOPES, ends_in=self.life, **{**person, "aud": CLIENT_ID, **claims, **self.claims}
            ),
        }
        if self.refreshes:
            given["refresh_token"] = secrets.token_urlsafe(24)
            self.refresh_tokens.add(given["refresh_token"])
        return given
