"""Credentials by themselves: client certificates over real TLS, hostile tokens, key sets and files that are wrong."""

import asyncio
import importlib
import json
import logging
import os
import pkgutil
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtensionOID, NameOID
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import RSAAlgorithm
from jwt.warnings import InsecureKeyLengthWarning
from pydantic import ValidationError

import llm_pb
from jobs.ids import ID_PATTERN
from llm_pb import llm_pb2
from runtime.auth import Caller, Presented, Refusal, bearer_token
from runtime.auth_certificates import CertificateRule, ClientCertificates
from runtime.auth_jwt import JwtRules, Jwts
from runtime.auth_keys import ApiKeys, KeyFileError
from runtime.auth_settings import open_authenticators
from runtime.grpc_auth import AuthInterceptor, current_caller
from runtime.health import Readiness
from runtime.jwt_keys import KeySet
from runtime.scopes import ANONYMOUS
from services.codec.settings import CodecSettings
from services.gateway import scopes
from tests.support.credentials import AUDIENCE, ISSUER, Issuer, KeyFile, Metadata, bearer, claims_of, id_of, reason
from tests.support.examples import examples

SERVICE, METHOD = "test.Service", "/test.Service/Who"
RULES = (
    CertificateRule(pattern="spiffe://test/jobs/.*", scopes=["jobs:read"]),
    CertificateRule(pattern="spiffe://test/front", scopes=["proxy", "jobs:read"]),
    CertificateRule(pattern="spiffe://test/models", scopes=["models:read"]),
    CertificateRule(pattern="spiffe://test/of/acme/.*", scopes=["jobs:read"], tenant="acme"),
    CertificateRule(pattern="spiffe://test/in/((?P<tenant>.*)/)?a", scopes=["jobs:read"]),
)


class Authority:
    """A certificate authority."""

    def __init__(self) -> None:
        self.ca = trustme.CA()
        self.server = self.ca.issue_cert("127.0.0.1")

    def server_credentials(self, *, mutual: bool) -> grpc.ServerCredentials:
        chain = b"".join(blob.bytes() for blob in self.server.cert_chain_pems)
        pairs = [(self.server.private_key_pem.bytes(), chain)]
        return grpc.ssl_server_credentials(pairs, self.ca.cert_pem.bytes() if mutual else None, mutual)

    def client_credentials(
        self, *uris: str, ends_in: float = 3600, trusts: "Authority | None" = None
    ) -> grpc.ChannelCredentials:
        """Return those of a client whose certificate has the URIs; it trusts another authority's servers, maybe."""
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = x509.load_pem_x509_certificate(self.ca.cert_pem.bytes())
        signer: Any = serialization.load_pem_private_key(self.ca.private_key_pem.bytes(), None)
        now = datetime.now(UTC)
        names = [x509.UniformResourceIdentifier(uri) for uri in uris] or [x509.DNSName("client.test")]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "spiffe://test/jobs/by-common-name")]))
            .issuer_name(issuer.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(seconds=ends_in))
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(signer, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        chain = certificate.public_bytes(serialization.Encoding.PEM)
        return grpc.ssl_channel_credentials((trusts or self).ca.cert_pem.bytes(), private, chain)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@asynccontextmanager
async def serving(credentials: grpc.ServerCredentials, authenticators: Sequence[Any]) -> AsyncIterator[str]:
    """Serve a method that says who calls, with the scope jobs:read, and one that lasts."""

    async def who(request: bytes, context: Any) -> bytes:
        caller = current_caller()
        return (f"{caller.tenant}: " if caller.tenant else "").encode() + caller.subject.encode()

    async def last(request: bytes, context: Any) -> None:
        await context.write(current_caller().subject.encode())
        await asyncio.Event().wait()

    handlers = {
        "Who": grpc.unary_unary_rpc_method_handler(who),
        "Last": grpc.unary_stream_rpc_method_handler(last),
        "New": grpc.unary_unary_rpc_method_handler(who),
    }
    of_method = {METHOD: "jobs:read", "/test.Service/Last": "jobs:read"}
    interceptor = AuthInterceptor(
        authenticators, ANONYMOUS, of_method, lambda refusal: (("reason", refusal.reason.encode()),)
    )
    server = grpc.aio.server(interceptors=[interceptor])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    keeping = asyncio.create_task(interceptor.keep_current())
    try:
        yield f"127.0.0.1:{port}"
    finally:
        keeping.cancel()
        await server.stop(0)


async def who(address: str, credentials: grpc.ChannelCredentials, metadata: Metadata = (), method: str = METHOD) -> str:
    """Return who the server says calls, or the reason why it refuses."""
    async with grpc.aio.secure_channel(address, credentials) as channel:
        try:
            answer: bytes = await channel.unary_unary(method)(b"", metadata=metadata, timeout=60)
        except grpc.aio.AioRpcError as error:
            return str(dict(error.trailing_metadata() or ())["reason"])
        return answer.decode()


async def test_a_certificate_calls_by_its_spiffe_id(authority: Authority, tmp_path: Path) -> None:
    """A credential in the metadata comes first, good or not; a proxy never acts for itself."""
    file = KeyFile(tmp_path / "keys.json")
    key = file.add(["jobs:read"])
    authenticators = (ApiKeys(file.path, scopes.SCOPES), ClientCertificates(RULES))
    async with serving(authority.server_credentials(mutual=True), authenticators) as address:
        good = authority.client_credentials("spiffe://test/jobs/a")
        front = authority.client_credentials("spiffe://test/front")
        by_key = f"llmk_{id_of(key)}"
        assert await who(address, good) == "spiffe://test/jobs/a"
        assert await who(address, good, bearer(key)) == by_key
        assert await who(address, good, bearer(f"{key}x")) == "CREDENTIAL_INVALID"
        assert await who(address, good, (("authorization", ""),)) == "CREDENTIAL_INVALID"
        assert await who(address, front) == "CREDENTIAL_MISSING"
        assert await who(address, front, bearer(key)) == by_key
        assert await who(address, authority.client_credentials("spiffe://test/models")) == "MISSING_SCOPE"
        for uri, tenant in (("spiffe://test/of/acme/a", "acme"), ("spiffe://test/in/acme-2/a", "acme-2")):
            assert await who(address, authority.client_credentials(uri)) == f"{tenant}: {uri}"
        for uris in (
            ["spiffe://test/in/a"],
            ["spiffe://test/in/-/a"],
            ["spiffe://other/jobs/a"],
            ["spiffe://test/jobs"],
            ["spiffe://test/models-of-others"],
            ["https://test/jobs/a"],
            ["spiffe://test/jobs/a", "spiffe://test/jobs/b"],
            [],
        ):
            assert await who(address, authority.client_credentials(*uris)) == "CREDENTIAL_INVALID", uris


async def test_a_certificate_whose_names_cannot_be_read_is_refused() -> None:
    """Its authority may give names of every kind of X.509: here an X.400 address comes before the SPIFFE id."""
    key, name, now = ec.generate_private_key(ec.SECP256R1()), x509.Name([]), datetime.now(UTC)
    spiffe_id = b"spiffe://test/jobs/a"
    names = b"\xa3\x02\x05\x00\x86" + bytes([len(spiffe_id)]) + spiffe_id
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
        .add_extension(
            x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, bytes([0x30, len(names)]) + names), False
        )
        .sign(key, hashes.SHA256())
    )
    presented = Presented(certificate=certificate.public_bytes(serialization.Encoding.PEM))
    with pytest.raises(Refusal, match="no SPIFFE id"):
        await ClientCertificates(RULES).authenticate(presented)


def test_a_rule_for_certificates_names_at_most_one_tenant() -> None:
    for wrong in ({"pattern": "(?P<tenant>a)", "tenant": "a"}, {"pattern": "a", "tenant": "a/b"}):
        with pytest.raises(ValidationError, match="tenant"):
            CertificateRule(scopes=["jobs:read"], **wrong)


async def test_a_certificate_of_another_authority_does_not_connect(authority: Authority) -> None:
    """TLS says so: nothing of it reaches an authenticator."""
    strangers = Authority().client_credentials("spiffe://test/jobs/a", trusts=authority)
    async with (
        serving(authority.server_credentials(mutual=True), (ClientCertificates(RULES),)) as address,
        grpc.aio.secure_channel(address, strangers) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await channel.unary_unary(METHOD)(b"", timeout=60)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_without_a_certificate_there_is_no_credential(authority: Authority) -> None:
    async with serving(authority.server_credentials(mutual=False), (ClientCertificates(RULES),)) as address:
        assert await who(address, grpc.ssl_channel_credentials(authority.ca.cert_pem.bytes())) == "CREDENTIAL_MISSING"


async def test_a_stream_ends_with_its_certificate(authority: Authority) -> None:
    async with serving(authority.server_credentials(mutual=True), (ClientCertificates(RULES),)) as address:
        came, seconds = list[bytes](), 1
        while not came:
            # On a busy machine a certificate may end before the call has begun.
            seconds *= 2
            assert seconds < 100
            soon = authority.client_credentials("spiffe://test/jobs/a", ends_in=seconds)
            async with grpc.aio.secure_channel(address, soon) as channel:
                stream = channel.unary_stream("/test.Service/Last")(b"", timeout=120)

                async def read(stream: Any = stream) -> None:
                    async for message in stream:
                        came.append(message)

                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await read()
                # The connection is still open.
                with pytest.raises(grpc.aio.AioRpcError) as late:
                    await channel.unary_unary(METHOD)(b"", timeout=60)
    assert dict(late.value.trailing_metadata() or ())["reason"] == "CREDENTIAL_EXPIRED"
    assert came == [b"spiffe://test/jobs/a"]
    assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert dict(error.value.trailing_metadata() or ())["reason"] == "CREDENTIAL_EXPIRED"


async def test_a_token_with_a_far_end_spoils_no_check_of_others(
    authority: Authority, issuer: Issuer, key_file: Path, tmp_path: Path
) -> None:
    """Its end is the last second that a date can have, to which no leeway can be added."""
    file = KeyFile(tmp_path / "keys.json")
    key = file.add(["jobs:read"])
    authenticators = (ApiKeys(file.path, scopes.SCOPES), jwts(key_file))
    tls = grpc.ssl_channel_credentials(authority.ca.cert_pem.bytes())
    far = issuer.token("a", ["jobs:read"], exp=253402300799)
    async with (
        serving(authority.server_credentials(mutual=False), authenticators) as address,
        grpc.aio.secure_channel(address, tls) as channel,
    ):
        last = channel.unary_stream("/test.Service/Last")
        lasting, ending = (last(b"", metadata=bearer(token), timeout=120) for token in (far, key))
        for stream in (lasting, ending):
            await stream.read()
        file.revoke(key)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await ending.read()
        assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert not lasting.done()


class Failing:
    """An Authenticator whose check has a fault."""

    hint = "anything"

    def __init__(self) -> None:
        self.checked = 0

    async def authenticate(self, presented: Presented) -> Caller | None:
        return Caller("", "a", frozenset(["jobs:read"])) if presented.token == "faulty" else None

    def check(self, caller: Caller) -> None:
        self.checked += 1
        raise OverflowError("a fault")

    async def refresh(self) -> None:
        pass


async def test_a_fault_of_one_check_ends_no_other(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, failing = KeyFile(tmp_path / "keys.json"), Failing()
    key = file.add(["jobs:read"])
    tls = grpc.ssl_channel_credentials(authority.ca.cert_pem.bytes())
    async with (
        serving(authority.server_credentials(mutual=False), (failing, ApiKeys(file.path, scopes.SCOPES))) as address,
        grpc.aio.secure_channel(address, tls) as channel,
    ):
        last = channel.unary_stream("/test.Service/Last")
        lasting, ending = (last(b"", metadata=bearer(token), timeout=120) for token in ("faulty", key))
        for stream in (lasting, ending):
            await stream.read()
        async with asyncio.timeout(60):
            while not failing.checked:  # noqa: ASYNC110  nobody tells
                await asyncio.sleep(0.05)
        file.revoke(key)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await ending.read()
        assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert not lasting.done()
    assert "cannot check the credential of a running call" in caplog.text


async def test_a_method_without_a_scope_is_nobodys(authority: Authority, tmp_path: Path) -> None:
    """With authentication and without."""
    file = KeyFile(tmp_path / "keys.json")
    key = file.add(scopes.SCOPES)
    tls = grpc.ssl_channel_credentials(authority.ca.cert_pem.bytes())
    for authenticators in ((), (ApiKeys(file.path, scopes.SCOPES),)):
        async with serving(authority.server_credentials(mutual=False), authenticators) as address:
            assert await who(address, tls, bearer(key), "/test.Service/New") == "MISSING_SCOPE"


def test_every_method_of_the_contract_has_a_scope() -> None:
    """Those of every service in llm_pb, and a gateway does not start without."""
    names = [module.name for module in pkgutil.iter_modules(llm_pb.__path__) if module.name.endswith("_pb2")]
    assert "llm_pb2" in names
    for name in names:
        module = importlib.import_module(f"llm_pb.{name}")
        scopes.require_all_methods(module.DESCRIPTOR.services_by_name.values())
    assert set(scopes.OF_METHOD.values()) <= scopes.SCOPES
    without = {key: value for key, value in scopes.OF_METHOD.items() if not key.endswith("/Cancel")}
    with pytest.raises(RuntimeError, match="LlmService/Cancel"):
        scopes.require_all_methods(llm_pb2.DESCRIPTOR.services_by_name.values(), without)


def test_a_wildcard_is_every_scope_of_its_kind() -> None:
    caller = Caller("", "a", frozenset({"jobs:*"}))
    assert caller.may("jobs:submit")
    assert not caller.may("models:read")
    assert not Caller("", "a", frozenset({"proxy"})).may("jobs:submit")


def jwts(path: Path, keys: KeySet | None = None, **changes: Any) -> Jwts:
    rules = {
        "issuer": ISSUER,
        "audience": AUDIENCE,
        "algorithms": ("RS256", "ES256"),
        "leeway": timedelta(seconds=60),
        "scopes_claim": "scope",
        "tenant_claim": "",
        "user_claim": "",
        **changes,
    }
    return Jwts(JwtRules(**rules), keys or KeySet(str(path)), scopes.SCOPES)


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    return Issuer("a")


@pytest.fixture(scope="module")
def key_file(issuer: Issuer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("keys") / "set"
    path.write_bytes(issuer.key_set())
    return path


async def test_what_the_claims_say(issuer: Issuer, key_file: Path) -> None:
    known = jwts(key_file, scopes_claim="roles", tenant_claim="org", user_claim="uid")
    await known.refresh()
    token = issuer.token("a", uid="alice", org="acme", roles=["jobs:read", "other", 7, None])
    caller = await known.authenticate(Presented(token=token))
    assert caller is not None
    assert (caller.tenant, caller.subject, caller.key_id, caller.user_id) == ("acme", "somebody", "a", "alice")
    assert caller.scopes == {"jobs:read"}
    assert caller.not_after is not None
    assert await reason(known, issuer.token("a", uid="alice", org="acme", roles={"jobs:read": 1})) == ""
    # Who has no user would be everybody.
    for uid in (None, "", 7, ["alice"], "x" * 1000):
        assert await reason(known, issuer.token("a", org="acme", uid=uid)) == "CREDENTIAL_INVALID"
    # A user that no job can have would be an invalid user_id in each request.
    users = jwts(key_file, user_claim="uid", user_form=ID_PATTERN)
    await users.refresh()
    for uid in ("alice smith", "-alice", "a" * 129, "a/b", "a\nb"):
        assert await reason(users, issuer.token("a", uid=uid)) == "CREDENTIAL_INVALID", uid
    assert await reason(users, issuer.token("a", uid="alice@example.com")) == ""
    # Who has no tenant would see the jobs from before there were tenants.
    for tenant in (None, "", 7, ["acme"], "-acme", "a/b", "a" * 33, "acme "):
        assert await reason(known, issuer.token("a", uid="alice", org=tenant)) == "CREDENTIAL_INVALID", tenant
    assert await reason(known, issuer.token("a", uid="alice", org="acme", sub="")) == "CREDENTIAL_INVALID"
    without = jwts(key_file)
    await without.refresh()
    caller = await without.authenticate(Presented(token=issuer.token("a", org="acme")))
    assert caller is not None
    assert caller.tenant == ""


@pytest.mark.parametrize("text", ["llmk_\udcff", "\udcff", "llmk_é", "é.b.c", "eyJhbGciOiAiUlMyNTYifQ.\udcff.c"])
def test_a_token_that_is_not_ascii_is_none(text: str) -> None:
    """HTTP servers decode headers with surrogates, which cannot be encoded again."""
    with pytest.raises(Refusal) as refusal:
        bearer_token([f"Bearer {text}"])
    assert refusal.value.reason == "CREDENTIAL_INVALID"
    assert text not in str(refusal.value)


async def test_no_token_breaks_the_authenticator(issuer: Issuer, key_file: Path) -> None:
    known = jwts(key_file)
    await known.refresh()
    for ends in (float("inf"), float("nan"), 1e300, -1e300, 10**400, "soon", [], {}, True):
        token = jwt.encode({**claims_of(), "exp": ends}, issuer.keys["a"], "RS256", {"kid": "a"}, sort_headers=True)
        assert await reason(known, token) in ("CREDENTIAL_INVALID", "CREDENTIAL_EXPIRED"), ends


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["alg", "kid", "exp", "x"]), inner),
    max_leaves=6,
)


@examples(400)
@given(
    header=JSON | st.fixed_dictionaries({"alg": st.sampled_from(["RS256", "ES256", "none"]), "kid": JSON}),
    claims=JSON,
    signature=st.binary(max_size=80),
    cut=st.text(alphabet="._-=aA\x00é", max_size=4),
)
def test_hostile_tokens_are_refused(key_file: Path, header: Any, claims: Any, signature: bytes, cut: str) -> None:
    parts = [json.dumps(header).encode(), json.dumps(claims).encode(), signature]
    token = ".".join(jwt.utils.base64url_encode(part).decode() for part in parts) + cut

    async def refused() -> str:
        known = jwts(key_file)
        await known.refresh()
        return await reason(known, token)

    assert asyncio.run(refused()) == "CREDENTIAL_INVALID"


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"7", b"{}", b'{"keys": []}', b'{"keys": 7}', b"\xff", b"[" * 100_000, b'{"keys": [{}]}']
)
async def test_a_key_set_that_is_none_leaves_the_last_one(
    data: bytes, issuer: Issuer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once."""
    path = tmp_path / "set"
    path.write_bytes(issuer.key_set())
    known = jwts(path, keys=KeySet(str(path), lifetime=timedelta(0), retry_interval=timedelta(0)))
    await known.refresh()
    path.write_bytes(data)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            await known.refresh()
    assert await reason(known, issuer.token("a")) == ""
    assert len([record for record in caplog.records if record.name == "runtime.jwt_keys"]) == 1


async def test_only_public_keys_for_signatures_count(issuer: Issuer, tmp_path: Path) -> None:
    """A secret in the set, a key that is for something else, or one that is too short, verifies nothing."""
    (key,) = json.loads(issuer.key_set())["keys"]
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    short = {**RSAAlgorithm.to_jwk(weak.public_key(), as_dict=True), "kid": "short"}
    secret = {"kty": "oct", "kid": "secret", "k": "c2VjcmV0" * 8, "alg": "HS256"}
    path = tmp_path / "set"
    path.write_text(json.dumps({"keys": [secret, short, {**key, "kid": "enc", "use": "enc"}, key]}))
    known = jwts(path)
    await known.refresh()
    assert await reason(known, issuer.token("a")) == ""
    as_enc = jwt.encode(claims_of(), issuer.keys["a"], "RS256", {"kid": "enc"})
    by_secret = jwt.encode(claims_of(), jwt.utils.base64url_decode("c2VjcmV0" * 8), "HS256", {"kid": "secret"})
    with pytest.warns(InsecureKeyLengthWarning):
        by_weak = jwt.encode(claims_of(), weak, "RS256", {"kid": "short"})
    for token in (as_enc, by_secret, by_weak):
        assert await reason(known, token) == "CREDENTIAL_INVALID"


@pytest.mark.parametrize(
    "odd",
    [{"alg": "none"}, {"alg": ["RS256"]}, {"alg": {"a": 1}}, {"alg": "HS256"}, {"kid": ["a"]}, {"kid": {}}, {"n": 5}],
)
async def test_a_key_that_cannot_be_used_spoils_no_other(odd: dict[str, Any], issuer: Issuer, tmp_path: Path) -> None:
    """It is skipped, as RFC 7517 says, wherever it stands in the set."""
    (key,) = json.loads(issuer.key_set())["keys"]
    path = tmp_path / "set"
    for keys in ([{**key, **odd}, key], [key, {**key, "kid": "odd", **odd}]):
        path.write_text(json.dumps({"keys": keys}))
        known = jwts(path)
        await known.refresh()
        assert await reason(known, issuer.token("a")) == ""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tenant": "a/b"}, "1.tenant: Value error, a tenant has 1 to 32 of"),
        ({"scopes": ["jobs:raed"]}, "jobs:raed"),
        ({"scopes": ["proxy"]}, "proxy"),
        ({"not_after": "2027-01-01T00:00:00"}, "not_after"),
        ({"sha256": "SECRET"}, "sha256"),
        ({"id": "a_b"}, "id"),
        ({"id": "same"}, "two keys have the same id"),
        ({"key": "SECRET"}, "key"),
    ],
)
async def test_a_file_of_keys_that_is_wrong_changes_nothing(
    change: dict[str, Any], says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once which key and what is wrong, and not with what is in the file."""
    file = KeyFile(tmp_path / "keys.json")
    key = file.add(["jobs:read"])
    known = ApiKeys(file.path, scopes.SCOPES)
    (good,) = json.loads(file.path.read_text())
    added = {**good, "id": "b", **change}
    if added["id"] == "same":
        added["id"] = good["id"]
    file.path.write_text(json.dumps([good, added]))
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            await known.refresh()
    (record,) = caplog.records
    assert says in record.getMessage()
    assert "SECRET" not in record.getMessage()
    assert await reason(known, key) == ""
    file.path.unlink()
    await known.refresh()
    assert await reason(known, key) == ""
    with pytest.raises(KeyFileError):
        ApiKeys(file.path, scopes.SCOPES)


async def test_readiness_names_a_file_of_keys_that_has_become_unusable(tmp_path: Path) -> None:
    file, readiness = KeyFile(tmp_path / "keys.json"), Readiness("test")
    file.add(["jobs:read"])
    good = file.path.read_text()
    (known,) = await open_authenticators(CodecSettings(api_keys_file=file.path), readiness)

    async def degraded() -> list[str]:
        await known.refresh()
        return [*(await asyncio.to_thread(readiness.readyz))["degraded"]]

    assert await degraded() == []
    file.path.write_text(good[:-9])
    assert await degraded() == ["api keys"]
    file.path.write_text(good)
    assert await degraded() == []


@pytest.mark.parametrize(
    "change",
    [{"scopes": ["jobs:submit"]}, {"tenant": "acme"}, {"user_id": "alice"}, {"not_after": "2099-01-01T00:00:00Z"}],
)
async def test_a_changed_key_ends_its_running_calls_and_counts_for_new_ones(
    change: dict[str, Any], tmp_path: Path
) -> None:
    file = KeyFile(tmp_path / "keys.json")
    tokens = [file.add(["jobs:read"]) for _ in range(2)]
    known = ApiKeys(file.path, scopes.SCOPES)
    changed, kept = [await known.authenticate(Presented(token=token)) for token in tokens]
    assert changed is not None
    assert kept is not None
    entry, *others = json.loads(file.path.read_text())
    file.path.write_text(json.dumps([{**entry, **change}, *others]))
    await known.refresh()
    with pytest.raises(Refusal, match="changed"):
        known.check(changed)
    known.check(kept)
    assert [await reason(known, token) for token in tokens] == ["", ""]


async def test_a_file_of_keys_that_becomes_readable_without_a_change_is_read(tmp_path: Path) -> None:
    """For example because its owner was wrong, which the superuser cannot test: here it has the same time and size."""
    file = KeyFile(tmp_path / "keys.json")
    key = file.add(["jobs:read"])
    known = ApiKeys(file.path, scopes.SCOPES)
    times = (0, 0)
    revoked = b"[]".ljust(file.path.stat().st_size)
    file.path.write_bytes(b"x" * len(revoked))
    os.utime(file.path, times)
    await known.refresh()
    assert await reason(known, key) == ""
    file.path.write_bytes(revoked)
    os.utime(file.path, times)
    await known.refresh()
    assert await reason(known, key) == "CREDENTIAL_INVALID"


def test_a_file_of_keys_keeps_its_permissions(tmp_path: Path) -> None:
    """A gateway of another user reads it, so a revocation must not take that away."""
    file = KeyFile(tmp_path / "keys.json")
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    key = file.add(["jobs:read"])
    file.path.chmod(0o640)
    file.revoke(key)
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o640


async def test_a_refusal_repeats_nothing_of_the_token(issuer: Issuer, key_file: Path) -> None:
    known = jwts(key_file)
    await known.refresh()
    good = issuer.token("a")
    header, claims, signature = good.split(".")
    tokens = {
        "the JWT's signature does not match the key that it names": f"{header}.{claims}.{signature[:-8]}AAAAAAAA",
        "the JWT is for another audience (aud)": issuer.token("a", aud="secret-audience"),
        "the JWT is of another issuer (iss)": issuer.token("a", iss="secret-issuer"),
        "the JWT is not valid yet (nbf, iat)": issuer.token("a", nbf=4_000_000_000),
        "the JWT lacks the claim sub": issuer.token("a", sub=None),
        "the token is no JWT": "secret.secret.secret",
    }
    for message, token in tokens.items():
        with pytest.raises(Refusal) as refused:
            await known.authenticate(Presented(token=token))
        assert str(refused.value) == message
