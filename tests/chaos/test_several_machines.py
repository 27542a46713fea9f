"""Each process on a machine of its own, joined by links that are cut, lose packets, are slow, or forget connections.

What is promised holds all the same: an answered Submit is there, one that broke off is repeated by its request id and
starts nothing twice, every watcher holds the job's output byte for byte, and a cancel arrives. `make chaos` runs many
rounds, with links that stay cut for longer than every keepalive, and checks the times of docs/operate.md.
"""

import asyncio
import itertools
import json
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import grpc
import nats
import pytest

from deploy.local.probes import CHANNEL_OPTIONS
from durable_llm import AsyncClient, Output, errors
from feed.feed import FeedSettings
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.jobs import new_job
from tests.support.machines import Machines, machines
from tests.support.network import Delay, Link, NoNetwork, network
from tests.support.stacks import FAST

pytestmark = pytest.mark.long
ROUNDS = int(os.environ.get("CHAOS_LINK_ROUNDS", "0"))
"""Number of long rounds. `make test-long` runs one that is short."""
long = pytest.mark.skipif(not ROUNDS, reason="takes minutes: make chaos, or CHAOS_LINK_ROUNDS=1")
GATEWAYS = ("gateway1", "gateway2")
WORKERS = ("worker1", "worker2")
TOKENS = 700
SPEED = 60
PATIENCE = 150
"""Maximum time in seconds from the end of all faults to the end of all jobs."""
MODELS = FAST["gateway"]["GATEWAY_MODELS"]
QUICK = {
    "gateway": {
        **FAST["gateway"],
        "GATEWAY_HEARTBEAT_TIMEOUT": "PT3S",
        # Each break may cost one, and some cost two: Temporal gives jobs to the polls of a worker that is gone.
        "GATEWAY_RETRY_ATTEMPTS": "100",
        "GATEWAY_RETRY_INTERVAL": "PT1S",
        "GATEWAY_PING_INTERVAL": "PT1S",
    },
    "gpu-worker": {**FAST["gpu-worker"], "GPU_WORKER_ENGINE_OPTIONS": json.dumps({"tokens_per_second": SPEED})},
}
PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
"""What a call gets that broke off, and may be repeated."""
IMPATIENT = (("grpc.keepalive_time_ms", 2000), ("grpc.keepalive_timeout_ms", 2000))
"""Options of a client that gives a connection up after 4 s. By default it does so after 30 s."""


class Several(NamedTuple):
    machines: Machines
    near: str
    """Address of the first gateway. The second one comes next."""
    far: str
    """The same two gateways, the second one first, over a connection that takes 50 ms each way."""

    @property
    def links(self) -> dict[str, Link]:
        net = self.machines.network
        return {"client": net.client, **{name: host.link for name, host in net.hosts.items()}}

    def client(self, address: str, options: tuple[tuple[str, int], ...] = ()) -> AsyncClient:
        return AsyncClient(address, options=(*CHANNEL_OPTIONS, *options))

    def stubs(self, stack: AsyncExitStack) -> list[LlmServiceStub]:
        """Return a stub of each gateway."""
        found = []
        for name in GATEWAYS:
            channel = grpc.aio.insecure_channel(self.machines.address(name, "gateway"), (*CHANNEL_OPTIONS, *IMPATIENT))
            stack.push_async_callback(channel.close)
            found.append(LlmServiceStub(channel))
        return found


@asynccontextmanager
async def running(folder: Path, environment: Mapping[str, Mapping[str, str]]) -> AsyncIterator[Several]:
    """Start Temporal, NATS, two gateways and two workers, each on a host of its own."""
    async with AsyncExitStack() as stack:
        try:
            net = await stack.enter_async_context(network())
        except NoNetwork as reason:
            pytest.skip(str(reason))
        made = await stack.enter_async_context(machines(net, folder, environment))
        for kind in ("temporal", "nats"):
            await made.add(kind)
        await made.start()
        for kind, names in (("gateway", GATEWAYS), ("gpu-worker", WORKERS)):
            for name in names:
                await made.add(kind, name)
        await made.start()
        first, second = (made.address(name, "gateway") for name in GATEWAYS)
        delay = Delay(second, 0.05)
        delayed = await delay.start("127.0.0.1")
        stack.push_async_callback(delay.close)
        yield Several(made, f"ipv4:{first},{second}", f"ipv4:{delayed},{first}")


@pytest.fixture(scope="module")
async def several(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Several]:
    async with running(tmp_path_factory.mktemp("machines"), QUICK) as found:
        yield found


async def eventually(condition: Callable[..., Awaitable[bool]], *arguments: object) -> None:
    """Return once the condition holds."""
    while not await condition(*arguments):  # noqa: ASYNC110  # it asks other processes
        await asyncio.sleep(0.2)


class Round:
    """Jobs of one user that run while links break, and what their clients have seen."""

    def __init__(self, several: Several, number: int, tokens: int) -> None:
        self._several = several
        self._user = f"links-{number}"
        self._tokens = tokens
        self._params = {"temperature": 0.0, "max_tokens": tokens, "min_tokens": tokens}
        self._requests = 0
        self.answered: set[str] = set()
        self.broken = 0
        """Number of calls that broke off."""
        self.healed = asyncio.Event()

    def job(self, **changes: object) -> llm_pb2.JobRequest:
        self._requests += 1
        values = {"user_id": self._user, "request_id": f"request-{self._requests}", "params": self._params, **changes}
        return new_job("Return the same.", **values)

    async def watched(self, client: AsyncClient) -> tuple[str, llm_pb2.JobResult]:
        """Run a job and return what its watcher read, and its result."""
        job = await client.submit(self.job())
        self.answered.add(job.workflow_id)
        output = Output()
        async for piece in job.stream():
            # Not even where an attempt could not read the log and started over: the text is the same.
            assert not piece.rewind
            output.add(piece)
        return output.text, await job.result()

    async def submit_all_the_time(self, stubs: list[LlmServiceStub]) -> None:
        """Submit small jobs with a short deadline. Repeat one that broke off at the other gateway, as it is."""
        while not self.healed.is_set():
            request = llm_pb2.SubmitRequest(job=self.job(params={"max_tokens": 5}))
            ids: set[str] = set()
            while not ids:
                try:
                    ids.add((await stubs[0].Submit(request, timeout=3)).workflow_id)
                except grpc.aio.AioRpcError as error:
                    if error.code() not in PASSING:
                        raise
                    self.broken += 1
                    stubs.reverse()
                    await asyncio.sleep(0.2)
            self.answered |= ids
            await asyncio.sleep(0.5)

    async def cancelled(self, client: AsyncClient) -> None:
        """Cancel a job while links break. It must not end by itself."""
        job = await client.submit(self.job(params={**self._params, "max_tokens": 8000, "min_tokens": 8000}))
        self.answered.add(job.workflow_id)
        async for _ in job.stream():
            break
        await job.cancel()
        with pytest.raises(errors.Cancelled):
            await job.result()

    async def check(self, client: AsyncClient) -> None:
        """Check that all jobs that were accepted are there, once each, and have ended."""
        assert len(self.answered) == self._requests
        for id_ in self.answered:
            assert (await client.job(id_).get()).status.workflow_id == id_
        await eventually(self.listed, client)

    async def listed(self, client: AsyncClient) -> bool:
        """Return whether `List` shows the jobs that were accepted, and no others."""
        return {job.status.workflow_id async for job in client.list(user_id=self._user)} == self.answered

    async def run(self, break_links: asyncio.Task[None], options: tuple[tuple[str, int], ...] = ()) -> None:
        """Run jobs with one prompt, hence one text, until the links are whole again and the jobs have ended."""
        several = self._several
        async with (
            several.client(several.near, options) as near,
            several.client(several.far, options) as far,
            AsyncExitStack() as stack,
            asyncio.TaskGroup() as tasks,
        ):
            watching = [tasks.create_task(self.watched(client)) for client in (near, far, near, far)]
            tasks.create_task(self.submit_all_the_time(several.stubs(stack)))
            tasks.create_task(self.cancelled(near))
            await break_links
            for link in several.links.values():
                await link.heal()
            self.healed.set()
            async with asyncio.timeout(PATIENCE):
                seen = await asyncio.gather(*watching)
                for text, result in seen:
                    assert text == result.output == seen[0][0]
                    assert result.metadata.output_tokens == self._tokens
            # A busy machine takes a while to describe the hundred jobs.
            async with asyncio.timeout(PATIENCE):
                await self.check(near)


async def test_nothing_is_lost_or_doubled_while_links_break(several: Several) -> None:
    """One link after the other, in the short round. At chance and for longer, in the long ones."""
    links = several.links

    async def one_after_the_other() -> None:
        await asyncio.sleep(1)
        await links["nats"].drop(0.1)
        await links["worker1"].cut()
        await asyncio.sleep(4)
        await links["worker1"].heal()
        await links["temporal"].cut()
        await asyncio.sleep(2)
        await links["temporal"].heal()
        await links["gateway2"].limit("256kbit")
        await links["gateway1"].strand()
        await links["nats"].heal()
        await asyncio.sleep(3)
        await links["client"].cut()
        await asyncio.sleep(2)
        await links["client"].heal()

    round_ = Round(several, 0, TOKENS)
    await round_.run(asyncio.create_task(one_after_the_other()), IMPATIENT)
    assert round_.broken, "no call has broken off"


@long
@pytest.mark.timeout(300 + 400 * ROUNDS)
async def test_nothing_is_lost_or_doubled_in_many_rounds(several: Several) -> None:
    for number in range(1, ROUNDS + 1):
        breaking = asyncio.create_task(break_at_chance(several.links, number))
        await Round(several, number, 5000).run(breaking)


async def break_at_chance(links: dict[str, Link], number: int) -> None:
    """Break links for a while, some for longer than every keepalive, and several at the same time."""
    chance = random.Random(number)
    until = time.monotonic() + 90
    while time.monotonic() < until:
        name = chance.choice([*links])
        link = links[name]
        how = chance.choice(("cut", "cut", "strand", "drop", "limit"))
        seconds = chance.choice((1, 3, 8, 25, 60))
        print(f"round {number}: {how} {name}, {seconds} s")  # noqa: T201  # what a failure needs
        if how == "drop":
            await link.drop(chance.uniform(0.05, 0.4))
        elif how == "limit":
            await link.limit(chance.choice(("64kbit", "256kbit")))
        else:
            await (link.cut() if how == "cut" else link.strand())
        await asyncio.sleep(seconds / chance.choice((1, 2)))
        if chance.random() < 0.7:
            await link.heal()


DEFAULTS = {
    "gateway": {"GATEWAY_MODELS": MODELS, "GATEWAY_RETRY_INTERVAL": "PT1S"},
    "gpu-worker": {"GPU_WORKER_ENGINE_OPTIONS": json.dumps({"tokens_per_second": 20})},
}


@pytest.fixture(scope="module")
async def patient(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Several]:
    """All timeouts are those that the documentation names."""
    async with running(tmp_path_factory.mktemp("patient"), DEFAULTS) as found:
        yield found


@long
@pytest.mark.parametrize(
    ("name", "text", "submit"),
    [("client", 31, 31), ("gateway1", 31, 31), ("nats", 18, 5), ("temporal", 5, 26), ("worker", 18, 5)],
    ids=lambda value: str(value),
)
async def test_forgotten_connections_are_given_up_in_time(
    patient: Several, name: str, text: float, submit: float
) -> None:
    """As docs/operate.md says: how many seconds a watcher gets no text, and how long a Submit takes."""
    params = {"max_tokens": 1600, "min_tokens": 1600}
    async with patient.client(patient.near) as client, asyncio.timeout(200):
        job = await client.submit(new_job(params=params))
        came: list[float] = []

        async def watch() -> None:
            async for _ in job.stream():
                came.append(time.monotonic())

        watching = asyncio.create_task(watch())

        async def runs() -> bool:
            return len(came) >= 20 and bool((await job.get()).status.progress.worker)

        async def is_over() -> bool:
            return came[-1] > cut + 21

        await eventually(runs)
        if name == "worker":
            pid = (await job.get()).status.progress.worker.rpartition("-")[2]
            (name,) = (host for host in WORKERS if str(patient.machines.processes[host].pid) == pid)
        await patient.links[name].strand()
        cut = time.monotonic()
        other = await client.submit(new_job(params={"max_tokens": 5}))
        accepted = time.monotonic() - cut
        await eventually(is_over)
        gap = max(later - one for one, later in itertools.pairwise(came))
        print(f"{name}: text after {gap:.1f} s, Submit after {accepted:.1f} s")  # noqa: T201  # what the docs say
        assert gap < text
        assert accepted < submit
        assert (await job.get()).status.attempt == 1
        # Temporal gives no job any more to a poll that was left behind on a connection that is gone.
        async with asyncio.timeout(20):
            more = [await client.submit(new_job(params={"max_tokens": 5})) for _ in range(8)]
            for one in more:
                await one.result()
        await patient.links[name].heal()
        await job.cancel()
        with pytest.raises(errors.Cancelled):
            await watching
        await other.result()


BROKERS = ("nats1", "nats2", "nats3")


@long
async def test_a_cluster_of_brokers_loses_the_machine_that_leads(tmp_path: Path) -> None:
    """Its link is cut, so nothing tells its clients. The text is live again before the job ends, and stays exact."""
    async with AsyncExitStack() as stack, asyncio.timeout(280):
        try:
            net = await stack.enter_async_context(network())
        except NoNetwork as reason:
            pytest.skip(str(reason))
        made = await stack.enter_async_context(machines(net, tmp_path, QUICK))
        hosts = [await net.host(name) for name in BROKERS]
        routes = ",".join(f"nats-route://{host.address}:6222" for host in hosts)
        for host in hosts:
            own = f"nats://{host.address}:6222"
            cluster = ("-n", host.name, "--cluster_name", "feed", "--cluster", own, "--routes", routes)
            await made.add("nats", host.name, words=cluster)
        await made.add("temporal")
        await made.start()
        urls = [f"nats://{host.address}:4222" for host in hosts]
        feed = {"FEED_URL": ",".join(urls), "FEED_REPLICAS": "3"}
        await made.add("gateway", environment=feed)
        await made.add("gpu-worker", environment=feed)
        await made.start()
        address = made.address("gateway", "gateway")
        client = await stack.enter_async_context(AsyncClient(address, options=CHANNEL_OPTIONS))
        tokens = 60 * SPEED
        job = await client.submit(new_job(params={"max_tokens": tokens, "min_tokens": tokens}))
        output, came = Output(), [time.monotonic()]

        async def watch() -> None:
            async for piece in job.stream():
                assert not piece.rewind
                output.add(piece)
                came.append(time.monotonic())

        watching = asyncio.create_task(watch())

        async def runs() -> bool:
            return len(came) > 20

        await eventually(runs)
        cut = time.monotonic()
        leader = await leader_of(urls)
        await net.hosts[leader].link.cut()
        await watching
        assert output.text == (await job.result()).output
        gap = max(later - one for one, later in itertools.pairwise(came))
        live = [at for at in came if at > cut + gap]
        print(f"{leader}: text after {gap:.1f} s")  # noqa: T201  # what the docs say
        assert gap < 30
        assert len(live) > 10, "the text was not live again"


async def leader_of(urls: list[str]) -> str:
    """Return the name of the server that leads the feed's stream, once both others hold all of it."""
    connection = await nats.connect(urls)
    try:
        while True:
            cluster = (await connection.jetstream().stream_info(FeedSettings().stream)).cluster
            if cluster and cluster.leader and sum(bool(peer.current) for peer in cluster.replicas or ()) == 2:
                return str(cluster.leader)
            await asyncio.sleep(0.2)
    finally:
        await connection.close()
