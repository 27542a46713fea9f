"""The contract of sinks, tested on each sink with a real receiver, and then the promises of single sinks."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack

import nats
import pytest
from aiohttp import web
from opentelemetry import trace
from opentelemetry.metrics import NoOpMeter
from opentelemetry.trace import SpanContext, TraceFlags, TraceState
from pydantic import SecretStr, ValidationError
from standardwebhooks import Webhook, WebhookVerificationError

from deploy.local.stack import Stack
from jobs.errors import DeliveryFailed, DeliveryRefused
from llm_pb import internal_pb2, llm_pb2
from services.notifier.dispatcher import Dispatcher
from services.notifier.event import CloudEvent
from services.notifier.metrics import NotifierMetrics
from services.notifier.settings import NotifierSettings, TenantEndpoint, UserEndpoint
from services.notifier.sinks.registry import open_sinks
from services.notifier.sinks.sink import Sink
from tests.support.jobs import webhook
from tests.support.name_servers import name_server
from tests.support.peers import LOOPBACK, PEERS, SHORT, NatsPeer, Peer, PostgresPeer, WebhookPeer, kafka_peer, secret
from tests.support.postgres_server import postgres_server
from tests.support.receivers import Reply, Request, close_early, endless_headers, hang, receiving, status
from tests.support.stacks import stack_settings

METRICS = NotifierMetrics(NoOpMeter("test"))


@pytest.fixture(scope="module", params=PEERS)
async def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Peer]:
    if request.param == "webhook":
        async with receiving() as receiver:
            yield WebhookPeer(receiver)
    elif request.param == "nats":
        async with Stack(stack_settings(tmp_path_factory.mktemp("nats")), only=("nats",)) as stack:
            nats_peer = NatsPeer(stack)
            await nats_peer.start()
            yield nats_peer
    elif request.param == "postgres":
        async with postgres_server() as server:
            yield PostgresPeer(server)
    else:
        async with kafka_peer() as kafka:
            yield kafka


@pytest.fixture
async def sink(peer: Peer) -> AsyncIterator[Sink]:
    """It has the timeouts that a notifier has by default."""
    defaults = NotifierSettings().model_dump(include={"webhook_timeout", "broker_timeout"})
    async with open_sinks(peer.settings.model_copy(update=defaults)) as sinks:
        yield sinks[peer.kind]


def event(id_: str = "1") -> CloudEvent:
    subject = f"llmjob-u-{id_}"
    return {"specversion": "1.0", "id": id_, "type": "t", "source": "/s", "subject": subject, "data": {"é": "€"}}


async def test_an_event_arrives_whole(peer: Peer, sink: Sink) -> None:
    """It arrives once, as a CloudEvent in structured mode."""
    answer = await sink.deliver(peer.target("whole"), event(), "user")
    assert answer.error is None
    (taken,) = await peer.taken("whole", 1)
    assert taken.event == event()
    assert taken.id == "1"
    assert taken.content_type == "application/cloudevents+json; charset=UTF-8"
    assert taken.key == (event()["subject"] if peer.keyed else ""), "the key must be the job's id"


async def test_an_event_carries_its_trace_and_nothing_else_of_the_client(peer: Peer, sink: Sink) -> None:
    """The tracestate may contain facts of the client's systems that third parties must not see."""
    context = SpanContext(7, 8, is_remote=True, trace_flags=TraceFlags(1), trace_state=TraceState([("vendor", "own")]))
    with trace.use_span(trace.NonRecordingSpan(context)):
        assert (await sink.deliver(peer.target("traced"), event("9"), "user")).error is None
    (taken,) = await peer.taken("traced", 1)
    assert taken.headers["traceparent"] == f"00-{7:032x}-{8:016x}-01"
    assert "tracestate" not in taken.headers


async def test_a_repeat_is_the_same(peer: Peer, sink: Sink) -> None:
    """It has the same bytes and the same id, so that a receiver can drop it. NATS itself drops it."""
    for _ in range(2):
        assert (await sink.deliver(peer.target("repeat"), event("7"), "user")).error is None
    assert (await sink.deliver(peer.target("repeat"), event("8"), "user")).error is None
    # Those of different jobs come in any order.
    *taken, last = sorted(await peer.taken("repeat", 2 if peer.drops_repeats else 3), key=lambda one: one.id)
    assert last.id == "8"
    assert {(item.id, json.dumps(item.event)) for item in taken} == {("7", json.dumps(event("7")))}


async def test_many_at_once_all_arrive(peer: Peer, sink: Sink) -> None:
    target = peer.target("many")
    ids = {f"many-{number}" for number in range(50)}
    await asyncio.gather(*(sink.deliver(target, event(id_), "user") for id_ in ids))
    assert {item.id for item in await peer.taken("many", 50)} == ids


async def test_silence_is_a_failure_and_passes(peer: Peer) -> None:
    """The failure comes within the timeout of the settings. The same sink delivers when the receiver answers again."""
    name = "silent"
    async with open_sinks(peer.settings) as sinks:
        sink = sinks[peer.kind]
        peer.fall_silent()
        try:
            async with asyncio.timeout(5 * SHORT.total_seconds()):
                with pytest.raises(DeliveryFailed):
                    await sink.deliver(peer.target(name), event("lost"), "user")
        finally:
            peer.resume()
        async with asyncio.timeout(60):
            while True:
                try:
                    await sink.deliver(peer.target(name), event("found"), "user")
                    break
                except DeliveryFailed:
                    continue
        await sink.deliver(peer.target(name), event("next"), "user")
    # The event that was sent during the silence may have arrived as well.
    assert "found" in {item.id for item in await peer.taken(name, 2)}


async def test_an_event_that_is_too_large_for_the_broker_is_refused(peer: Peer, sink: Sink) -> None:
    """The refusal is final, because a repeat has the same size. The next event arrives. HTTP has no such limit."""
    large = {**event("large"), "data": "€" * 400_000}
    if not peer.bounded:
        assert (await sink.deliver(peer.target("large"), large, "user")).error is None
        return
    with pytest.raises(DeliveryRefused, match=r"the event of 12\d{5} bytes is larger than .+ accepts"):
        await sink.deliver(peer.target("large"), large, "user")
    assert (await sink.deliver(peer.target("large"), event("small"), "user")).error is None
    assert [item.id for item in await peer.taken("large", 1)] == ["small"]


async def test_a_cancelled_delivery_leaves_the_sink_whole(peer: Peer, sink: Sink) -> None:
    """A delivery is cancelled when the notifier stops or the attempt times out."""
    for _ in range(20):
        task = asyncio.create_task(sink.deliver(peer.target("cancelled"), event("cut"), "user"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    assert (await sink.deliver(peer.target("cancelled"), event("after"), "user")).error is None


async def test_what_the_operator_does_not_allow_is_refused(peer: Peer) -> None:
    """The refusal is final. A notifier without the target's sink refuses it as well."""
    request = internal_pb2.NotifyRequest(notification_id="1")
    if (refused := peer.refused()) is not None:
        request.target.CopyFrom(refused)
        async with open_sinks(peer.settings) as sinks:
            response = await Dispatcher(sinks, peer.settings, METRICS).deliver(request, SHORT)
        assert response.state == llm_pb2.NOTIFY_STATE_FAILED
    request.target.CopyFrom(peer.target("whole"))
    response = await Dispatcher({}, peer.settings, METRICS).deliver(request, SHORT)
    assert response.state == llm_pb2.NOTIFY_STATE_FAILED
    assert peer.kind in response.attempt.error.message


@pytest.mark.server
async def test_kafka_events_come_from_an_idempotent_producer() -> None:
    """Stored batches have the producer's id and a sequence without a gap, by which the broker drops repeats."""
    async with kafka_peer() as peer:
        async with open_sinks(peer.settings) as sinks:
            for number in range(3):
                one = {**event(str(number)), "subject": "llmjob-u-r"}
                await sinks["kafka"].deliver(peer.target("numbered"), one, "user")
        batches = await peer.batches("numbered", 3)
    assert [batch.base_sequence for batch in batches] == [0, 1, 2]
    ((producer, epoch),) = {(batch.producer_id, batch.producer_epoch) for batch in batches}
    assert producer is not None
    assert producer >= 0
    assert epoch >= 0


def test_kafkas_own_word_on_a_size_is_understood() -> None:
    """The broker's MESSAGE_TOO_LARGE and RECORD_LIST_TOO_LARGE are the errors that the sink treats as a refusal."""
    errors = pytest.importorskip("aiokafka.errors")
    assert [errors.for_code(code) for code in (10, 18)] == [
        errors.MessageSizeTooLargeError,
        errors.RecordListTooLargeError,
    ]


@pytest.mark.parametrize("limit", ["server's", "server's, with headers", "stream's"])
async def test_nats_limits_are_kept(tmp_path_factory: pytest.TempPathFactory, limit: str) -> None:
    """The limits are those of the server, headers included, and of the stream."""
    async with Stack(stack_settings(tmp_path_factory.mktemp("nats")), only=("nats",)) as stack:
        url = f"nats://{stack.address('nats')}"
        client = await nats.connect(url)
        maximum = 1000 if limit == "stream's" else -1
        await client.jetstream().add_stream(name="EVENTS", subjects=["llm.events.>"], max_msg_size=maximum)
        size = {"server's": client.max_payload + 1, "server's, with headers": client.max_payload, "stream's": 1001}[
            limit
        ]
        large = {**event(), "data": ""}
        large["data"] = "x" * (size - len(json.dumps(large)))
        settings = NotifierSettings(nats_url=SecretStr(url), **LOOPBACK)
        target = llm_pb2.NotifyTarget(nats=llm_pb2.NatsSubject(subject="large"))
        async with open_sinks(settings) as sinks:
            with pytest.raises(DeliveryRefused, match=f"the event of {size} bytes is larger than NATS accepts"):
                await sinks["nats"].deliver(target, large, "user")
            assert (await sinks["nats"].deliver(target, event(), "user")).error is None
        info = await client.jetstream().stream_info("EVENTS")
        assert info.state.messages == 1
        await client.close()


async def test_nats_without_a_stream_is_a_failure(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No stream stores the event, so it does not count as delivered."""
    async with Stack(stack_settings(tmp_path_factory.mktemp("nats")), only=("nats",)) as stack:
        settings = NotifierSettings(nats_url=SecretStr(f"nats://{stack.address('nats')}"), **LOOPBACK)
        target = llm_pb2.NotifyTarget(nats=llm_pb2.NatsSubject(subject="nowhere"))
        async with open_sinks(settings) as sinks:
            with pytest.raises(DeliveryFailed, match=r"no JetStream stream matches the subject llm\.events\.nowhere"):
                await sinks["nats"].deliver(target, event(), "user")


async def test_webhooks_are_signed_by_every_active_secret() -> None:
    """The user's secrets count, or else the operator's. A body that was changed on the way does not verify."""
    new, old, own = secret("new"), secret("old"), secret("own")
    settings = NotifierSettings(webhook_secrets=(new, old), users={"mine": UserEndpoint(secrets=(own,))}, **LOOPBACK)
    async with receiving() as receiver, open_sinks(settings) as sinks:
        (target,) = webhook(receiver.on("/signed", status(200)))
        await sinks["webhook"].deliver(target, event(), "anybody")
        await sinks["webhook"].deliver(target, event(), "mine")
        first, second = await receiver.received("/signed", 2)
    for verifies in (new, old):
        Webhook(verifies.get_secret_value()).verify(first.body, first.headers)
    Webhook(own.get_secret_value()).verify(second.body, second.headers)
    for request, wrong in ((first, own), (second, new), (second, old)):
        with pytest.raises(WebhookVerificationError):
            Webhook(wrong.get_secret_value()).verify(request.body, request.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(new.get_secret_value()).verify(first.body + b" ", first.headers)
    assert len(first.headers["webhook-signature"].split()) == 2


@pytest.mark.parametrize(
    "bad", ["secret", "whsec_", "whsec_!!", secret("x").get_secret_value()[:20], "whsec_" + "A" * 100]
)
def test_a_weak_secret_is_refused_at_the_start(bad: str) -> None:
    """The error does not contain the secret."""
    with pytest.raises(ValidationError, match="24 to 64 random bytes") as error:
        NotifierSettings(webhook_secrets=(SecretStr(bad),))
    assert bad not in str(error.value) or bad in ("secret", "whsec_")


async def malformed(writer: asyncio.StreamWriter, request: Request) -> None:
    writer.write(b"this is not HTTP\r\n\r\n")
    await writer.drain()


async def silent(writer: asyncio.StreamWriter, request: Request) -> None:
    """Close the connection without an answer."""


@pytest.mark.parametrize(
    ("at", "reply", "says"),
    [
        ("http://127.0.0.1:{port}", malformed, "the webhook's answer is not valid HTTP"),
        ("http://127.0.0.1:{port}", endless_headers, "the webhook's answer is not valid HTTP"),
        ("http://127.0.0.1:{port}", silent, "the webhook closed the connection before it had answered"),
        ("http://127.0.0.1:{port}", close_early, "the webhook closed the connection before it had answered"),
        ("http://127.0.0.1:1", silent, "the webhook could not be reached: it accepted no connection"),
        ("http://nowhere.example.com:{port}", silent, "the webhook could not be reached: its name does not resolve"),
    ],
)
async def test_a_failure_says_what_went_wrong(at: str, reply: Reply, says: str) -> None:
    """The job's user reads the message, and knows neither Python nor the notifier."""
    async with receiving() as receiver, name_server() as names:
        receiver.on("/", reply)
        changes = {"webhook_timeout": 10 * SHORT, "dns_servers": (names.address,), "webhook_schemes": ("https", "http")}
        async with open_sinks(NotifierSettings(**{**LOOPBACK, **changes})) as sinks:
            (target,) = webhook(f"{at.format(port=receiver.port)}/")
            with pytest.raises(DeliveryFailed) as failure:
                await sinks["webhook"].deliver(target, event(), "user")
            assert str(failure.value) == says


@pytest.mark.parametrize("broker", ["nats", "kafka"])
@pytest.mark.parametrize("listens", [True, False], ids=["silent", "absent"])
async def test_a_failure_of_a_broker_says_what_went_wrong(broker: str, listens: bool) -> None:
    """No name of a Python class and no address of the operator's is in the message."""
    pytest.importorskip("aiokafka")
    targets = {
        "nats": llm_pb2.NotifyTarget(nats=llm_pb2.NatsSubject(subject="jobs")),
        "kafka": llm_pb2.NotifyTarget(kafka=llm_pb2.KafkaTopic(topic="jobs")),
    }
    async with receiving() as server:
        address = f"127.0.0.1:{server.port if listens else 1}"
        settings = NotifierSettings(
            nats_url=SecretStr(f"nats://{address}"), kafka_servers=address, kafka_topics=("jobs",), **LOOPBACK
        )
        async with open_sinks(settings) as sinks:
            with pytest.raises(DeliveryFailed) as failure:
                await sinks[broker].deliver(targets[broker], event(), "user")
    says = str(failure.value)
    assert re.fullmatch(r"(NATS|Kafka) (cannot be reached|did not acknowledge the event within 1 s)", says)


@pytest.mark.parametrize(
    ("asked", "seconds"), [("0", 0), ("0060", 60), ("9" * 8, 43200), ("9" * 14, 43200), ("9" * 5000, 43200), ("-1", 0)]
)
async def test_retry_after_has_no_upper_bound(asked: str, seconds: int) -> None:
    """A wait beyond the longest interval of any schedule still counts as that one."""
    async with receiving() as receiver, open_sinks(NotifierSettings(**LOOPBACK)) as sinks:
        (target,) = webhook(receiver.on("/busy", status(429, retry_after=asked)))
        answer = await sinks["webhook"].deliver(target, event(), "user")
    assert min(answer.retry_after.total_seconds(), 43200) == seconds


async def test_a_slow_destination_delays_no_other() -> None:
    """One destination has a maximum of concurrent and of waiting deliveries. Further ones are deferred."""
    settings = NotifierSettings(max_per_destination=3, max_waiting_per_destination=2, **LOOPBACK)
    async with receiving() as slow, receiving() as good, open_sinks(settings) as sinks:
        dispatcher = Dispatcher(sinks, settings, METRICS)
        (slow_target,) = webhook(slow.on("/slow", hang))
        (good_target,) = webhook(good.on("/good", status(200)))
        begun = [
            asyncio.create_task(dispatcher.deliver(internal_pb2.NotifyRequest(target=slow_target), 10 * SHORT))
            for _ in range(20)
        ]
        await slow.received("/slow", 3)
        response = await dispatcher.deliver(internal_pb2.NotifyRequest(target=good_target), SHORT)
        assert response.state == llm_pb2.NOTIFY_STATE_DELIVERED
        assert sum(not task.done() for task in begun) == 5
        assert len(slow.so_far("/slow")) == 3
        responses = await asyncio.gather(*begun)
        assert {response.state for response in responses} == {llm_pb2.NOTIFY_STATE_PENDING}
        assert sum("under way already" in response.attempt.error.message for response in responses) == 15


async def test_a_users_slow_receivers_leave_room_for_others() -> None:
    """The limit of a user holds over any number of destinations."""
    settings = NotifierSettings(max_per_user=3, **LOOPBACK)
    async with AsyncExitStack() as opened:
        receivers = [await opened.enter_async_context(receiving()) for _ in range(5)]
        sinks = await opened.enter_async_context(open_sinks(settings))
        dispatcher = Dispatcher(sinks, settings, METRICS)
        targets = [target for receiver in receivers for target in webhook(receiver.on("/slow", hang))]
        responses = await asyncio.gather(
            *(dispatcher.deliver(internal_pb2.NotifyRequest(target=target, user_id="one"), SHORT) for target in targets)
        )
        assert sum("of the same user" in response.attempt.error.message for response in responses) == 2
        begun = [
            asyncio.create_task(dispatcher.deliver(internal_pb2.NotifyRequest(target=target, user_id="one"), 2 * SHORT))
            for target in targets[:3]
        ]
        await asyncio.gather(*(receiver.received("/slow", 2) for receiver in receivers[:3]))
        (good,) = webhook(receivers[4].on("/good", status(200)))
        response = await dispatcher.deliver(internal_pb2.NotifyRequest(target=good, user_id="another"), SHORT)
        assert response.state == llm_pb2.NOTIFY_STATE_DELIVERED
        await asyncio.gather(*begun)


async def test_a_tenants_invented_users_leave_room_for_others() -> None:
    """The limit of a tenant holds over any number of its users. A user of the same name in another one has its own."""
    settings = NotifierSettings(max_per_user=1, max_per_tenant=3, **LOOPBACK)
    async with receiving() as receiver, receiving() as other, open_sinks(settings) as sinks:
        dispatcher = Dispatcher(sinks, settings, METRICS)
        (slow,) = webhook(receiver.on("/slow", hang))
        (good,) = webhook(other.on("/good", status(200)))

        def deliver(target: llm_pb2.NotifyTarget, user: str, tenant: str) -> Awaitable[internal_pb2.NotifyResponse]:
            return dispatcher.deliver(internal_pb2.NotifyRequest(target=target, user_id=user), 10 * SHORT, tenant)

        begun = [asyncio.ensure_future(deliver(slow, f"user-{number}", "many")) for number in range(10)]
        await receiver.received("/slow", 3)
        for tenant in ("few", ""):
            assert (await deliver(good, "user-0", tenant)).state == llm_pb2.NOTIFY_STATE_DELIVERED
        assert sum(not task.done() for task in begun) == 3
        responses = await asyncio.gather(*begun)
        assert sum("of the same tenant are under way" in one.attempt.error.message for one in responses) == 7


async def test_names_that_nobody_answers_for_hold_up_no_other() -> None:
    """A DNS lookup uses up no limit that other users need, however many of one user's are open."""
    async with receiving() as receiver, name_server() as names:
        names.say("good.example.com", ["127.0.0.1"])
        many = [f"hangs-{number}.example.com" for number in range(200)]
        for name in many:
            names.say(name)
        changes = {"dns_servers": (names.address,), "webhook_timeout": 60 * SHORT}
        settings = NotifierSettings(**{**LOOPBACK, **changes})
        async with open_sinks(settings) as sinks:
            dispatcher = Dispatcher(sinks, settings, METRICS)
            begun = [
                asyncio.create_task(
                    dispatcher.deliver(internal_pb2.NotifyRequest(target=target, user_id="one"), 60 * SHORT), name=name
                )
                for name in many
                for target in webhook(f"http://{name}:{receiver.port}/")
            ]
            async with asyncio.timeout(60):
                while any(not names.asked[name, 4] for name in many):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            (good,) = webhook(receiver.on("/good", status(200)).replace("127.0.0.1", "good.example.com"))
            response = await dispatcher.deliver(internal_pb2.NotifyRequest(target=good, user_id="another"), SHORT)
            assert response.state == llm_pb2.NOTIFY_STATE_DELIVERED
            assert not any(task.done() for task in begun), "every lookup must still be open"
            for task in begun:
                task.cancel()
            await asyncio.gather(*begun, return_exceptions=True)


async def test_a_name_that_nobody_answers_for_ends_the_attempt() -> None:
    async with name_server() as names:
        names.say("hangs.example.com")
        settings = NotifierSettings(**{**LOOPBACK, "dns_servers": (names.address,), "webhook_timeout": SHORT})
        async with open_sinks(settings) as sinks:
            dispatcher = Dispatcher(sinks, settings, METRICS)
            (target,) = webhook("http://hangs.example.com:80/")
            response = await dispatcher.deliver(internal_pb2.NotifyRequest(target=target, user_id="one"), 60 * SHORT)
        assert response.state == llm_pb2.NOTIFY_STATE_PENDING
        assert "did not answer within 1 s" in response.attempt.error.message


async def test_jobs_that_name_no_target_go_to_the_users_endpoint_or_the_default() -> None:
    """The operator's endpoint may have any address. The response does not show its path, which is a secret."""
    async with receiving() as receiver:
        settings = NotifierSettings(
            default_webhook_url=SecretStr(f"{receiver.url}/default"),
            users={"mine": UserEndpoint(url=SecretStr(f"{receiver.url}/mine"))},
        )
        async with open_sinks(settings) as sinks:
            dispatcher = Dispatcher(sinks, settings, METRICS)
            for user, path in (("mine", "/mine"), ("other", "/default")):
                response = await dispatcher.deliver(internal_pb2.NotifyRequest(user_id=user), SHORT)
                assert response.target == receiver.url
                assert len(receiver.so_far(path)) == 1
        async with open_sinks(NotifierSettings(**LOOPBACK)) as sinks:
            response = await Dispatcher(
                sinks, settings.model_copy(update={"default_webhook_url": None}), METRICS
            ).deliver(internal_pb2.NotifyRequest(user_id="other"), SHORT)
            assert response.state == llm_pb2.NOTIFY_STATE_SKIPPED


async def test_a_tenant_has_endpoints_and_secrets_of_its_own() -> None:
    """A user of the same name in another tenant, or in none, has nothing of them."""
    secrets = {name: secret(name) for name in ("all", "mine", "acme", "acmes")}
    async with receiving() as receiver:

        def endpoint(name: str) -> UserEndpoint:
            return UserEndpoint(url=SecretStr(f"{receiver.url}/{name}"), secrets=(secrets[name],))

        of_tenant = {**dict(endpoint("acme")), "users": {"mine": endpoint("acmes")}}
        settings = NotifierSettings(
            default_webhook_url=SecretStr(f"{receiver.url}/all"),
            webhook_secrets=(secrets["all"],),
            users={"mine": endpoint("mine")},
            tenants={"acme": TenantEndpoint(**of_tenant), "bare": TenantEndpoint()},
            **LOOPBACK,
        )
        async with open_sinks(settings) as sinks:
            dispatcher = Dispatcher(sinks, settings, METRICS)
            for user, tenant, path in (
                ("mine", "", "mine"),
                ("mine", "acme", "acmes"),
                ("other", "acme", "acme"),
                ("mine", "bare", "all"),
                ("mine", "unknown", "all"),
            ):
                before = len(receiver.so_far(f"/{path}"))
                await dispatcher.deliver(internal_pb2.NotifyRequest(notification_id="1", user_id=user), SHORT, tenant)
                *_, received = receiver.so_far(f"/{path}")
                assert len(receiver.so_far(f"/{path}")) == before + 1
                Webhook(secrets[path].get_secret_value()).verify(received.body, received.headers)
            (own,) = webhook(receiver.on("/own", status(200)))
            request = internal_pb2.NotifyRequest(notification_id="1", target=own, user_id="mine")
            await dispatcher.deliver(request, SHORT, "acme")
            (received,) = receiver.so_far("/own")
            Webhook(secrets["acmes"].get_secret_value()).verify(received.body, received.headers)


async def test_webhooks_go_through_the_proxy() -> None:
    """All go through the proxy, which resolves names. Its own address needs no permission. URLs are still checked."""
    asked: list[str] = []

    async def forward(request: web.BaseRequest) -> web.Response:
        asked.append(str(request.url))
        return web.Response()

    runner = web.ServerRunner(web.Server(forward))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    proxy = SecretStr(f"http://127.0.0.1:{runner.addresses[0][1]}")
    settings = NotifierSettings(webhook_proxy=proxy, webhook_schemes=("http",), webhook_ports=(80,))
    async with open_sinks(settings) as sinks:
        (target,) = webhook("http://hooks.example.com/path?token=1")
        assert (await sinks["webhook"].deliver(target, event(), "user")).http_status == 200
        assert asked == ["http://hooks.example.com/path?token=1"]
        for url in (
            "http://127.0.0.1/",
            "http://0x7f.1/",
            "http://localhost/",
            "http://[::1]/",
            "https://example.com/",
        ):
            (target,) = webhook(url)
            with pytest.raises(DeliveryRefused):
                await sinks["webhook"].deliver(target, event(), "user")
    await runner.cleanup()
    assert len(asked) == 1


async def test_an_https_webhook_goes_through_a_tunnel_of_the_proxy() -> None:
    """The proxy gets only the server's name, neither path nor event. A proxy that opens no tunnel is a failure."""
    async with receiving() as proxy:
        proxy.on("hooks.example.com:443", status(503))
        async with open_sinks(NotifierSettings(webhook_proxy=SecretStr(proxy.url))) as sinks:
            (target,) = webhook("https://hooks.example.com/path?token=1")
            with pytest.raises(DeliveryFailed, match="the proxy for webhooks answered 503"):
                await sinks["webhook"].deliver(target, event(), "user")
        (request,) = proxy.so_far("hooks.example.com:443")
        assert request.body == b""
        assert not [name for name in request.headers if name.startswith("webhook-")]
