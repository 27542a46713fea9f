"""The contract of the cache of answers. Every implementation must keep it."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import nats
import pytest
from pydantic import SecretStr

from deploy.local.stack import Stack
from feed.answers import Answers, AnswerStore, CacheUnavailable, Entry
from feed.feed import FeedSettings
from feed.memory import MemoryAnswers
from feed.nats import NatsFeed
from feed.nats_answers import NatsAnswers
from llm_pb import internal_pb2
from tests.support.encryption import Keys
from tests.support.stacks import stack_settings
from tests.support.versions import until

HOUR = timedelta(hours=1)
MARKER = "a marked answer"


@pytest.fixture(scope="module")
async def broker(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    async with Stack(stack_settings(tmp_path_factory.mktemp("answers")), only=("nats",)) as stack:
        yield stack


def settings(broker: Stack, **changes: int) -> FeedSettings:
    return FeedSettings(url=SecretStr(f"nats://{broker.address('nats')}"), **changes)


@pytest.fixture
async def connection(broker: Stack) -> AsyncIterator[NatsFeed]:
    feed = NatsFeed(settings(broker))
    feed.start()
    await feed.wait_ready()
    yield feed
    await feed.close()


@pytest.fixture(params=["memory", "nats"])
async def store(request: pytest.FixtureRequest, broker: Stack, connection: NatsFeed) -> AnswerStore:
    if request.param == "memory":
        # Its time passes five times as fast.
        return MemoryAnswers(lambda: 5 * time.monotonic())
    return NatsAnswers(connection, settings(broker), claim_seconds=2)


async def test_the_last_answer_is_found(store: AnswerStore, request: pytest.FixtureRequest) -> None:
    key = request.node.name.replace("[", "-").rstrip("]")
    assert await store.find(key) == Entry(None, claimed=False, turn=0)
    await store.put(key, "llmjob-a-1", b"first", HOUR)
    await store.put(key, "llmjob-b-1", b"second", HOUR)
    assert await store.find(key) == Entry(b"second", claimed=False, turn=0)
    assert (await store.find(f"{key}-other")).data is None


async def test_one_of_many_gets_the_claim(store: AnswerStore, request: pytest.FixtureRequest) -> None:
    key = request.node.name.replace("[", "-").rstrip("]")
    turns = await asyncio.gather(*(store.claim(key, 0) for _ in range(20)))
    (turn,) = filter(None, turns)
    assert await store.find(key) == Entry(None, claimed=True, turn=turn)
    assert await store.claim(key, 0) is None
    renewed = await store.claim(key, turn)
    assert renewed
    await store.release(key, turn)
    assert (await store.find(key)).claimed, "an old turn has released it"
    await store.release(key, renewed)
    free = await store.find(key)
    assert not free.claimed
    assert await store.claim(key, free.turn)


async def test_claims_and_answers_end_by_themselves(store: AnswerStore, request: pytest.FixtureRequest) -> None:
    """Nothing else ends the claim of a worker that was killed."""
    key = request.node.name.replace("[", "-").rstrip("]")
    await store.put(key, "llmjob-a-1", b"short", timedelta(seconds=3))
    assert (await store.find(key)).data == b"short"
    assert await store.claim(key, 0)

    async def ended() -> bool:
        found = await store.find(key)
        return not found.claimed and found.data is None

    await until(ended)
    assert await store.claim(key, (await store.find(key)).turn)


async def test_a_jobs_answers_are_forgotten(store: AnswerStore, request: pytest.FixtureRequest) -> None:
    key = request.node.name.replace("[", "-").rstrip("]")
    for job in ("llmjob-a-1", "llmjob-b-1"):
        await store.put(f"{key}-{job}", job, b"of one", HOUR)
        await store.put(key, job, job.encode(), HOUR)
    assert await store.forget("llmjob-b-1")
    assert (await store.find(key)).data == b"llmjob-a-1"
    assert (await store.find(f"{key}-llmjob-b-1")).data is None
    assert await store.forget("llmjob-never-there")


async def test_what_is_old_makes_room(broker: Stack, connection: NatsFeed) -> None:
    chosen = settings(broker, cache_max_bytes=100_000).model_copy(
        update={"cache_stream": "SMALL", "cache_subject_prefix": "small"}
    )
    store = NatsAnswers(connection, chosen)
    for number in range(20):
        await store.put(f"k{number}", "llmjob-a-1", bytes(10_000), HOUR)
    assert [(await store.find(f"k{number}")).data is not None for number in (0, 5, 18, 19)] == [
        False,
        False,
        True,
        True,
    ]


async def test_nothing_is_readable_on_the_broker(broker: Stack, connection: NatsFeed, tmp_path: Path) -> None:
    """Neither the answer nor who asked for it, nor anything of another tenant; and nothing once the keys are gone."""
    keys = Keys(tmp_path)
    store = NatsAnswers(connection, settings(broker))
    answers = Answers(store, keys.encryption(), "acme")
    key = await answers.key(b"digest")
    answer = internal_pb2.CachedAnswer(pieces=[internal_pb2.CachedPiece(text=MARKER)])
    await answers.put(key, "llmjob--acme-a-1", answer, HOUR)
    assert (await answers.find(key))[0] == answer
    other = answers.of_tenant("other")
    assert await other.key(b"digest") != key
    assert (await other.find(key))[0] is None
    assert key != await Answers(store, None, "acme").key(b"digest")
    client = await nats.connect(f"nats://{broker.address('nats')}")
    stored = await client.jetstream().get_last_msg("LLM_CACHE", f"llm.cache.answer.{key}.*")
    await client.close()
    assert MARKER.encode() not in (stored.data or b"")
    assert "acme-a" not in stored.subject
    large = internal_pb2.CachedAnswer(pieces=[internal_pb2.CachedPiece(text="x" * 600_000)])
    await answers.put("large", "llmjob-a-1", large, HOUR)
    assert (await answers.find("large"))[0] is None


async def test_a_broker_that_is_away_is_known_at_once(broker: Stack) -> None:
    feed = NatsFeed(FeedSettings(url=SecretStr("nats://127.0.0.1:9")))
    feed.start()
    store = NatsAnswers(feed, settings(broker))
    async with asyncio.timeout(5):
        with pytest.raises(CacheUnavailable):
            await store.find("key")
        assert not await store.forget("llmjob-a-1")
    await feed.close()
