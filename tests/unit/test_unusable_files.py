"""Readiness names files that become unusable while a service runs. The service goes on with what they held."""

import asyncio
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
from temporalio.envconfig import ClientConfigProfile, ClientConfigTLS

from deploy.local.ports import free_port
from runtime.auth_settings import open_authenticators
from runtime.grpc_server import GrpcServer, Limits
from runtime.health import Readiness
from runtime.jwt_keys import KeySet
from runtime.metrics import serving_metrics
from runtime.temporal_tls import TlsReloading
from runtime.tls import ServerTls, server_context
from services.codec.settings import CodecSettings
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
