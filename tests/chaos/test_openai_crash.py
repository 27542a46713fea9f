"""A process of the stack dies while OpenAI's unmodified client streams a response, and the client holds the exact text.

There is one process of each kind, so each round takes a part of the service away from everybody. `make chaos` runs
30 rounds. CHAOS_SEED chooses the victims and the moments; the name of a test shows it with the victim.
"""

import asyncio
import os
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import grpc
import httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response

from deploy.local.stack import Stack
from jobs.response_ids import workflow_id_of
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.stack.test_openai import MODEL, openai_client
from tests.support.receivers import Receiver
from tests.support.stacks import FAST, SOON_LOST, stack_settings

VICTIMS: Final = ("gateway", "gpu-worker", "http", "nats", "notifier", "temporal")
SEED: Final = int(os.environ.get("CHAOS_SEED", "0"))
ROUNDS: Final = int(os.environ.get("CHAOS_ROUNDS", str(len(VICTIMS))))
REWINDS: Final = ROUNDS if "CHAOS_ROUNDS" in os.environ else 2
TOKENS: Final = 300
PATIENCE: Final = 200
FINAL: Final = ("response.completed", "response.incomplete", "response.failed")


def rounds(count: int, *victims: str) -> pytest.MarkDecorator:
    """Return the parameters of the rounds. The seed gives the order; each victim comes once before one comes again."""
    chance, order = random.Random(f"{SEED} {victims}"), list[str]()
    while len(order) < count:
        order += chance.sample(victims, len(victims))
    return pytest.mark.parametrize(
        ("victim", "chance"),
        [
            pytest.param(victim, random.Random(f"{SEED} {number} {victim}"), id=f"seed{SEED}-{number}-{victim}")
            for number, victim in enumerate(order[:count])
        ],
    )


class Crashing(NamedTuple):
    stack: Stack
    client: AsyncOpenAI
    stub: LlmServiceStub
    receiver: Receiver

    async def crash(self, *names: str) -> None:
        """Kill processes with SIGKILL, all before the first is started again."""
        for name in names:
            await self.stack.processes[name].kill()
        for name in names:
            await self.stack.processes[name].start()

    async def whole_again(self, *names: str) -> None:
        for name in names:
            await self.stack.processes[name].wait_ready()

    async def stream(self, prompt: str) -> Any:
        return await self.client.responses.create(
            model=MODEL, input=prompt, background=True, stream=True, max_output_tokens=TOKENS
        )

    async def resume(self, reader: "Reader") -> Any:
        return await self.client.responses.retrieve(reader.id, stream=True, starting_after=reader.last)


@pytest.fixture(scope="module")
async def crashing(receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Crashing]:
    environment = {
        **FAST,
        "gateway": {
            **FAST["gateway"],
            **SOON_LOST,
            "GATEWAY_NOTIFY_MAX_DURATION": "PT10M",
            "GATEWAY_NOTIFY_MAX_INTERVAL": "PT1S",
        },
        "notifier": {**FAST["notifier"], "NOTIFIER_DEFAULT_WEBHOOK_URL": f"{receiver.url}/openai-crash"},
    }
    settings = stack_settings(tmp_path_factory.mktemp("openai-crash"))
    async with (
        Stack(settings, only=VICTIMS, environment=environment) as stack,
        # The client repeats what a dead or starting process has refused, after a wait of its own.
        openai_client(stack.address("http"), max_retries=30) as client,
        grpc.aio.insecure_channel(stack.address("gateway")) as channel,
    ):
        yield Crashing(stack, client, LlmServiceStub(channel), receiver)


@dataclass
class Reader:
    """What a client holds of a response, and the place where it continues."""

    id: str = ""
    text: str = ""
    last: int = -1
    ended: Response | None = None
    replaced: Any = None
    """The event that says that the text is no longer the response's."""
    events: list[str] = field(default_factory=list)
    """The types of the events, and "broken" where a stream broke."""

    @property
    def size(self) -> int:
        return len(self.text.encode())

    async def read(self, stream: Any, until: int | None = None) -> bool:
        """Read a stream, until the text has a size. Return False when the stream ended or broke before."""
        async with stream:
            try:
                async for event in stream:
                    self._take(event)
                    if until is not None and self.size >= until:
                        return True
            except (httpx.HTTPError, openai.APIError):
                self.events.append("broken")
        return False

    def _take(self, event: Any) -> None:
        self.events.append(event.type)
        if event.type == "error":
            if event.code == "output_replaced":
                self.replaced = event
            return
        assert event.sequence_number > self.last
        self.last = event.sequence_number
        if event.type == "response.created":
            self.id = event.response.id
        if event.type == "response.output_text.delta":
            self.text += event.delta
        if event.type in FINAL:
            self.ended = event.response


async def read_through(crashing: Crashing, prompt: str, size: int, *victims: str) -> Reader:
    """Stream a response whose processes die when the client holds `size` bytes, and resume it until it ends.

    The last event is either the response's end or the one that says that its output was replaced.
    """
    reader = Reader()
    reached = await reader.read(await crashing.stream(prompt), size)
    # On a busy machine an attempt may be given up before anything dies, which replaces the output of `[[vary]]`.
    assert reached or reader.replaced, reader.events
    await crashing.crash(*victims)
    async with asyncio.timeout(PATIENCE):
        while not (reader.ended or reader.replaced):
            await reader.read(await crashing.resume(reader))
    await crashing.whole_again(*victims)
    return reader


async def retrieved(crashing: Crashing, id_: str) -> Response:
    """Retrieve a response until it has ended."""
    async with asyncio.timeout(PATIENCE):
        while (response := await crashing.client.responses.retrieve(id_)).status in ("queued", "in_progress"):  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    return response


async def result_of(crashing: Crashing, id_: str) -> llm_pb2.JobResult:
    """Return the job's result, as the gateway tells it."""
    request = llm_pb2.GetStatusRequest(workflow_id=workflow_id_of(id_))
    return (await crashing.stub.GetStatus(request, wait_for_ready=True)).result


@rounds(ROUNDS, *VICTIMS)
async def test_a_stream_goes_on_whichever_process_dies(crashing: Crashing, victim: str, chance: random.Random) -> None:
    """The text is that of the same job undisturbed, and its outcome arrives at the webhook."""
    prompt = f"Go on, {victim} {chance.random()}."
    undisturbed = Reader()
    await undisturbed.read(await crashing.stream(prompt))
    assert undisturbed.ended is not None
    size = chance.randrange(undisturbed.size // 2)
    reader = await read_through(crashing, prompt, size, victim)
    assert reader.ended is not None, reader.events
    assert reader.text == undisturbed.text
    assert reader.ended.output_text == reader.text
    result = await result_of(crashing, reader.id)
    assert result.output == reader.text
    assert result.metadata.rewinds == 0
    assert victim != "gpu-worker" or result.metadata.attempts > 1
    await delivered(crashing, reader.id)


async def delivered(crashing: Crashing, id_: str) -> None:
    """Return once the receiver has the outcome of a response."""
    async with asyncio.timeout(PATIENCE):
        requests = crashing.receiver.so_far("/openai-crash")
        while workflow_id_of(id_) not in {request.event["subject"] for request in requests}:
            requests = await crashing.receiver.received("/openai-crash", len(requests) + 1)


@rounds(REWINDS, "http", "gateway")
async def test_a_rewind_ends_the_stream_with_an_error_that_says_to_retrieve(
    crashing: Crashing, victim: str, chance: random.Random
) -> None:
    """The next attempt of a killed worker generates another text, while the way to the reader is dead, too."""
    prompt = f"[[vary]] Go on, {victim} {chance.random()}."
    for number in range(3):
        reader = await read_through(crashing, f"{prompt} {number}", chance.randrange(100, 500), "gpu-worker", victim)
        if reader.replaced is not None:
            break
        # On a busy machine a client can be so late that the job has ended when it holds that much.
        result = await result_of(crashing, reader.id)
        assert (result.output, result.metadata.attempts) == (reader.text, 1)
    assert reader.replaced is not None, reader.events
    assert "retrieve the response" in reader.replaced.message
    response = await retrieved(crashing, reader.id)
    result = await result_of(crashing, reader.id)
    assert response.status == "incomplete", "max_output_tokens"
    assert response.output_text == result.output
    assert not response.output_text.startswith(reader.text)
    assert result.metadata.rewinds >= 1
    again = Reader()
    await again.read(await crashing.client.responses.retrieve(reader.id, stream=True))
    assert again.text == result.output
