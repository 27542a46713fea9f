"""Credentials as clients have them: an issuer of tokens with its key set, and a file of API keys."""

import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from llm_pb.llm_pb2_grpc import LlmServiceStub
from runtime.auth import Presented, Refusal
from runtime.auth_keys import ApiKey, make_key, read_keys, write_keys
from runtime.scopes import SCOPES

ISSUER = "https://issuer.test/"
AUDIENCE = "llm.test"
Metadata = tuple[tuple[str, str], ...]


class Issuer:
    """Signs tokens."""

    def __init__(self, *kids: str) -> None:
        """The first key is RSA, the others are of an elliptic curve."""
        self.keys: dict[str, Any] = {kid: ec.generate_private_key(ec.SECP256R1()) for kid in kids}
        self.keys[kids[0]] = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def key_set(self, *kids: str) -> bytes:
        """Return the public keys, of all or of some."""
        keys = []
        for kid in kids or self.keys:
            key = self.keys[kid].public_key()
            of_rsa = isinstance(key, rsa.RSAPublicKey)
            jwk = RSAAlgorithm.to_jwk(key, as_dict=True) if of_rsa else ECAlgorithm.to_jwk(key, as_dict=True)
            keys.append({**jwk, "kid": kid, "use": "sig", "alg": "RS256" if of_rsa else "ES256"})
        return json.dumps({"keys": keys}).encode()

    def token(self, kid: str, scopes: Iterable[str] = (), *, ends_in: float = 3600, **claims: Any) -> str:
        """Return a token; `ends_in` are seconds. A claim that is None is left out."""
        of_rsa = isinstance(self.keys[kid], rsa.RSAPrivateKey)
        return jwt.encode(
            claims_of(scopes, ends_in=ends_in, **claims),
            self.keys[kid],
            algorithm="RS256" if of_rsa else "ES256",
            headers={"kid": kid},
        )


def claims_of(scopes: Iterable[str] = (), *, ends_in: float = 3600, **changes: Any) -> dict[str, Any]:
    now = time.time()
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "somebody",
        "iat": int(now),
        "exp": int(now + ends_in),
        "scope": " ".join(scopes),
        **changes,
    }
    return {name: value for name, value in claims.items() if value is not None}


class KeySetServer:
    """Serves a key set over HTTP."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.asked = 0
        self.port = 0

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Serve while the context is open, at the same address each time; yield the URL."""
        known = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known.asked += 1
                self.send_response(200)
                self.end_headers()
                self.wfile.write(known.data)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the library's
                pass

        with ThreadingHTTPServer(("127.0.0.1", self.port), Handler) as server:
            self.port = server.server_port
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            try:
                yield f"http://127.0.0.1:{self.port}/keys"
            finally:
                server.shutdown()
                thread.join()


class KeyFile:
    """A file of API keys, as an operator changes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        write_keys(path, ())

    def add(self, scopes: Iterable[str], user_id: str = "", not_after: datetime | None = None, tenant: str = "") -> str:
        """Return a new key."""
        key, id_, digest = make_key()
        added = ApiKey(id=id_, sha256=digest, scopes=tuple(scopes), tenant=tenant, user_id=user_id, not_after=not_after)
        write_keys(self.path, [*read_keys(self.path, SCOPES).values(), added])
        return key

    def revoke(self, key: str) -> None:
        keys = read_keys(self.path, SCOPES)
        del keys[id_of(key)]
        write_keys(self.path, keys.values())


class CallsAs:
    """A stub whose calls carry a credential."""

    def __init__(self, stub: LlmServiceStub, credential: str) -> None:
        self._stub = stub
        self._metadata = bearer(credential)

    def __getattr__(self, name: str) -> Any:
        return partial(getattr(self._stub, name), metadata=self._metadata)


def id_of(key: str) -> str:
    """Return the part of an API key that may be shown."""
    return key.split("_")[1]


def bearer(credential: str) -> Metadata:
    """Return the metadata of a call with a credential."""
    return (("authorization", f"Bearer {credential}"),)


async def reason(authenticator: Any, token: str) -> str:
    """Return the reason for which a credential is refused: empty if it is not, "none" if it is not one of these."""
    try:
        caller = await authenticator.authenticate(Presented(token=token))
    except Refusal as refusal:
        return refusal.reason
    return "" if caller is not None else "none"
