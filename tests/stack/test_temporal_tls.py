"""The connection to Temporal with TLS, whose files are replaced while the processes run.

The development server has no TLS. A proxy in front of it has, and requires a client certificate.
"""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from temporalio.client import Client

from deploy.local.process import Process
from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.certificates import Authority, Pair, replace
from tests.support.jobs import new_job, until_output, watch


class TlsProxy:
    """Accepts TLS from clients with a certificate of the CA, and forwards their data to Temporal in clear."""

    def __init__(self, ca: Authority, pair: Pair, temporal: str) -> None:
        self.clients: list[str] = []
        """The common name of each connection's certificate."""
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=ca.pem.decode())
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._context.load_cert_chain(pair.cert, pair.key)
        self._context.set_alpn_protocols(["h2"])
        self._temporal = temporal.rsplit(":", 1)
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.address = ""

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def trust(self, ca: Authority) -> None:
        """Accept certificates of this CA as well, on new connections."""
        self._context.load_verify_locations(cadata=ca.pem.decode())

    @asynccontextmanager
    async def silent(self) -> AsyncIterator[None]:
        """Answer no new connection while the context is open; those that are open go on."""
        assert self._server is not None
        self._server.close()
        host, port = self.address.split(":")
        # The kernel takes connections, and nobody does anything with them.
        with socket.create_server((host, int(port))):
            yield
        self._server = await asyncio.start_server(self._serve, host, int(port), ssl=self._context)

    def cut(self) -> None:
        """Close all connections."""
        for writer in self._writers:
            writer.transport.abort()

    async def close(self) -> None:
        self.cut()
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        subject = writer.get_extra_info("peercert")["subject"]
        self.clients.append(dict(item for part in subject for item in part)["commonName"])
        there, back = await asyncio.open_connection(self._temporal[0], int(self._temporal[1]))
        self._writers |= {writer, back}
        try:
            await asyncio.gather(_copy(reader, back), _copy(there, writer))
        except (OSError, ssl.SSLError):
            pass
        finally:
            self._writers -= {writer, back}
            writer.transport.abort()
            back.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    raise ConnectionResetError


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@asynccontextmanager
async def behind_tls(stack: Stack, ca: Authority) -> AsyncIterator[tuple[TlsProxy, Process, Process]]:
    """Run a gateway and a GPU worker that connect to Temporal through a proxy with TLS; yield all three."""
    pair, queue = ca.issue("first"), f"tls-{ca.folder.name}"
    settings = {
        "TEMPORAL_TLS_SERVER_CA_CERT_PATH": str(ca.path),
        "TEMPORAL_TLS_CLIENT_CERT_PATH": str(pair.cert),
        "TEMPORAL_TLS_CLIENT_KEY_PATH": str(pair.key),
        "GATEWAY_WORKFLOW_QUEUE": f"{queue}-workflows",
        "GATEWAY_MODELS": (
            '[{"name": "docstrings", "context_tokens": 8192, "max_output_tokens": 8192,'
            f' "default_max_tokens": 64, "queue": "{queue}"}}]'
        ),
        "GPU_WORKER_TASK_QUEUE": queue,
    }
    proxy = TlsProxy(ca, ca.issue("temporal"), stack.address("temporal"))
    async with AsyncExitStack() as exits:
        await proxy.start()
        exits.push_async_callback(proxy.close)
        processes = [
            stack.add(kind, {**settings, "TEMPORAL_ADDRESS": proxy.address}) for kind in ("gateway", "gpu-worker")
        ]
        for process in processes:
            await process.start()
            exits.push_async_callback(process.terminate)
        for process in processes:
            await process.wait_ready()
        yield proxy, processes[0], processes[1]


def behind(proxy: TlsProxy, ca: Authority, pair: Pair) -> dict[str, str]:
    """Return the settings of a gateway that reaches Temporal through the proxy."""
    return {
        "GATEWAY_ROLE": "api",
        "TEMPORAL_ADDRESS": proxy.address,
        "TEMPORAL_TLS_SERVER_CA_CERT_PATH": str(ca.path),
        "TEMPORAL_TLS_CLIENT_CERT_PATH": str(pair.cert),
        "TEMPORAL_TLS_CLIENT_KEY_PATH": str(pair.key),
    }


async def logged(process: Process, words: str) -> None:
    """Return once the process has logged the words."""
    async with asyncio.timeout(120):
        while words not in process.log_path.read_text():  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.1)


async def test_new_files_are_used_without_a_restart_and_a_running_job_goes_on(stack: Stack, ca: Authority) -> None:
    """That holds once the connection with the first files is closed."""
    async with behind_tls(stack, ca) as (proxy, gateway, worker):
        assert set(proxy.clients) == {"first"}
        async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
            stub = LlmServiceStub(channel)
            job = new_job(params={"max_tokens": 8000})
            id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
            await until_output(stub, id_)
            second = ca.issue("second")
            replace(ca.folder / "first.key", second.key.read_bytes())
            replace(ca.folder / "first.pem", second.cert.read_bytes())
            for process in (gateway, worker):
                await logged(process, "connected to Temporal with changed TLS files")
            assert set(proxy.clients) == {"first", "second"}
            proxy.clients.clear()
            proxy.cut()
            await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_), timeout=60)
            assert (await watch(stub, id_)).states[-1] == "CANCELLED"
            again = new_job(params={"max_tokens": 5})
            other = (await stub.Submit(llm_pb2.SubmitRequest(job=again), timeout=60)).workflow_id
            seen = await watch(stub, other)
            assert (seen.states[-1], seen.final.result.metadata.attempts) == ("SUCCEEDED", 1)
        assert "second" in proxy.clients
        assert await eagerly_started(stack, other), "the workflow worker is known to the new connection"
        # The old connections still try to reach Temporal, for their last polls.
        assert gateway.running
        assert worker.running


async def test_files_that_do_not_connect_leave_the_old_connection_until_they_do(stack: Stack, ca: Authority) -> None:
    """The new certificate is of a CA that Temporal trusts later."""
    others = Authority(ca.folder, "others")
    async with behind_tls(stack, ca) as (proxy, gateway, _):
        stranger = others.issue("stranger", valid_for=timedelta(days=1))
        replace(ca.folder / "first.key", stranger.key.read_bytes())
        replace(ca.folder / "first.pem", stranger.cert.read_bytes())
        await logged(gateway, "changed TLS files do not connect to Temporal, the old connection stays")
        async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
            assert (await watch(LlmServiceStub(channel), await _submitted(channel))).states[-1] == "SUCCEEDED"
        proxy.trust(others)
        await logged(gateway, "connected to Temporal with changed TLS files")
        assert "stranger" in proxy.clients


async def test_files_are_used_although_the_first_try_got_no_answer(stack: Stack, ca: Authority) -> None:
    """The SDK itself would wait for ever, and no later change would be seen."""
    async with behind_tls(stack, ca) as (proxy, gateway, _):
        second = ca.issue("second")
        async with proxy.silent():
            replace(ca.folder / "first.key", second.key.read_bytes())
            replace(ca.folder / "first.pem", second.cert.read_bytes())
            await logged(gateway, "the old connection stays: no answer within 10 s")
        await logged(gateway, "connected to Temporal with changed TLS files")
        assert "second" in proxy.clients


async def test_a_process_starts_although_the_first_try_got_no_answer(stack: Stack, ca: Authority) -> None:
    pair = ca.issue("client")
    proxy = TlsProxy(ca, ca.issue("temporal"), stack.address("temporal"))
    await proxy.start()
    gateway = stack.add("gateway", behind(proxy, ca, pair))
    async with proxy.silent():
        await gateway.start()
        await logged(gateway, "Temporal cannot be reached yet: no answer within 10 s")
    await gateway.wait_ready()
    await gateway.terminate()
    await proxy.close()


async def test_files_that_change_while_temporal_refuses_the_first_ones_are_used(stack: Stack, ca: Authority) -> None:
    """A process that waits for Temporal at its start needs no restart."""
    pair = Authority(ca.folder, "others").issue("client")
    proxy = TlsProxy(ca, ca.issue("temporal"), stack.address("temporal"))
    await proxy.start()
    gateway = stack.add("gateway", behind(proxy, ca, pair))
    await gateway.start()
    await logged(gateway, "Temporal cannot be reached yet")
    ca.issue("client")
    await gateway.wait_ready()
    assert set(proxy.clients) == {"client"}
    await gateway.terminate()
    await proxy.close()


async def eagerly_started(stack: Stack, workflow_id: str) -> bool:
    """Return whether the gateway that submitted the job got its first workflow task with the answer."""
    client = await Client.connect(stack.address("temporal"))
    history = await client.get_workflow_handle(workflow_id).fetch_history()
    return history.events[0].workflow_execution_started_event_attributes.eager_execution_accepted


async def _submitted(channel: grpc.aio.Channel) -> str:
    job = new_job(params={"max_tokens": 5})
    return (await LlmServiceStub(channel).Submit(llm_pb2.SubmitRequest(job=job), timeout=60)).workflow_id
