"""Readiness names files that become unusable while a service runs. The service goes on with what they held."""

import asyncio
import base64
import shutil
from datetime import timedelta
from pathlib import Path

import nkeys
import pytest
from opentelemetry.metrics import NoOpMeter
from temporalio.envconfig import ClientConfigProfile, ClientConfigTLS

from deploy.local.ports import free_port
from feed.feed import FeedSettings
from feed.nats import NatsFeed
from runtime.auth_settings import open_authenticators
from runtime.grpc_server import GrpcServer, Limits
from runtime.health import Readiness
from runtime.jwt_keys import KeySet
from runtime.metrics import serving_metrics
from runtime.temporal_tls import TlsReloading
from runtime.tls import ServerTls, server_context
from services.codec.settings import CodecSettings
from services.gateway.auditing import open_audit
from services.gateway.settings import GatewaySettings
from services.http import console
from services.http.front import Front
from services.http.gateway import Gateway
from services.http.metrics import HttpMetrics
from services.http.settings import HttpSettings
from services.notifier.settings import NotifierSettings
from services.notifier.sinks.registry import open_sinks
from tests.support.certificates import Authority
from tests.support.credentials import Issuer, KeyFile

# A check of a file needs a thread of the event loop. Other tests may have left work in those of the session's.
pytestmark = pytest.mark.asyncio(loop_scope="function")


async def degraded(readiness: Readiness) -> list[str]:
    return [*(await asyncio.to_thread(readiness.readyz))["degraded"]]


def halve(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


async def require_named(readiness: Readiness, name: str, path: Path) -> None:
    """Fail unless readiness names the file while it cannot be used, and only then."""
    assert await degraded(readiness) == []
    copy = shutil.copy(path, path.with_suffix(".copy"))
    for spoil in (halve, Path.unlink):
        spoil(path)
        assert await degraded(readiness) == [name]
    shutil.copy(copy, path)
    assert await degraded(readiness) == []


@pytest.fixture
def tls(tmp_path: Path) -> ServerTls:
    pair = Authority(tmp_path).issue("server")
    return ServerTls("X_TLS_", pair.cert, pair.key)


async def test_the_keys_and_the_certificate_of_the_metrics(tmp_path: Path, tls: ServerTls) -> None:
    file, readiness = KeyFile(tmp_path / "keys.json"), Readiness("test")
    file.add(["admin:metrics"])
    settings = CodecSettings(
        metrics_port=0, metrics_api_keys_file=file.path, metrics_tls_cert=tls.cert, metrics_tls_key=tls.key
    )
    async with serving_metrics(settings, readiness):
        await require_named(readiness, "metrics api keys", file.path)
        await require_named(readiness, "CODEC_METRICS_TLS_…", tls.cert)


async def test_the_certificate_of_a_grpc_server(tls: ServerTls) -> None:
    readiness = Readiness("test")
    server = GrpcServer(["test"], "127.0.0.1", free_port(), Limits(4 << 20), tls=tls)
    await server.start(readiness)
    await require_named(readiness, "X_TLS_…", tls.key)
    await server.stop(timedelta(0))


async def test_the_certificate_of_an_http_server(tls: ServerTls) -> None:
    readiness = Readiness("test")
    server_context(tls, readiness)
    await require_named(readiness, "X_TLS_…", tls.cert)


async def test_the_files_of_temporal(tls: ServerTls) -> None:
    readiness = Readiness("test")
    profile = ClientConfigProfile(tls=ClientConfigTLS(client_cert=tls.cert, client_private_key=tls.key))
    TlsReloading(profile, readiness)
    assert await degraded(readiness) == []
    tls.cert.unlink()
    assert await degraded(readiness) == ["TEMPORAL_TLS_…"]


@pytest.fixture
def client_tls(tmp_path: Path) -> dict[str, Path]:
    authority = Authority(tmp_path)
    pair = authority.issue("client")
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    return {"tls_ca": tmp_path / "ca.pem", "tls_cert": pair.cert, "tls_key": pair.key}


async def test_the_files_of_the_feed(tmp_path: Path, client_tls: dict[str, Path]) -> None:
    readiness, seed = Readiness("test"), tmp_path / "seed"
    seed.write_bytes(nkeys.encode_seed(bytes(32), nkeys.PREFIX_BYTE_USER))
    NatsFeed(FeedSettings(**client_tls, nkey_seed=seed), "test", readiness)
    for path in client_tls.values():
        await require_named(readiness, "FEED_TLS_…", path)
    await require_named(readiness, "FEED_NKEY_SEED", seed)


async def test_the_files_of_sinks(tmp_path: Path, client_tls: dict[str, Path]) -> None:
    readiness, seed = Readiness("test"), tmp_path / "seed"
    seed.write_bytes(nkeys.encode_seed(bytes(32), nkeys.PREFIX_BYTE_USER))
    settings = NotifierSettings(
        nats_url="nats://x",
        nats_tls_ca=client_tls["tls_ca"],
        nats_nkey_seed=seed,
        postgres_url="postgresql://x/y",
        postgres_tls_ca=shutil.copy(client_tls["tls_ca"], tmp_path / "other.pem"),
    )
    async with open_sinks(settings, readiness):
        await require_named(readiness, "NOTIFIER_NATS_TLS_…", client_tls["tls_ca"])
        await require_named(readiness, "NOTIFIER_NATS_NKEY_SEED", seed)
        await require_named(readiness, "NOTIFIER_POSTGRES_TLS_…", tmp_path / "other.pem")


async def test_the_files_of_the_audit_log(client_tls: dict[str, Path]) -> None:
    readiness = Readiness("test")
    settings = GatewaySettings(
        audit=f"nats://127.0.0.1:{free_port()}/S", **{f"audit_{name}": path for name, path in client_tls.items()}
    )
    log = open_audit(settings, NoOpMeter("test").create_counter("lost"), readiness)
    assert log is not None
    await require_named(readiness, "GATEWAY_AUDIT_TLS_…", client_tls["tls_key"])
    await log.close()


async def test_the_files_of_the_console(tmp_path: Path, client_tls: dict[str, Path]) -> None:
    readiness, keys = Readiness("test"), tmp_path / "keys"
    keys.write_text(base64.b64encode(bytes(32)).decode())
    settings = HttpSettings(
        session_key_file=keys,
        public_url="https://llm.example",
        oidc_issuer="https://provider.example",
        oidc_client_id="console",
        oidc_tls_ca=client_tls["tls_ca"],
    )
    front = Front(settings, Gateway.__new__(Gateway), HttpMetrics(NoOpMeter("test")), readiness)
    console.package(front)
    await require_named(readiness, "HTTP_OIDC_TLS_…", client_tls["tls_ca"])
    await require_named(readiness, "HTTP_SESSION_KEY_FILE", keys)


async def test_the_keys_of_tokens(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    path.write_bytes(Issuer("k").key_set())
    keys = KeySet(str(path), lifetime=timedelta(0), retry_interval=timedelta(0))
    seen = []
    for text in (path.read_text(), "{", path.read_text()):
        path.write_text(text)
        await keys.refresh()
        seen.append(keys.usable)
    assert seen == [True, False, True]


async def test_an_issuer_that_is_away_at_the_start() -> None:
    readiness = Readiness("test")
    url = f"http://127.0.0.1:{free_port()}/keys"
    await open_authenticators(CodecSettings(jwt_issuer="i", jwt_audience="a", jwt_keys=url), readiness)
    assert await degraded(readiness) == ["jwt keys"]
