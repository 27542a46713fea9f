"""The nats-server of deploy/nats, with TLS from the first byte. Each role can do its work and nothing else."""

import asyncio
import json
import logging
import os
import signal
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import nkeys
import pytest
from nats.aio.client import Client
from nats.errors import Error as NatsError
from pydantic import SecretStr, ValidationError

from deploy.local.ports import free_port
from deploy.local.process import Process
from deploy.local.stack import Stack
from feed.feed import FeedSettings
from feed.nats import NatsFeed
from feed.nats_answers import NatsAnswers
from jobs.errors import DeliveryFailed
from llm_pb import internal_pb2, llm_pb2
from runtime.audit import AuditUnavailable
from runtime.audit_nats import AuditStream
from runtime.nats_client import new_client
from services.gateway.audit_settings import AuditSettings
from services.notifier.settings import NotifierSettings
from services.notifier.sinks.nats import NatsSink
from tests.support.certificates import Authority, replace
from tests.support.stacks import stack_settings, tool

ROLES = {"gateway": "gateway", "gpu-worker": "gpu-worker", "notifier": "notifier"}
STREAM, EVENTS = "LLM_FEED", "EVENTS"
API = "$JS.API"
REPORTS = "llm.feed.workers.reports"


@pytest.fixture(scope="module")
async def broker(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """The broker of a stack with TLS, with the operator's stream of events and a job in the stream of the feed."""
    settings = stack_settings(tmp_path_factory.mktemp("nats roles"), tls=True)
    async with Stack(settings, only=("nats",)) as stack:
        async with connected(stack, "operator") as operator:
            await operator.jetstream().add_stream(name=EVENTS, subjects=["llm.events.>"])
        feed = feed_of(stack, "gateway")
        feed.start()
        async with asyncio.timeout(60):
            await feed.wait_ready()
        assert await feed.sync("job", record("secret"))
        await feed.close()
        yield stack


def record(text: str) -> internal_pb2.FeedRecord:
    return internal_pb2.FeedRecord(writer="w", tokens_made=internal_pb2.TokensMade(text=text))


def files(stack: Stack) -> Path:
    assert stack.ca is not None
    return stack.ca.parent


def feed_of(stack: Stack, role: str, **changes: Any) -> NatsFeed:
    given = {
        "url": SecretStr(f"nats://{stack.address('nats')}"),
        "tls_ca": stack.ca,
        "nkey_seed": files(stack) / f"{role}.nk",
        **changes,
    }
    return NatsFeed(FeedSettings(**given), role)


@asynccontextmanager
async def connected(stack: Stack, role: str, **changes: Any) -> AsyncIterator[Client]:
    """Provide a client with the key of a role."""
    url = SecretStr(f"nats://{stack.address('nats')}")
    client, refusals = new_client(url, None), asyncio.Queue[str]()

    async def note(error: Exception) -> None:
        refusals.put_nowait(str(error))

    options = {
        "tls": ssl.create_default_context(cafile=stack.ca),
        "tls_handshake_first": True,
        "nkeys_seed": str(files(stack) / f"{role}.nk"),
        "inbox_prefix": f"_INBOX.{role}",
        **changes,
    }
    try:
        await client.connect(url.get_secret_value(), error_cb=note, allow_reconnect=False, **options)
        client.options["refusals"] = refusals
        yield client
    finally:
        await client.close()


async def refusal(client: Client) -> str:
    """Return the next refusal of the server."""
    async with asyncio.timeout(60):
        found: str = await client.options["refusals"].get()
    assert "permissions violation" in found.lower()
    return found.lower()


async def test_gateway_and_worker_share_a_feed_that_only_the_gateway_creates_and_purges(broker: Stack) -> None:
    gateway, worker = feed_of(broker, "gateway"), feed_of(broker, "gpu-worker")
    for feed in (gateway, worker):
        feed.start()
    async with asyncio.timeout(60):
        await gateway.wait_ready()
        await worker.wait_ready()
    await worker.append("shared", record("a"))
    assert await worker.sync("shared", record("b"))
    for feed in (gateway, worker):
        texts: list[str] = []

        def take(item: internal_pb2.FeedRecord, texts: list[str] = texts) -> bool:
            texts.append(item.tokens_made.text)
            return len(texts) == 2

        async with asyncio.timeout(60):
            await feed.read("shared", take)
        assert texts == ["a", "b"]
    await worker.remove("shared")
    async with connected(broker, "operator") as operator:
        assert (await operator.jetstream().stream_info(STREAM, subjects_filter="llm.feed.shared")).state.messages >= 2
        await gateway.remove("shared")
        state = (await operator.jetstream().stream_info(STREAM, subjects_filter="llm.feed.shared")).state
        assert not (state.subjects or {}).get("llm.feed.shared")
    for feed in (gateway, worker):
        await feed.close()


async def test_workers_keep_answers_that_the_gateway_removes(broker: Stack) -> None:
    gateway, worker = feed_of(broker, "gateway"), feed_of(broker, "gpu-worker")
    hour = timedelta(hours=1)
    async with asyncio.timeout(60):
        for feed in (gateway, worker):
            feed.start()
            await feed.wait_ready()
        of_gateway, of_worker = (NatsAnswers(feed, FeedSettings()) for feed in (gateway, worker))
        assert await of_gateway.forget("llmjob-a-1"), "there is no cache yet"
        turn = await of_worker.claim("key", 0)
        assert turn
        await of_worker.put("key", "llmjob-a-1", b"answer", hour)
        await of_worker.release("key", turn)
        assert (await of_worker.find("key")).data == b"answer"
        assert await of_gateway.forget("llmjob-a-1")
        assert (await of_worker.find("key")).data is None
    for feed in (gateway, worker):
        await feed.close()


async def test_a_gateway_gets_the_reports_of_workers(broker: Stack) -> None:
    """No stream stores them. A role that may not read them knows that it gets none."""
    gateway, worker, notifier = (feed_of(broker, role) for role in ("gateway", "gpu-worker", "notifier"))
    got = asyncio.Queue[bytes]()
    for feed in (gateway, worker, notifier):
        feed.start()
    for feed in (gateway, notifier):
        await feed.receive_reports(got.put_nowait)
    report = internal_pb2.WorkerReport(worker=llm_pb2.WorkerInfo(worker="w"))
    async with asyncio.timeout(60):
        while not gateway.receiving:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        while not await worker.publish_report(report):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        assert await got.get() == report.SerializeToString()
        log = broker.processes["nats"].log_path
        while f'Subscription Violation - Subject "{REPORTS}"' not in log.read_text():  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        while notifier.receiving:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    async with connected(broker, "operator") as operator:
        state = (await operator.jetstream().stream_info(STREAM, subjects_filter=REPORTS)).state
        assert not (state.subjects or {}).get(REPORTS)
    for feed in (gateway, worker, notifier):
        await feed.close()


async def test_a_worker_waits_for_the_gateway_to_create_the_stream(tmp_path: Path) -> None:
    """It works with limits that differ from its own settings."""
    async with Stack(stack_settings(tmp_path / "state", tls=True), only=("nats",)) as stack:
        worker = feed_of(stack, "gpu-worker", max_age=timedelta(hours=1), timeout=timedelta(seconds=1))
        worker.start()
        log = stack.processes["nats"].log_path
        async with asyncio.timeout(60):
            while f'Publish Violation - Subject "{API}.STREAM.CREATE.{STREAM}"' not in log.read_text():  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        assert not worker.available
        gateway = feed_of(stack, "gateway")
        gateway.start()
        async with asyncio.timeout(60):
            await worker.wait_ready()
        assert await worker.sync("job", record("a"))
        for feed in (gateway, worker):
            await feed.close()


async def test_the_notifier_publishes_events_and_only_where_a_stream_is(broker: Stack) -> None:
    settings = NotifierSettings(
        nats_url=SecretStr(f"nats://{broker.address('nats')}"),
        nats_tls_ca=broker.ca,
        nats_nkey_seed=files(broker) / "notifier.nk",
    )
    sink, event = NatsSink(settings), {"id": "1"}
    target = llm_pb2.NotifyTarget(nats=llm_pb2.NatsSubject(subject="team"))
    await sink.deliver(target, event, "user")  # type: ignore[arg-type]
    async with connected(broker, "operator") as operator:
        message = await operator.jetstream().get_last_msg(EVENTS, "llm.events.team")
        assert json.loads(message.data or b"") == event
    await sink.close()
    wrong = NatsSink(settings.model_copy(update={"nats_subject_prefix": "llm.feed"}))
    with pytest.raises(DeliveryFailed):
        await wrong.deliver(target, event, "user")  # type: ignore[arg-type]
    await wrong.close()


FORBIDDEN_TO_ALL = {
    "read the feed raw": ("subscribe", "llm.feed.>"),
    "read events raw": ("subscribe", "llm.events.>"),
    "read everything": ("subscribe", ">"),
    "read all inboxes": ("subscribe", "_INBOX.>"),
    "read what JetStream is asked": ("subscribe", f"{API}.>"),
    "read advisories": ("subscribe", "$JS.EVENT.>"),
    "delete the feed": ("publish", f"{API}.STREAM.DELETE.{STREAM}"),
    "delete a record": ("publish", f"{API}.STREAM.MSG.DELETE.{STREAM}"),
    "get a record": ("publish", f"{API}.STREAM.MSG.GET.{STREAM}"),
    "get a record directly": ("publish", f"{API}.DIRECT.GET.{STREAM}"),
    "take a snapshot": ("publish", f"{API}.STREAM.SNAPSHOT.{STREAM}"),
    "list streams": ("publish", f"{API}.STREAM.NAMES"),
    "list consumers": ("publish", f"{API}.CONSUMER.NAMES.{STREAM}"),
    "delete a consumer": ("publish", f"{API}.CONSUMER.DELETE.{STREAM}.x"),
    "make a durable consumer": ("publish", f"{API}.CONSUMER.DURABLE.CREATE.{STREAM}.x"),
    "make another stream": ("publish", f"{API}.STREAM.CREATE.OTHER"),
    "purge events": ("publish", f"{API}.STREAM.PURGE.{EVENTS}"),
    "read events": ("publish", f"{API}.CONSUMER.CREATE.{EVENTS}"),
    "answer for another": ("publish", "_INBOX.operator.x"),
    "ask the system": ("publish", "$SYS.REQ.SERVER.PING"),
}
READ_REPORTS = {"read the reports of workers": ("subscribe", REPORTS)}
FORGE_REPORTS = {"forge the report of a worker": ("publish", REPORTS)}
ONLY_GATEWAY = {
    **READ_REPORTS,
    "make the feed": ("publish", f"{API}.STREAM.CREATE.{STREAM}"),
    "change the feed": ("publish", f"{API}.STREAM.UPDATE.{STREAM}"),
    "purge the feed": ("publish", f"{API}.STREAM.PURGE.{STREAM}"),
}
ONLY_FEED = {
    "forge tokens": ("publish", "llm.feed.job"),
    "look at the feed": ("publish", f"{API}.STREAM.INFO.{STREAM}"),
    "read the feed": ("publish", f"{API}.CONSUMER.CREATE.{STREAM}"),
    "steer a reader": ("publish", f"$JS.FC.{STREAM}.x"),
}
ONLY_WORKER = {
    "forge an answer": ("publish", "llm.cache.answer.key.job"),
    "read an answer": ("publish", f"{API}.STREAM.MSG.GET.LLM_CACHE"),
}
FORGET_ANSWERS = {"purge the cache of answers": ("publish", f"{API}.STREAM.PURGE.LLM_CACHE")}
ONLY_NOTIFIER = {"forge events": ("publish", "llm.events.team")}
TRIED = {
    "gateway": {**FORBIDDEN_TO_ALL, **ONLY_NOTIFIER, **FORGE_REPORTS, **ONLY_WORKER},
    "gpu-worker": {**FORBIDDEN_TO_ALL, **ONLY_GATEWAY, **ONLY_NOTIFIER, **FORGET_ANSWERS},
    "notifier": {**FORBIDDEN_TO_ALL, **ONLY_GATEWAY, **ONLY_FEED, **FORGE_REPORTS, **ONLY_WORKER, **FORGET_ANSWERS},
}


@pytest.mark.parametrize(
    ("role", "kind", "subject"),
    [
        pytest.param(role, *tried, id=f"{role}: {name}")
        for role, all_tried in TRIED.items()
        for name, tried in {
            **all_tried,
            **{f"read answers to {r}": ("subscribe", f"_INBOX.{r}.>") for r in (*TRIED, "operator") if r != role},
        }.items()
    ],
)
async def test_a_role_is_refused_what_is_not_its_work(broker: Stack, role: str, kind: str, subject: str) -> None:
    async with connected(broker, role) as client:
        if kind == "subscribe":
            await client.subscribe(subject)
        else:
            await client.publish(subject, b"{}")
        assert subject.lower() in await refusal(client)


async def test_a_consumer_delivers_to_its_own_role_alone(broker: Stack) -> None:
    """The notifier cannot subscribe to the inbox at which a worker's consumer delivers."""
    async with connected(broker, "gpu-worker") as worker, connected(broker, "notifier") as notifier:
        await notifier.subscribe("_INBOX.gpu-worker.>")
        assert "_inbox.gpu-worker" in await refusal(notifier)
        heard = await worker.subscribe(worker.new_inbox())
        config = {"deliver_subject": heard.subject, "ack_policy": "none", "filter_subject": "llm.feed.job"}
        request = json.dumps({"stream_name": STREAM, "config": config}).encode()
        answer = await worker.request(f"{API}.CONSUMER.CREATE.{STREAM}", request, timeout=30)
        assert "error" not in json.loads(answer.data)
        assert b"secret" in (await heard.next_msg(30)).data


@pytest.mark.parametrize(
    "changes",
    [
        {"nkeys_seed": None},
        {"nkeys_seed": None, "user": "gateway", "password": "gateway"},
        {"tls": ssl.create_default_context()},
        {"tls_handshake_first": False, "tls": None},
    ],
    ids=["without a key", "with a password", "without the CA", "in clear"],
)
async def test_nobody_connects_without_key_and_tls(broker: Stack, changes: dict[str, Any]) -> None:
    with pytest.raises((NatsError, OSError, TimeoutError)):
        async with asyncio.timeout(20), connected(broker, "gateway", connect_timeout=5, **changes):
            pass


async def test_a_foreign_key_is_refused(broker: Stack, tmp_path: Path) -> None:
    seed = tmp_path / "foreign.nk"
    seed.write_bytes(nkeys.encode_seed(b"1" * 32, nkeys.PREFIX_BYTE_USER))
    with pytest.raises((NatsError, OSError, TimeoutError)):
        async with asyncio.timeout(20), connected(broker, "gateway", nkeys_seed=str(seed)):
            pass


@asynccontextmanager
async def a_broker(folder: Path, config: str) -> AsyncIterator[tuple[Process, int]]:
    """Run a nats-server with a configuration; yield it and its port."""
    port = free_port()
    (folder / "nats.conf").write_text(config)

    async def answers(_: Process) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    command = (tool("nats-server"), "-c", str(folder / "nats.conf"), "-a", "127.0.0.1", "-p", str(port))
    command += ("-js", "-sd", str(folder / "store"))
    process = Process(
        "nats",
        command,
        {},
        log_path=folder / "nats.log",
        probe=answers,
        working_dir=folder,
        start_timeout=60,
        stop_grace=10,
    )
    await process.start()
    try:
        await process.wait_ready()
        yield process, port
    finally:
        await process.terminate()


TLS = 'tls {{ cert_file: "{cert}", key_file: "{key}", handshake_first: {first}, ca_file: "{ca}", verify: true }}\n'
PASSWORD = 'authorization { user: "feed", password: "hush" }\n'


async def test_a_feeds_new_client_certificate_is_used_for_the_next_connection(tmp_path: Path) -> None:
    """Here with a password, too."""
    ca, later = Authority(tmp_path), Authority(tmp_path, "later")
    server, client = ca.issue("server"), ca.issue("client")
    config = TLS.format(cert=server.cert, key=server.key, ca=ca.path, first="true") + PASSWORD
    async with a_broker(tmp_path, config) as (process, port):
        url = SecretStr(f"nats://feed:hush@127.0.0.1:{port}")
        feed = NatsFeed(FeedSettings(url=url, tls_ca=ca.path, tls_cert=client.cert, tls_key=client.key))
        feed.start()
        async with asyncio.timeout(60):
            await feed.wait_ready()
        assert await feed.sync("job", record("a"))
        # The broker has a certificate of another CA from now on. The feed trusts that CA a while later.
        await process.kill()
        trusted = ca.pem
        later.issue("server")
        ca.path.write_bytes(later.pem)
        await process.start()
        await process.wait_ready()
        replace(ca.path, trusted)
        async with asyncio.timeout(60):
            while process.log_path.read_text().count("TLS handshake error") < 3:  # noqa: ASYNC110  nobody tells
                await asyncio.sleep(0.2)
        assert not feed.available
        later.issue("client")
        replace(ca.path, later.pem)
        async with asyncio.timeout(120):
            while not await feed.sync("job", record("b")):  # noqa: ASYNC110  nobody tells
                await asyncio.sleep(0.2)
        await feed.close()


@pytest.mark.parametrize(("scheme", "with_ca"), [("nats", True), ("tls", True), ("tls", False)])
async def test_a_feed_with_tls_sends_nothing_in_clear(tmp_path: Path, scheme: str, with_ca: bool) -> None:
    """A man in the middle could claim that the server offers no TLS, and read the password."""
    ca, tries = Authority(tmp_path), asyncio.Semaphore(0)
    heard = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.15.0","max_payload":1048576,"auth_required":true}\r\n')
        heard.extend(await reader.read(1 << 16))
        tries.release()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    url = SecretStr(f"{scheme}://feed:hush@127.0.0.1:{port}")
    feed = NatsFeed(FeedSettings(url=url, tls_ca=ca.path if with_ca else None))
    feed.start()
    async with asyncio.timeout(60):
        for _ in range(3):
            await tries.acquire()
        await feed.close()
    server.close()
    assert b"hush" not in heard
    assert b"CONNECT" not in heard


@pytest.mark.parametrize("prefix", ["FEED_", "NOTIFIER_NATS_"])
def test_half_of_a_clients_tls_is_refused(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Authority(tmp_path).issue("client")
    kind = FeedSettings if prefix == "FEED_" else NotifierSettings
    monkeypatch.setenv(f"{prefix}TLS_CERT", str(pair.cert))
    with pytest.raises(ValidationError, match=f"{prefix}TLS_CERT and {prefix}TLS_KEY must be set together"):
        kind()
    monkeypatch.setenv(f"{prefix}TLS_KEY", str(pair.key))
    with pytest.raises(ValidationError, match=f"and {prefix}TLS_CA with them"):
        kind()


@pytest.mark.parametrize("text", ["UABC", "", "SUABC"])
def test_a_file_that_holds_no_seed_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "public.nk"
    path.write_text(text)
    with pytest.raises(OSError, match=r"FEED_NKEY_SEED .*public\.nk holds no NKey seed"):
        NatsFeed(FeedSettings(nkey_seed=path))


def test_a_url_in_clear_is_refused_with_a_ca(tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    with pytest.raises(ValueError, match="FEED_TLS_CA is set, but"):
        NatsFeed(FeedSettings(url=SecretStr("ws://127.0.0.1:9"), tls_ca=ca.path))
    NatsFeed(FeedSettings(url=SecretStr("wss://127.0.0.1:9"), tls_ca=ca.path))


async def test_a_url_of_the_scheme_tls_connects_to_a_server_that_speaks_first(tmp_path: Path) -> None:
    """That is nats-server's default."""
    ca = Authority(tmp_path)
    server, client = ca.issue("server"), ca.issue("client")
    config = TLS.format(cert=server.cert, key=server.key, ca=ca.path, first="false") + PASSWORD
    async with a_broker(tmp_path, config) as (_, port):
        url = SecretStr(f"tls://feed:hush@127.0.0.1:{port}")
        feed = NatsFeed(FeedSettings(url=url, tls_ca=ca.path, tls_cert=client.cert, tls_key=client.key))
        feed.start()
        async with asyncio.timeout(60):
            await feed.wait_ready()
        assert await feed.sync("job", record("a"))
        await feed.close()


def new_seed() -> tuple[bytes, str]:
    """Return an NKey seed of a user, and its public key."""
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    return seed, nkeys.from_seed(bytearray(seed)).public_key.decode()


@pytest.mark.parametrize("how", ["reload", "restart"])
@pytest.mark.parametrize("meanwhile", ["missing", "half written"])
async def test_a_new_nkey_is_used_without_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str, meanwhile: str
) -> None:
    """The broker has the new one first, while the file of the seed cannot be used."""
    caplog.set_level(logging.INFO)
    (seed, public), (later, later_public) = new_seed(), new_seed()
    file, config = tmp_path / "feed.nk", "authorization {{ users: [ {{ nkey: {} }} ] }}\n"
    file.write_bytes(seed)
    async with a_broker(tmp_path, config.format(public)) as (process, port):
        feed = NatsFeed(FeedSettings(url=SecretStr(f"nats://127.0.0.1:{port}"), nkey_seed=file))
        feed.start()
        async with asyncio.timeout(60):
            await feed.wait_ready()
        file.write_bytes(later[:9])
        if meanwhile == "missing":
            file.unlink()
        (tmp_path / "nats.conf").write_text(config.format(later_public))
        if how == "reload":
            process.signal(signal.SIGHUP)
        else:
            await process.kill()
            await process.start()
            await process.wait_ready()
        caplog.clear()
        async with asyncio.timeout(60):
            # It has tried to connect in vain.
            while feed.available or len(caplog.records) < 4:  # noqa: ASYNC110  nobody tells
                await asyncio.sleep(0.2)
        replace(file, later)
        async with asyncio.timeout(120):
            while not await feed.sync("job", record("a")):  # noqa: ASYNC110  nobody tells
                await asyncio.sleep(0.2)
        await feed.close()


def audit_settings(url: str, stream: str, **files: Path | None) -> AuditSettings:
    given = {f"audit_{name}": value for name, value in files.items()}
    return AuditSettings(audit=SecretStr(f"{url}/{stream}"), **given)  # type: ignore[arg-type]


async def until_written(store: AuditStream, record: bytes) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                return await store.write([record])
            except AuditUnavailable:
                await asyncio.sleep(0.1)


async def test_the_gateway_writes_an_audit_log_that_it_can_neither_read_nor_empty(broker: Stack) -> None:
    """The connection is as secure as that of the feed."""
    seed = files(broker) / "gateway.nk"
    settings = audit_settings(f"nats://{broker.address('nats')}", "LLM_AUDIT", tls_ca=broker.ca, nkey_seed=seed)
    store = AuditStream(settings, "gateway", settings.audit_stream)
    await until_written(store, b"{}\n")
    await store.close()
    async with connected(broker, "operator") as operator:
        assert (await operator.jetstream().get_msg("LLM_AUDIT", 1)).data == b"{}"
    async with connected(broker, "gateway") as gateway:
        for action in ("STREAM.DELETE", "STREAM.PURGE", "STREAM.UPDATE", "STREAM.MSG.GET", "CONSUMER.CREATE"):
            await gateway.publish(f"{API}.{action}.LLM_AUDIT", b"{}")
            assert action.lower() in await refusal(gateway)


async def test_the_password_of_the_audit_log_is_not_sent_in_clear() -> None:
    """A server that offers no TLS may be anybody."""
    received: list[bytes] = []
    asked = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.10","max_payload":1048576,"proto":1,"headers":true}\r\n')
        received.append(await reader.read(1 << 16))
        asked.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    settings = audit_settings(f"tls://gateway:s3cret@127.0.0.1:{port}", "LLM_AUDIT")
    store = AuditStream(settings, "gateway", settings.audit_stream)
    async with asyncio.timeout(60):
        await asked.wait()
    assert not any(b"s3cret" in data for data in received)
    with pytest.raises(AuditUnavailable):
        await store.write([b"{}\n"])
    await store.close()
    server.close()


@pytest.mark.parametrize(
    "place",
    ["nats://127.0.0.1:99999/S", "nats://127.0.0.1:x/S", "nats:///S", "nats://host", "http://host/S", "nats://h/a/b"],
)
def test_a_place_of_the_audit_log_that_no_client_can_reach_is_refused(place: str) -> None:
    with pytest.raises(ValidationError, match="nats://host:4222/STREAM"):
        AuditSettings(audit=SecretStr(place))
