"""What encryption at rest costs: a job; microseconds for a payload there and back, and for a record of the feed; bytes.

A payload is a JobResult whose output is an English text. The suite encrypts it by its codec, with the keys in memory;
its peer is the same converter without the codec. A record of the feed is that of one token, written and read; its peer
is the record without encryption. The limit: AES-256-GCM of the same bytes and nothing else, there and back.

Jobs of 100 tokens run on two stacks that take turns, one of which encrypts: jobs a second and processor time a job.

    python -m bench.encryption_cost
"""

import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from temporalio.converter import DataConverter

from bench.payload_cost import RESULT, text_of
from bench.support import script
from bench.support.report import Report
from bench.support.stacks import new_stack, simulated
from bench.support.usage import cpu_of
from bench.support.watched_job import finish, submit, together
from deploy.local.stack import Stack
from encryption import DataKeys, Encryption
from encryption.key_store import KeyStore
from encryption.keyring import Keyring
from feed.encrypted import EncryptedFeed
from feed.feed import Feed, RecordHandler, ignore
from feed.memory import MemoryFeed
from llm_pb import internal_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from payload_converter import data_converter
from payload_converter.encryption import encrypting

Way = Callable[[], Awaitable[Any]]


@dataclass(frozen=True)
class Sizes:
    """What the command line chooses."""

    rounds: int = 7
    bytes: tuple[int, ...] = (1_000, 100_000, 1_000_000)
    seconds: float = 0.3
    jobs: int = 200
    at_once: int = 50


_RECORD: Final = internal_pb2.FeedRecord(
    writer="0123456789abcdef0123456789abcdef",
    tokens_made=internal_pb2.TokensMade(offset=4321, text=" token", token_ids=[12345], token_offset=987),
)
_RUNS: Final = 10
_TOKENS: Final = 100
"""Output tokens of a job."""


async def measure(sizes: Sizes) -> Report:
    """Return the report."""
    report = Report(
        "What does encryption at rest cost?",
        "Microseconds to encode and decode a JobResult, or to write and read the feed's record of one token; and the"
        " bytes that are stored. Keys are in memory; the feed is in memory, too. Jobs have 100 tokens.",
    )
    with tempfile.TemporaryDirectory() as folder:
        encryption = new_encryption(Path(folder))
        for case, ways in {**await payloads(encryption, sizes), "a token": await records(encryption)}.items():
            for _ in range(sizes.rounds):
                for who, (way, size) in ways.items():
                    report.add(case, who, {"microseconds": await microseconds(way, sizes.seconds), "bytes": size})
            report.ratio(case, "microseconds", "peer_plain")
            report.ratio(case, "microseconds", "limit_aes_gcm")
            report.ratio(case, "bytes", "peer_plain")
        await add_jobs(report, sizes, Path(folder))
    return report


async def add_jobs(report: Report, sizes: Sizes, folder: Path) -> None:
    """Add what a job costs on a stack that encrypts, next to one that does not. `folder` has the keys."""
    variables = {"ENCRYPTION_KEY_STORE": str(folder / "keys"), "ENCRYPTION_KEYRING": str(folder / "keyring.json")}
    async with running(variables) as encrypting_stack, running({}) as plain_stack:
        stacks = {"suite": encrypting_stack, "peer_plain": plain_stack}
        for stack, stub in stacks.values():
            # The first jobs of a process fill its caches.
            await jobs(stack, stub, sizes)
        for number in range(sizes.rounds):
            # The first of a round may find less other load, so the order rotates.
            for who in [*stacks][:: 1 if number % 2 else -1]:
                report.add("a job", who, await jobs(*stacks[who], sizes))
    report.ratio("a job", "jobs_per_second", "peer_plain")
    report.ratio("a job", "cpu_ms_a_job", "peer_plain")


@asynccontextmanager
async def running(variables: Mapping[str, str]) -> AsyncIterator[tuple[Stack, LlmServiceStub]]:
    """Run a stack whose services have these variables, and yield it with its stub."""
    environment = {kind: {**variables} for kind in ("gateway", "gpu-worker", "notifier")}
    environment["gpu-worker"] |= simulated(tokens_per_second=1e9)
    with new_stack(environment) as stack:
        async with stack, grpc.aio.insecure_channel(stack.address("gateway")) as channel:
            yield stack, LlmServiceStub(channel)


async def jobs(stack: Stack, stub: LlmServiceStub, sizes: Sizes) -> dict[str, float]:
    """Run jobs to their ends; return the figures."""

    async def job() -> None:
        await finish(stub, await submit(stub, tokens=_TOKENS))

    began, before = time.perf_counter(), sum(cpu_of(stack).values())
    await together(sizes.jobs, job, sizes.at_once)
    return {
        "jobs_per_second": sizes.jobs / (time.perf_counter() - began),
        "cpu_ms_a_job": 1000 * (sum(cpu_of(stack).values()) - before) / sizes.jobs,
    }


def new_encryption(folder: Path) -> Encryption:
    """Return encryption with keys of its own."""
    store, keyring = KeyStore(folder / "keys"), Keyring(folder / "keyring.json")
    store.create()
    keyring.create()
    return Encryption(DataKeys(store, keyring))


async def payloads(encryption: Encryption, sizes: Sizes) -> dict[str, dict[str, tuple[Way, int]]]:
    """Return, by case and name, what encodes and decodes a value, and the bytes of its payload."""
    cases: dict[str, dict[str, tuple[Way, int]]] = {}
    for size in sizes.bytes:
        message = llm_pb2.JobResult()
        message.CopyFrom(RESULT)
        message.output = text_of(size)
        for what, value in (("text", message), ("random data", os.urandom(size))):
            cases[f"{size // 1000} KB of {what}"] = {
                "suite": await _converting(encrypting(encryption), value),
                "peer_plain": await _converting(data_converter, value),
                "limit_aes_gcm": _bare(data_converter.payload_converter.to_payloads([value])[0].SerializeToString()),
            }
    return cases


async def _converting(converter: DataConverter, value: Any) -> tuple[Way, int]:
    async def there_and_back() -> Any:
        return (await converter.decode(await converter.encode([value]), [type(value)]))[0]

    if await there_and_back() != value:
        raise RuntimeError("the converter does not give back what it was given")
    return there_and_back, (await converter.encode([value]))[0].ByteSize()


async def records(encryption: Encryption) -> dict[str, tuple[Way, int]]:
    """Return, by name, what writes and reads a record of the feed, and its bytes."""
    return {
        "suite": await _recording(lambda feed: EncryptedFeed(feed, encryption)),
        "peer_plain": await _recording(lambda feed: feed),
        "limit_aes_gcm": _bare(_RECORD.SerializeToString()),
    }


async def _recording(around: Callable[[Feed], Feed]) -> tuple[Way, int]:
    stored = _Slot()
    feed = around(stored)

    async def there_and_back() -> None:
        await feed.append("job", _RECORD)
        await feed.read("job", lambda record: record == _RECORD)

    await there_and_back()
    return there_and_back, len(stored.data)


class _Slot(MemoryFeed):
    """Keeps one record, in the form in which a broker has it."""

    data = b""

    async def append(self, key: str, record: internal_pb2.FeedRecord) -> None:
        """See Feed."""
        self.data = record.SerializeToString()

    async def read(self, key: str, on_record: RecordHandler, caught_up: Callable[[], None] = ignore) -> None:
        """See Feed."""
        if not on_record(internal_pb2.FeedRecord.FromString(self.data)):
            raise RuntimeError("the feed does not give back what it was given")


def _bare(data: bytes) -> tuple[Way, int]:
    aead = AESGCM(AESGCM.generate_key(256))

    async def there_and_back() -> None:
        nonce = os.urandom(12)
        aead.decrypt(nonce, aead.encrypt(nonce, data, b""), b"")

    return there_and_back, len(data) + 28


async def microseconds(way: Way, seconds: float) -> float:
    """Return what one call takes, of the fastest of some runs that last so long together."""
    calls, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds / _RUNS:
        await way()
        calls += 1
    fastest = float("inf")
    for _ in range(_RUNS):
        begin = time.perf_counter()
        for _ in range(calls):
            await way()
        fastest = min(fastest, time.perf_counter() - begin)
    return fastest / calls * 1e6


if __name__ == "__main__":
    script.run(measure, Sizes(), Sizes(rounds=2, bytes=(1_000, 10_000), seconds=0.01, jobs=2, at_once=2), __doc__)
