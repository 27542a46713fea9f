"""How targets of deliveries are shown. A webhook's path is a secret at Slack, Discord, Teams and many others."""

import asyncio
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from temporalio.client import Client

from deploy.local.stack import Stack
from jobs.ids import delivery_workflow_id
from jobs.targets import describe, origin
from llm_pb import internal_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from services.notifier.event import to_event
from tests.support.deliveries import settled, until
from tests.support.jobs import new_job, run_job, webhook
from tests.support.receivers import receiving, status


def shown(url: str) -> str:
    (target,) = webhook(url)
    return describe(target)


def test_a_webhook_is_shown_by_its_server_and_a_hash() -> None:
    assert shown("https://hooks.slack.com/services/T0/B0/x7") == "https://hooks.slack.com#e42775ac"
    assert shown("https://hooks.slack.com:8443/") == "https://hooks.slack.com:8443#abd7cb66"
    assert shown("https://[2001:db8::1]/x").startswith("https://[2001:db8::1]#")
    assert describe(llm_pb2.NotifyTarget()) == ""
    assert describe(llm_pb2.NotifyTarget(nats=llm_pb2.NatsSubject(subject="a.b"))) == "nats:a.b"
    assert describe(llm_pb2.NotifyTarget(kafka=llm_pb2.KafkaTopic(topic="a"))) == "kafka:a"
    assert describe(llm_pb2.NotifyTarget(postgres=llm_pb2.PostgresTable(table="a"))) == "postgres:a"


@pytest.mark.parametrize("url", ["", "no url", "http://[", "https://", "/path-secret"])
def test_what_is_no_url_is_not_shown(url: str) -> None:
    """A job that was started past the gateway may have such a URL."""
    assert shown(url) == origin(url) == ""


_secret = st.text(string.ascii_letters + string.digits, min_size=12)


@given(one=st.tuples(_secret, _secret, _secret), other=st.tuples(_secret, _secret, _secret))
def test_no_secret_of_a_url_is_shown_and_two_urls_are_told_apart(
    one: tuple[str, str, str], other: tuple[str, str, str]
) -> None:
    """Neither user, path, query nor fragment is shown."""
    texts = [shown("https://user:{0}@example.com/{0}?{1}#{2}".format(*parts)) for parts in (one, other)]
    assert not [part for part in one if part in texts[0]]
    assert (texts[0] == texts[1]) == (one == other)


async def test_the_path_of_a_webhook_is_not_shown(stack: Stack, stub: LlmServiceStub, temporal: Client) -> None:
    """It is in no status, delivery log or process log, and in no summary of a history's events."""
    async with receiving() as receiver:
        url = receiver.on("/services/T0PSECRET", status(503), status(503), status(410), status(200))
        target = shown(url)
        assert target.startswith(f"{receiver.url}#")
        options = llm_pb2.NotifyOptions(events=[llm_pb2.NOTIFY_EVENT_STARTED, llm_pb2.NOTIFY_EVENT_FINISHED])
        job = new_job(params={"max_tokens": 300}, notify=webhook(url), notify_options=options)
        final = (await run_job(stub, job)).final
        id_ = final.status.workflow_id
        log = await until(stub, id_, settled)
        again = await stub.Redeliver(llm_pb2.RedeliverRequest(workflow_id=id_))
        look = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))
        await until(stub, id_, lambda log: settled(log) and log[0].attempts[-1].http_status == 200)
    assert {item.target for item in (*final.status.notifications, *look.status.notifications)} == {target}
    assert {item.target for item in (*log, *again.deliveries)} == {target}
    assert "T0PSECRET" not in f"{final}{look}{log}{again}"
    for workflow in (id_, delivery_workflow_id(id_)):
        handle = temporal.get_workflow_handle(workflow)
        assert "T0PSECRET" not in str(await (await handle.describe()).memo())
        beside = [event.user_metadata for event in (await handle.fetch_history()).events]
        assert any(target in str(item) for item in beside), "the activity's summary must have the target"
        assert "T0PSECRET" not in str(beside)
    logs = {path.name: await asyncio.to_thread(path.read_text) for path in (stack.state_dir / "logs").iterdir()}
    assert any(target in text for name, text in logs.items() if name.startswith("notifier"))
    assert not [name for name, text in logs.items() if "T0PSECRET" in text]


def test_the_link_to_a_job_can_hold_any_id() -> None:
    """The id is percent-encoded, because it may be in a path or in a query."""
    request = internal_pb2.NotifyRequest(status=llm_pb2.JobStatus(workflow_id="p/a+b,c"))
    event = to_event(request, "source", "https://llm.example.com/jobs?id={workflow_id}")
    assert event["data"]["links"] == {"job": "https://llm.example.com/jobs?id=p%2Fa%2Bb%2Cc"}
