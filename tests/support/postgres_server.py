"""A PostgreSQL server of a test's own."""

import asyncio
import os
import pwd
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from deploy.local.ports import free_port
from tests.support.certificates import Authority

_USER = "nobody"
"""Who runs the server where the tests run as root: it refuses to."""
PATIENCE = 120


class PostgresServer:
    """A server that runs."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self._process = process
        self.port = port
        self.url = f"postgresql://notifier:secret@127.0.0.1:{port}/postgres"

    async def query(self, text: str, *values: Any) -> list[Mapping[str, Any]]:
        """Return the rows of a query as the superuser."""
        import asyncpg

        connection = await asyncpg.connect(f"postgresql://postgres:super@127.0.0.1:{self.port}/postgres", timeout=60)
        try:
            return await connection.fetch(text, *values)
        finally:
            await connection.close()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server and to the processes of its connections."""
        os.killpg(self._process.pid, number)


def _program(name: str) -> str:
    """Return the path of a program of PostgreSQL's. Skips the test without it."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    path = shutil.which(name, path=":".join(map(str, folders))) or shutil.which(name)
    if path is None:
        pytest.skip("PostgreSQL is not installed")
    return str(Path(path).resolve())


def _give_away(folder: Path) -> None:
    for path in (folder, *folder.iterdir()):
        shutil.chown(path, _USER)


@asynccontextmanager
async def postgres_server(ca: Authority | None = None) -> AsyncIterator[PostgresServer]:
    """Run a server with the user `notifier`, who may create tables; with a CA it takes connections by TLS alone."""
    pytest.importorskip("asyncpg")
    postgres, initdb = _program("postgres"), _program("initdb")
    root = os.geteuid() == 0
    as_user: dict[str, Any] = {"user": _USER, "group": pwd.getpwnam(_USER).pw_gid, "extra_groups": ()} if root else {}
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    try:
        data, password = folder / "data", folder / "password"
        password.write_text("super")
        options = ["-c", "fsync=off", "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        if ca is not None:
            pair = ca.issue("postgres")
            for name, source in (("cert.pem", pair.cert), ("key.pem", pair.key)):
                shutil.copy(source, folder / name)
                (folder / name).chmod(0o600)
            files = (f"ssl_cert_file={folder}/cert.pem", f"ssl_key_file={folder}/key.pem")
            options += [part for option in ("ssl=on", *files) for part in ("-c", option)]
        if root:
            _give_away(folder)
        made = await asyncio.create_subprocess_exec(
            *(initdb, "-D", str(data), "-U", "postgres", f"--pwfile={password}", "-A", "scram-sha-256", "-N"),
            stdout=asyncio.subprocess.DEVNULL,
            cwd=folder,
            **as_user,
        )
        assert await made.wait() == 0
        if ca is not None:
            (data / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 scram-sha-256\n")
        port = free_port()
        process = await asyncio.create_subprocess_exec(
            *(postgres, "-D", str(data), "-p", str(port), *options),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            cwd=folder,
            start_new_session=True,
            **as_user,
        )
        server = PostgresServer(process, port)
        try:
            await _prepare(server)
            yield server
        finally:
            server.signal(signal.SIGCONT)
            process.send_signal(signal.SIGQUIT)
            await process.wait()
    finally:
        shutil.rmtree(folder)


async def _prepare(server: PostgresServer) -> None:
    import asyncpg

    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await server.query("CREATE ROLE notifier LOGIN PASSWORD 'secret'")
            except (OSError, asyncpg.PostgresError):
                await asyncio.sleep(0.1)
            else:
                break
    await server.query("GRANT CREATE ON SCHEMA public TO notifier")
