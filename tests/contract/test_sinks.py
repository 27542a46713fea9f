"""What every sink promises, tried on each with a real receiver; then what is each one's own."""

import asyncio
import json
from collections.abc import AsyncIterator
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
from services.notifier.settings import NotifierSettings, UserEndpoint
from services.notifier.sinks.registry import open_sinks
from services.notifier.sinks.sink import Sink
from tests.support.jobs import webhook
from tests.support.name_servers import name_server
from tests.support.peers import LOOPBACK, PEERS, SHORT, NatsPeer, Peer, WebhookPeer, kafka_peer, secret
from tests.support.receivers import hang, receiving, status
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
    else:
        async with kafka_peer() as kafka:
            yield kafka


@pytest.fixture
async def sink(peer: Peer) -> AsyncIterator[Sink]:
    async with open_sinks(peer.settings) as sinks:
        yield sinks[peer.kind]


def event(id_: str = "1") -> CloudEvent:
    return {"specversion": "1.0", "id": id_, "type": "t", "source": "/s", "subject": "llmjob-u-r", "data": {"é": "€"}}


async def test_an_event_arrives_whole(peer: Peer, sink: Sink) -> None:
    """As a CloudEvent in structured mode, and once."""
    answer = await sink.deliver(peer.target("whole"), event(), "user")
    assert answer.error is None
    (taken,) = await peer.taken("whole", 1)
    assert taken.event == event()
    assert taken.id == "1"
    assert taken.content_type == "application/cloudevents+json; charset=UTF-8"
    assert taken.key == ("llmjob-u-r" if peer.keyed else ""), "where there are keys, the job's id"


async def test_an_event_carries_its_trace_and_nothing_else_of_the_client(peer: Peer, sink: Sink) -> None:
    """The tracestate may say of a client's own systems what is not for third parties."""
    context = SpanContext(7, 8, is_remote=True, trace_flags=TraceFlags(1), trace_state=TraceState([("vendor", "own")]))
    with trace.use_span(trace.NonRecordingSpan(context)):
        assert (await sink.deliver(peer.target("traced"), event("9"), "user")).error is None
    (taken,) = await peer.taken("traced", 1)
    assert taken.headers["traceparent"] == f"00-{7:032x}-{8:016x}-01"
    assert "tracestate" not in taken.headers


async def test_a_repeat_is_the_same(peer: Peer, sink: Sink) -> None:
    """Byte for byte, id for id, so that it can be dropped; NATS does that by itself."""
    for _ in range(2):
        assert (await sink.deliver(peer.target("repeat"), event("7"), "user")).error is None
    assert (await sink.deliver(peer.target("repeat"), event("8"), "user")).error is None
    *taken, last = await peer.taken("repeat", 2 if peer.drops_repeats else 3)
    assert last.id == "8"
    assert {(item.id, json.dumps(item.event)) for item in taken} == {("7", json.dumps(event("7")))}


async def test_many_at_once_all_arrive(peer: Peer, sink: Sink) -> None:
    target = peer.target("many")
    ids = {f"many-{number}" for number in range(50)}
    await asyncio.gather(*(sink.deliver(target, event(id_), "user") for id_ in ids))
    assert {item.id for item in await peer.taken("many", 50)} == ids


async def test_silence_is_a_failure_and_passes(peer: Peer, sink: Sink) -> None:
    """Within the time that the settings give; the same sink delivers again when the receiver is back."""
    name = "silent"
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
    # What was sent into the silence may have come, too.
    assert "found" in {item.id for item in await peer.taken(name, 2)}


async def test_an_event_that_is_too_large_for_the_broker_is_refused(peer: Peer, sink: Sink) -> None:
    """For good, since it never gets smaller; the next one passes. HTTP knows no such limit."""
    large = {**event("large"), "data": "€" * 400_000}
    if not peer.bounded:
        assert (await sink.deliver(peer.target("large"), large, "user")).error is None
        return
    with pytest.raises(DeliveryRefused, match=r"the event of 12\d{5} bytes is larger than \w+ accepts"):
        await sink.deliver(peer.target("large"), large, "user")
    assert (await sink.deliver(peer.target("large"), event("small"), "user")).error is None
    assert [item.id for item in await peer.taken("large", 1)] == ["small"]


async def test_a_cancelled_delivery_leaves_the_sink_whole(peer: Peer, sink: Sink) -> None:
    """A notifier that stops, or an attempt whose time is over."""
    for _ in range(20):
        task = asyncio.create_task(sink.deliver(peer.target("cancelled"), event("cut"), "user"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    assert (await sink.deliver(peer.target("cancelled"), event("after"), "user")).error is None


async def test_what_the_operator_does_not_allow_is_refused(peer: Peer) -> None:
    """For good, and by a notifier that has no such sink, too."""
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


async def test_kafka_events_come_from_an_idempotent_producer() -> None:
    """What the broker keeps has the producer's number and a sequence without a gap, by which it drops repeats."""
    async with kafka_peer() as peer:
        async with open_sinks(peer.settings) as sinks:
            for number in range(3):
                await sinks["kafka"].deliver(peer.target("numbered"), event(str(number)), "user")
        batches = await peer.batches("numbered", 3)
    assert [batch.base_sequence for batch in batches] == [0, 1, 2]
    ((producer, epoch),) = {(batch.producer_id, batch.producer_epoch) for batch in batches}
    assert producer is not None
    assert producer >= 0
    assert epoch >= 0


def test_kafkas_own_word_on_a_size_is_understood() -> None:
    """MESSAGE_TOO_LARGE and RECORD_LIST_TOO_LARGE of the broker are the errors that the sink refuses for good."""
    errors = pytest.importorskip("aiokafka.errors")
    assert [errors.for_code(code) for code in (10, 18)] == [
        errors.MessageSizeTooLargeError,
        errors.RecordListTooLargeError,
    ]


@pytest.mark.parametrize("limit", ["server's", "server's, with headers", "stream's"])
async def test_nats_limits_are_kept(tmp_path_factory: pytest.TempPathFactory, limit: str) -> None:
    """Those of the server, headers included, and of the stream."""
    async with Stack(stack_settings(tmp_path_factory.mktemp("nats")), only=("nats",)) as stack:
        url = f"nats://{stack.address('nats')}"
        client = await nats.connect(url)
        most = 1000 if limit == "stream's" else -1
        await client.jetstream().add_stream(name="EVENTS", subjects=["llm.events.>"], max_msg_size=most)
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
    """Nobody keeps the event, so it does not count as taken."""
    async with Stack(stack_settings(tmp_path_factory.mktemp("nats")), only=("nats",)) as stack:
        settings = NotifierSettings(nats_url=SecretStr(f"nats://{stack.address('nats')}"), **LOOPBACK)
        target = llm_pb2.NotifyTarget(nats=llm_pb2.NatsSubject(subject="nowhere"))
        async with open_sinks(settings) as sinks:
            with pytest.raises(DeliveryFailed, match=r"no JetStream stream matches the subject llm\.events\.nowhere"):
                await sinks["nats"].deliver(target, event(), "user")


async def test_webhooks_are_signed_by_every_active_secret() -> None:
    """Of the user where there are some, else the operator's; what was changed on the way does not verify."""
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
    """Without being shown."""
    with pytest.raises(ValidationError, match="24 to 64 random bytes") as error:
        NotifierSettings(webhook_secrets=(SecretStr(bad),))
    assert bad not in str(error.value) or bad in ("secret", "whsec_")


async def test_a_slow_destination_delays_no_other() -> None:
    """At most so many at once go to one, a few wait, and more are put off: none of them holds up another's."""
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
    """However many destinations they are."""
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


async def test_names_that_nobody_answers_for_hold_up_no_other() -> None:
    """However many of one user's there are: looking a name up takes nothing that others need."""
    async with receiving() as receiver, name_server() as names:
        names.say("good.example.com", ["127.0.0.1"])
        many = [f"hangs-{number}.example.com" for number in range(200)]
        for name in many:
            names.say(name)
        changes = {"dns_servers": (names.address,), "webhook_timeout": 5 * SHORT}
        settings = NotifierSettings(**{**LOOPBACK, **changes})
        async with open_sinks(settings) as sinks:
            dispatcher = Dispatcher(sinks, settings, METRICS)
            begun = [
                asyncio.create_task(
                    dispatcher.deliver(internal_pb2.NotifyRequest(target=target, user_id="one"), 10 * SHORT), name=name
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
            assert not any(task.done() for task in begun), "all still ask"
            for response in await asyncio.gather(*begun):
                assert response.state == llm_pb2.NOTIFY_STATE_PENDING
                assert "did not answer within 5 s" in response.attempt.error.message


async def test_jobs_that_name_no_target_go_to_the_users_endpoint_or_the_default() -> None:
    """Wherever that is. The answer does not show its path, which is the operator's secret."""
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


async def test_webhooks_go_through_the_proxy() -> None:
    """And only there: it looks the name up, and its address needs no leave. What the URL itself says is checked."""
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
    """The proxy is told the server alone: neither path nor event. One that opens no tunnel is a failure."""
    async with receiving() as proxy:
        proxy.on("hooks.example.com:443", status(503))
        async with open_sinks(NotifierSettings(webhook_proxy=SecretStr(proxy.url))) as sinks:
            (target,) = webhook("https://hooks.example.com/path?token=1")
            with pytest.raises(DeliveryFailed, match="could not be reached"):
                await sinks["webhook"].deliver(target, event(), "user")
        (request,) = proxy.so_far("hooks.example.com:443")
        assert request.body == b""
        assert not [name for name in request.headers if name.startswith("webhook-")]
