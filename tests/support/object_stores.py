"""Servers of the S3 API for tests: moto, which comes with the environment, and SeaweedFS where it is installed."""

import asyncio
import re
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx

from deploy.local.ports import free_port
from tests.support.commands import start
from tests.support.paths import ROOT

SERVERS: Final = ("moto", "weed")
"""By the programs' names."""
_KEY_ID: Final = "test-key"
_SECRET: Final = "test-secret"
_BUCKET: Final = "bucket"
_ADDRESS: Final = re.compile(rb"(?:Running on|S3 Endpoint:) *(http://127\.0\.0\.1:\d+)")
_WEED_PORTS: Final = (
    *("s3.port", "s3.port.grpc", "s3.port.iceberg", "s3.port.lance", "master.port", "master.port.grpc"),
    *("volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc", "webdav.port", "admin.port"),
    "admin.port.grpc",
)
_PATIENCE: Final = 120


@dataclass
class S3Server:
    """A running server with one bucket."""

    endpoint: str
    process: asyncio.subprocess.Process

    @property
    def environment(self) -> dict[str, str]:
        """The settings of a service that uses it."""
        return {
            "STORE_URL": f"s3://{_BUCKET}/some/prefix",
            "STORE_ENDPOINT": self.endpoint,
            "STORE_ACCESS_KEY_ID": _KEY_ID,
            "STORE_SECRET_ACCESS_KEY": _SECRET,
        }

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()


def is_installed(server: str) -> bool:
    return server == "moto" or _weed() is not None


def _weed() -> str | None:
    """Return the path of SeaweedFS, which `make tools` fetches; None where it is not installed."""
    return shutil.which("weed", path=ROOT / ".tools" / "seaweedfs" / "bin") or shutil.which("weed")


@asynccontextmanager
async def s3_server(name: str, folder: Path, port: int = 0) -> AsyncIterator[S3Server]:
    """Run a server. moto keeps objects in memory and checks no signature; SeaweedFS keeps them in the folder."""
    if name == "moto":
        process = await start(sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port))
    else:
        process = await start(
            *(_weed() or "weed", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={_BUCKET}"),
            *(f"-{part}={free_port()}" for part in _WEED_PORTS),
            AWS_ACCESS_KEY_ID=_KEY_ID,
            AWS_SECRET_ACCESS_KEY=_SECRET,
        )
    coming = process.stderr if name == "moto" else process.stdout
    assert coming
    try:
        async with asyncio.timeout(_PATIENCE):
            while not (found := _ADDRESS.search(line := await coming.readline())):
                assert line, f"{name} has ended"
            server = S3Server(found[1].decode(), process)
            if name == "moto":
                await _create_bucket(server.endpoint)
        # What it logs must not fill the pipe.
        logged = asyncio.create_task(coming.read())
        yield server
    finally:
        if process.returncode is None:
            await S3Server("", process).kill()
    await logged


async def _create_bucket(endpoint: str) -> None:
    async with httpx.AsyncClient(trust_env=False) as http:
        # By which moto finds the service.
        credential = "AWS4-HMAC-SHA256 Credential=id/20260101/us-east-1/s3/aws4_request"
        created = await http.put(f"{endpoint}/{_BUCKET}", headers={"Authorization": credential})
        assert created.is_success, created.text
