"""Addresses to which webhooks may not go, in every notation, and host names that resolve to them.

Job, gateway, notifier and Temporal are real. The notifier has default settings except for ports and name servers. A
listener on all addresses of this machine counts connections, and there must be none.
"""

import re
from collections.abc import AsyncIterator
from ipaddress import ip_address, ip_network
from typing import NamedTuple

import grpc
import pytest
from temporalio.client import Client

from deploy.local.stack import Stack
from jobs import names
from jobs.errors import DeliveryError, DeliveryRefused
from jobs.options import DEFAULTS
from jobs.rules import check_job
from llm_pb import internal_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from services.notifier.settings import NotifierSettings
from services.notifier.sinks.egress_policy import unrestricted, why_not_public
from services.notifier.sinks.webhook import WebhookSink
from tests.support.deliveries import settled, until
from tests.support.jobs import details_of, new_job, run_job, unpack, watch, webhook
from tests.support.name_servers import NameServer, name_server
from tests.support.receivers import Receiver, receiving
from tests.support.stacks import running

QUEUE = "notifications-strict"

PRIVATE = {
    # Loopback and this host, in every notation that some resolver accepts.
    "loopback": "http://127.0.0.1:{port}/",
    "loopback, other": "http://127.8.8.8:{port}/",
    "loopback by name": "http://localhost:{port}/",
    "loopback by name, absolute": "http://localhost.:{port}/",
    "loopback by name, in capitals": "http://LOCALHOST:{port}/",
    "loopback, short": "http://127.1:{port}/",
    "loopback, shorter": "http://127.0.1:{port}/",
    "loopback, octal": "http://0177.0.0.1:{port}/",
    "loopback, octal, long": "http://00000177.0.0.01:{port}/",
    "loopback, hexadecimal": "http://0x7f.0.0.1:{port}/",
    "loopback, hexadecimal, whole": "http://0x7f000001:{port}/",
    "loopback, hexadecimal, short": "http://0x7f.1:{port}/",
    "loopback, decimal": "http://2130706433:{port}/",
    "loopback, octal, whole": "http://017700000001:{port}/",
    "loopback, mixed": "http://0x7f.0.1:{port}/",
    "loopback, with a final dot": "http://127.0.0.1.:{port}/",
    "loopback in full-width digits": "http://１２７.０.０.１:{port}/",
    "loopback in circled digits": "http://①②⑦.⓪.⓪.①:{port}/",
    "loopback with an ideographic dot": "http://127。0。0。1:{port}/",
    "loopback, percent-encoded": "http://%31%32%37.0.0.1:{port}/",
    "localhost in full-width letters": "http://ｌｏｃａｌｈｏｓｔ:{port}/",
    "this host": "http://0.0.0.0:{port}/",
    "this host, short": "http://0:{port}/",
    "this network": "http://0.1.2.3:{port}/",
    "loopback of IPv6": "http://[::1]:{port}/",
    "loopback of IPv6, long": "http://[0:0:0:0:0:0:0:1]:{port}/",
    "loopback of IPv6, with zeros": "http://[0000:0000:0000:0000:0000:0000:0000:0001]:{port}/",
    "this host of IPv6": "http://[::]:{port}/",
    "loopback mapped": "http://[::ffff:127.0.0.1]:{port}/",
    "loopback mapped, hexadecimal": "http://[::ffff:7f00:1]:{port}/",
    "loopback mapped, long": "http://[0:0:0:0:0:ffff:127.0.0.1]:{port}/",
    "loopback, IPv4-compatible": "http://[::127.0.0.1]:{port}/",
    "loopback translated": "http://[::ffff:0:127.0.0.1]:{port}/",
    "loopback by NAT64": "http://[64:ff9b::127.0.0.1]:{port}/",
    "loopback by NAT64, hexadecimal": "http://[64:ff9b::7f00:1]:{port}/",
    "loopback by local NAT64": "http://[64:ff9b:1::7f00:1]:{port}/",
    "loopback by 6to4": "http://[2002:7f00:1::]:{port}/",
    "loopback by Teredo": "http://[2001:0:7f00:1::]:{port}/",
    "Teredo, client inverted": "http://[2001:0:4136:e378:8000:63bf:80ff:fffe]:{port}/",
    # Private networks.
    "private 10": "http://10.0.0.1:{port}/",
    "private 172.16": "http://172.16.0.1:{port}/",
    "private 172.31": "http://172.31.255.255:{port}/",
    "private 192.168": "http://192.168.0.1:{port}/",
    "private, decimal": "http://167772161:{port}/",
    "private mapped": "http://[::ffff:10.0.0.1]:{port}/",
    "carrier's": "http://100.64.0.1:{port}/",
    "unique local": "http://[fd00::1]:{port}/",
    "unique local, other": "http://[fc00::1]:{port}/",
    "site-local": "http://[fec0::1]:{port}/",
    "link-local": "http://169.254.1.1:{port}/",
    "link-local of IPv6": "http://[fe80::1]:{port}/",
    "link-local with a zone": "http://[fe80::1%25lo]:{port}/",
    "link-local with a zone, bare": "http://[fe80::1%lo]:{port}/",
    # Metadata services of clouds.
    "metadata": "http://169.254.169.254:{port}/latest/meta-data/",
    "metadata, decimal": "http://2852039166:{port}/",
    "metadata, hexadecimal": "http://0xa9fea9fe:{port}/",
    "metadata, octal": "http://0251.0376.0251.0376:{port}/",
    "metadata mapped": "http://[::ffff:169.254.169.254]:{port}/",
    "metadata by NAT64": "http://[64:ff9b::a9fe:a9fe]:{port}/",
    "metadata by 6to4": "http://[2002:a9fe:a9fe::1]:{port}/",
    "metadata, Amazon's of IPv6": "http://[fd00:ec2::254]:{port}/",
    "metadata, Alibaba's": "http://100.100.100.200:{port}/",
    "metadata, Azure's": "http://168.63.129.16:{port}/",
    "metadata, Oracle's": "http://192.0.0.192:{port}/",
    # Reserved and unassigned addresses.
    "multicast": "http://224.0.0.1:{port}/",
    "multicast, global": "http://233.252.0.1:{port}/",
    "multicast of IPv6": "http://[ff02::1]:{port}/",
    "multicast of IPv6, global": "http://[ff0e::1]:{port}/",
    "broadcast": "http://255.255.255.255:{port}/",
    "reserved": "http://240.0.0.1:{port}/",
    "documentation": "http://192.0.2.1:{port}/",
    "benchmarks": "http://198.18.0.1:{port}/",
    "6to4 relay": "http://192.88.99.1:{port}/",
    "documentation of IPv6": "http://[2001:db8::1]:{port}/",
    "discarded": "http://[100::1]:{port}/",
    "not given out": "http://[4000::1]:{port}/",
}
"""URLs of addresses that are not public, by the kind of address. {port} is the listener's port."""

MALFORMED = {
    "user": "http://user@127.0.0.1:{port}/",
    "user and password": "http://example.com:80@127.0.0.1:{port}/",
    "public name as user": "http://hooks.example.com@127.0.0.1:{port}/",
    "backslash": "http://hooks.example.com\\@127.0.0.1:{port}/",
    "space": "http://127.0.0.1 .example.com:{port}/",
    "line feed": "http://127.0.0.1\n:{port}/",
    "no host": "http://:{port}/",
    "scheme: file": "file:///etc/passwd",
    "scheme: gopher": "gopher://127.0.0.1:{port}/_x",
    "scheme: ftp": "ftp://127.0.0.1:{port}/",
    "no scheme": "//127.0.0.1:{port}/",
    "unclosed bracket": "http://[::1:{port}/",
    "port too high": "http://127.0.0.1:99999/",
    "port no number": "http://127.0.0.1:{port}x/",
    "port 0": "http://hooks.example.com:0/",
    "two ports": "http://hooks.example.com:80:80/",
    # Hosts that cannot exist. Without a check the notifier would look them up for days.
    "number over 32 bits": "http://4294967296:{port}/",
    "IPv4 number over 255": "http://999.1.1.1:{port}/",
    "IPv4 in three numbers": "http://1.2.3:{port}/",
    "IPv4 in five numbers": "http://1.2.3.4.5:{port}/",
    "IPv4 in octal": "http://08.08.08.08:{port}/",
    "IPv4 with a final dot": "http://1.1.1.1.:{port}/",
    "name that ends in a number": "http://hooks.example.99:{port}/",
    "name that ends in a hexadecimal number": "http://hooks.example.0x1f:{port}/",
    "name too long": f"http://{'a.' * 127}com:{{port}}/",
    "label too long": f"http://{'a' * 64}.example.com:{{port}}/",
    "label empty": "http://hooks..example.com:{port}/",
    "label empty at the front": "http://.example.com:{port}/",
    "two final dots": "http://example.com..:{port}/",
    "dot alone": "http://.:{port}/",
    "name with a comma": "http://hooks,example.com:{port}/",
    "IPv6 too long": "http://[2606:4700:0:0:0:0:0:0:1111]:{port}/",
    "IPv6 no number": "http://[2606:4700::hook]:{port}/",
    "IPv6 twice shortened": "http://[2606::4700::1111]:{port}/",
    "IPv6 with a zone": "http://[2606:4700::1111%25eth0]:{port}/",
    "IPv6 without brackets": "http://2606:4700::1111/",
    "IPv4 in brackets": "http://[1.1.1.1]:{port}/",
    "name in brackets": "http://[example.com]:{port}/",
}
"""URLs that every gateway refuses. A job that bypasses the gateway may still have them."""


NOBODY = "192.0.2.7"
"""Address that a setting of the strict notifier allows, as if it were public. It has no host."""


class Strict(NamedTuple):
    """A gateway whose notifier has strict settings."""

    stub: LlmServiceStub
    listener: Receiver
    name_server: NameServer


@pytest.fixture(scope="module")
async def strict(stack: Stack) -> AsyncIterator[Strict]:
    async with receiving(everywhere=True) as listener, name_server() as asked:
        notifier = stack.add(
            "notifier",
            {
                "NOTIFIER_TASK_QUEUE": QUEUE,
                "NOTIFIER_WEBHOOK_NETWORKS": f'["{NOBODY}/32"]',
                "NOTIFIER_WEBHOOK_PORTS": "[]",
                "NOTIFIER_DNS_SERVERS": f'["{asked.address}"]',
            },
        )
        gateway = stack.add("gateway", {"GATEWAY_NOTIFY_QUEUE": QUEUE})
        async with running(stack, notifier, gateway) as stub:
            yield Strict(stub, listener, asked)


def refusal(shown: llm_pb2.NotifyStatus) -> str:
    """Return the error message of a delivery that was finally refused."""
    assert shown.state == llm_pb2.NOTIFY_STATE_FAILED, shown
    assert unpack(shown.error)["ErrorInfo"].reason == "DELIVERY_REFUSED"
    return shown.error.message


def test_the_table_is_long_enough() -> None:
    assert len(PRIVATE) + len(MALFORMED) >= 60


@pytest.mark.parametrize("what", PRIVATE)
async def test_a_webhook_to_a_private_address_is_refused(strict: Strict, what: str) -> None:
    """The job's status has the reason, and the notifier connects to nothing."""
    url = PRIVATE[what].format(port=strict.listener.port)
    job = new_job(params={"max_tokens": 1}, notify=webhook(url))
    try:
        id_ = (await strict.stub.Submit(llm_pb2.SubmitRequest(job=job), timeout=20)).workflow_id
    except grpc.aio.AioRpcError as error:
        # The gateway itself refuses a malformed URL.
        (violation,) = details_of(error)["BadRequest"].field_violations
        assert violation.field == "job.notify[0].webhook.url"
    else:
        (shown,) = (await watch(strict.stub, id_)).final.status.notifications
        assert re.search(r"leads to an? .*address|no valid host|is not valid", refusal(shown))
    assert strict.listener.connections == 0


async def test_what_is_no_url_is_refused_by_the_gateway_and_the_notifier(strict: Strict, temporal: Client) -> None:
    """The gateway names the field. The notifier refuses the URL of a job that was started past the gateway."""
    urls = [url.format(port=strict.listener.port) for url in MALFORMED.values()]
    for url in urls:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await strict.stub.Submit(llm_pb2.SubmitRequest(job=new_job(notify=webhook(url))))
        assert {item.field for item in details_of(error.value)["BadRequest"].field_violations} == {
            "job.notify[0].webhook.url"
        }
    job = new_job(params={"max_tokens": 1}, notify=[target for url in urls for target in webhook(url)])
    options = internal_pb2.JobOptions()
    options.CopyFrom(DEFAULTS)
    options.notify_task_queue = QUEUE
    handle = await temporal.start_workflow(
        names.JOB_WORKFLOW_TYPE, job, id="hostile-by-hand", task_queue=names.WORKFLOW_QUEUE, memo={"options": options}
    )
    final = (await watch(strict.stub, handle.id)).final.status
    assert len(final.notifications) == len(urls)
    for shown in final.notifications:
        assert refusal(shown)
    assert strict.listener.connections == 0


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([["127.0.0.1"]], "a loopback address"),
        ([["::1"]], "a loopback address"),
        ([["::ffff:127.0.0.1"]], "an IPv4 address inside IPv6"),
        ([["169.254.169.254"]], "a link-local or metadata address"),
        ([[NOBODY], ["127.0.0.1"]], "a loopback address"),
        ([[NOBODY, "127.0.0.1"]], "a loopback address"),
    ],
    ids=["private", "IPv6", "mapped", "metadata", "public, then private", "both"],
)
async def test_a_job_says_why_its_webhooks_name_was_refused(
    strict: Strict, answers: list[list[str]], says: str
) -> None:
    """Status and delivery log have the reason, whichever addresses the name server returns. Nothing is connected to."""
    name = f"hooks-{len(strict.name_server.asked)}.example.com"
    strict.name_server.say(name, *answers)
    job = new_job(params={"max_tokens": 1}, notify=webhook(f"http://{name}:{strict.listener.port}/"))
    id_ = (await run_job(strict.stub, job)).final.status.workflow_id
    (entry,) = await until(strict.stub, id_, settled)
    reasons = [unpack(attempt.error)["ErrorInfo"].reason for attempt in entry.attempts]
    assert reasons == ["DELIVERY_FAILED"] * (len(answers) - 1) + ["DELIVERY_REFUSED"]
    look = await strict.stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))
    (shown,) = look.status.notifications
    assert refusal(shown) == f"the webhook leads to {says}; only public addresses are allowed"
    assert strict.listener.connections == 0


@pytest.mark.parametrize(
    "url",
    [
        "http://intranet/",
        "https://hooks.example.com./",
        "https://a_b.x--y.example.com:65535/?a=b#c",
        "https://1.example.com/",
        "https://0x1f.example/",
        f"https://{'a' * 63}.{'b' * 63}.{'c' * 63}.{'d' * 61}/",
        "https://1.1.1.1/",
        "https://[2606:4700:4700::1111]:443/",
        "https://[64:ff9b::1.1.1.1]/",
        "https://bücher.example/",
        "https://例え.テスト/",
        "https://例え。テスト/",
        "https://MÜNCHEN.example/",
        "https://faß.example/",
        "https://مثال.إختبار/",
        "https://xn--mnchen-3ya.example/",
        "https://☃.example/",
        "https://example.com:/",
    ],
)
def test_a_host_that_may_exist_is_taken(url: str) -> None:
    """A name that does not resolve now may resolve later."""
    job = new_job(notify=webhook(url))
    assert check_job(job) == []
    assert str(unrestricted().parse(url))


PUBLIC = "127.0.0.2"
"""Address that a setting allows, as if it were public. Nothing listens there."""


@pytest.mark.parametrize(
    "answers",
    [
        [["127.0.0.1"]],
        [[PUBLIC], ["127.0.0.1"]],
        [["127.0.0.1"], [PUBLIC]],
        [["127.0.0.1", PUBLIC]],
        [[PUBLIC, "127.0.0.1"]],
        [["::1", PUBLIC]],
        [["::ffff:127.0.0.1"]],
        [["169.254.169.254"]],
    ],
    ids=[
        "private",
        "public, then private",
        "private, then public",
        "both",
        "both, the public one first",
        "both, IPv6",
        "mapped",
        "metadata",
    ],
)
async def test_a_name_that_changes_its_address_gains_nothing(answers: list[list[str]]) -> None:
    """Every delivery resolves the name once, and connects to the addresses that it has checked."""
    event = {"id": "a", "type": "b"}
    async with receiving() as listener, name_server() as names_:
        names_.say("hooks.example.com", *answers)
        settings = NotifierSettings(
            webhook_schemes=("http",),
            webhook_ports=(),
            webhook_networks=(ip_network(f"{PUBLIC}/32"),),
            dns_servers=(names_.address,),
        )
        sink = WebhookSink(settings)
        (target,) = webhook(f"http://hooks.example.com:{listener.port}/")
        reasons = []
        for _ in range(3):
            with pytest.raises(DeliveryError) as error:
                await sink.deliver(target, event, "user")
            reasons.append(error.value)
        await sink.close()
        refused = [str(reason) for reason in reasons if isinstance(reason, DeliveryRefused)]
        assert refused
        assert all("leads to" in reason for reason in refused)
        asked = max(names_.asked.values())
        assert asked == 3, "each delivery must look the name up once, and use the answer that it checked"
        assert listener.connections == 0


@pytest.mark.parametrize("address", ["93.184.215.14", "1.1.1.1", "2606:4700:4700::1111", "64:ff9b::101:101"])
def test_a_public_address_is_allowed(address: str) -> None:
    assert why_not_public(ip_address(address)) == ""


async def test_the_operator_opens_a_network() -> None:
    """Other private networks stay closed."""
    async with receiving() as listener:
        networks = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
        settings = NotifierSettings(webhook_schemes=("http",), webhook_ports=(), webhook_networks=networks)
        sink = WebhookSink(settings)
        (target,) = webhook(f"http://localhost:{listener.port}/")
        assert (await sink.deliver(target, {"id": "a"}, "user")).http_status == 200
        (other,) = webhook(f"http://10.0.0.1:{listener.port}/")
        with pytest.raises(DeliveryRefused, match="private"):
            await sink.deliver(other, {"id": "a"}, "user")
        await sink.close()


@pytest.mark.parametrize(
    ("url", "says"), [("http://example.com/", "https://"), ("https://example.com:8443/", "port 8443")]
)
async def test_by_default_a_webhook_is_https_on_its_port(url: str, says: str) -> None:
    sink = WebhookSink(NotifierSettings())
    (target,) = webhook(url)
    with pytest.raises(DeliveryRefused, match=says):
        await sink.deliver(target, {"id": "a"}, "user")
    await sink.close()
