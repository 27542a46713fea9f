"""Encryption at rest by itself: keys, ciphers, the codec, and what it refuses."""

import asyncio
import json
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure
from temporalio.converter import WorkflowSerializationContext
from temporalio.exceptions import ApplicationError

from encryption import KeysUnavailable, open_encryption
from encryption.cipher import KeyId
from encryption.data_keys import RECHECK
from encryption.settings import EncryptionSettings
from llm_pb import llm_pb2
from payload_converter import MAX_PAYLOAD_BYTES, PayloadError, data_converter
from payload_converter.encryption import encrypting
from tests.support.commands import run
from tests.support.encryption import BEFORE, Keys

MARKER = "xyzzy-marker"


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


def of(workflow_id: str) -> WorkflowSerializationContext:
    return WorkflowSerializationContext(namespace="default", workflow_id=workflow_id)


async def command(*words: str, **environment: str) -> str:
    """Run an operator's command and return what it prints."""
    ended = await run(sys.executable, "-m", "encryption", *words, **environment)
    assert ended.status == 0, ended.errors
    return ended.output


VALUES = st.one_of(
    st.none(),
    st.text(),
    st.binary(),
    st.integers(),
    st.lists(st.text()),
    st.dictionaries(st.text(), st.integers()),
    st.builds(llm_pb2.JobRequest, prompt=st.text(alphabet=st.characters(codec="utf-8"))),
    st.integers(0, 300_000).map(lambda size: "ab" * size),
    st.integers(0, 300_000).map(os.urandom),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(VALUES, max_size=3))
async def test_every_value_comes_back(keys: Keys, values: list[Any]) -> None:
    """Decrypted by another process than the one that encrypted it, whose payloads look all alike."""
    hints = [type(value) for value in values]
    payloads = await encrypting(keys.encryption()).encode(values)
    assert {payload.metadata["encoding"] for payload in payloads} <= {b"binary/encrypted"}
    assert {key for payload in payloads for key in payload.metadata} <= {"encoding", "encryption-key-id"}
    decoded = await encrypting(keys.encryption(write=False)).decode(payloads, hints)
    assert decoded == values


async def test_a_text_is_smaller_encrypted_than_in_clear(keys: Keys) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 1000
    (payload,) = await encrypting(keys.encryption()).encode([text])
    assert payload.ByteSize() < len(text) / 10


async def test_the_same_value_never_looks_the_same(keys: Keys) -> None:
    converter = encrypting(keys.encryption())
    assert (await converter.encode(["same"]))[0].data != (await converter.encode(["same"]))[0].data


async def test_clear_payloads_are_read_beside_encrypted_ones(keys: Keys) -> None:
    clear = await data_converter.encode(["clear"])
    encrypted = await encrypting(keys.encryption()).encode(["encrypted"])
    assert await encrypting(keys.encryption()).decode([*clear, *encrypted]) == ["clear", "encrypted"]
    assert await encrypting(keys.encryption(write=False)).encode(["clear"]) == clear


async def test_without_keys_an_encrypted_payload_says_what_is_missing(keys: Keys) -> None:
    """Retryable: the operator has only to give this process the keys."""
    payloads = await encrypting(keys.encryption()).encode(["secret"])
    with pytest.raises(RuntimeError) as error:
        await data_converter.decode(payloads)
    assert "ENCRYPTION_KEY_STORE" in str(error.value.__cause__)


def cut(payload: Payload) -> None:
    payload.data = payload.data[:-1]


def empty(payload: Payload) -> None:
    payload.data = b""


def flip(payload: Payload) -> None:
    payload.data = payload.data[:20] + bytes([payload.data[20] ^ 1]) + payload.data[21:]


def other_tenant(payload: Payload) -> None:
    payload.metadata["encryption-tenant"] = b"other"


def traverse(payload: Payload) -> None:
    payload.metadata["encryption-tenant"] = b"../keys"


def no_key(payload: Payload) -> None:
    del payload.metadata["encryption-key-id"]


def impossible_key(payload: Payload) -> None:
    payload.metadata["encryption-key-id"] = b"20261399T000000Z-00000000"


def unknown_key(payload: Payload) -> None:
    payload.metadata["encryption-key-id"] = b"20200101T000000Z-00000000"


def future_key(payload: Payload) -> None:
    payload.metadata["encryption-key-id"] = b"21000101T000000Z-00000000"


@pytest.mark.parametrize(
    "alter", [cut, empty, flip, other_tenant, traverse, no_key, impossible_key, unknown_key, future_key]
)
async def test_an_altered_payload_is_refused_for_good(keys: Keys, alter: Callable[[Payload], None]) -> None:
    converter = encrypting(keys.encryption())
    # The key of the other tenant exists.
    await converter.with_context(of("other/1")).encode([""])
    (payload,) = await converter.encode([MARKER])
    alter(payload)
    with pytest.raises(PayloadError, match="cannot be read") as error:
        await converter.decode([payload])
    assert error.value.non_retryable
    assert MARKER not in str(error.value)


async def test_a_tenants_payload_is_for_its_workflows_alone(keys: Keys) -> None:
    converter = encrypting(keys.encryption())
    payloads = await converter.with_context(of("one/1")).encode([MARKER])
    assert payloads[0].metadata["encryption-tenant"] == b"one"
    assert await converter.with_context(of("one/2")).decode(payloads) == [MARKER]
    assert await converter.decode(payloads) == [MARKER], "the codec server knows no workflow"
    with pytest.raises(PayloadError, match="of tenant 'one'"):
        await converter.with_context(of("two/1")).decode(payloads)


async def test_a_payload_that_outgrows_the_limit_is_refused_when_it_is_made(keys: Keys) -> None:
    """By the converter, inside the workflow: behind it the same task would be repeated for ever."""
    converter = encrypting(keys.encryption()).payload_converter
    fits = os.urandom(MAX_PAYLOAD_BYTES - 1000)
    converter.to_payloads([fits])
    with pytest.raises(PayloadError, match="over Temporal's limit"):
        converter.to_payloads([fits + bytes(900)])
    assert await encrypting(keys.encryption()).decode(await encrypting(keys.encryption()).encode([fits]))


async def test_words_of_a_failure_are_encrypted_with_those_of_its_causes(keys: Keys) -> None:
    """Also of causes that Temporal recorded before encryption was switched on."""
    old = Failure()
    error = ApplicationError(MARKER, MARKER)
    error.__cause__ = ValueError(MARKER)
    await data_converter.encode_failure(error, old)
    passed_on = await data_converter.decode_failure(old)
    converter, failure = encrypting(keys.encryption()), Failure()
    await converter.encode_failure(passed_on, failure)
    assert MARKER not in str(failure)
    assert MARKER.encode() not in failure.SerializeToString()
    decoded = await converter.decode_failure(failure)
    assert isinstance(decoded, ApplicationError)
    assert (decoded.message, [*decoded.details], str(decoded.__cause__)) == (MARKER, [MARKER], f"ValueError: {MARKER}")


# Keys


async def test_processes_that_begin_at_once_share_one_key(keys: Keys) -> None:
    found = await asyncio.gather(*(keys.data_keys().current("t") for _ in range(20)))
    assert len({key.key_id for key in found}) == 1


async def test_each_tenant_and_month_has_its_key(keys: Keys) -> None:
    now = datetime(2026, 1, 31, tzinfo=UTC)
    process = keys.data_keys(lambda: now)
    first = await process.current("t")
    assert (await process.current("t")) is first
    assert (await process.current("u")).key_id != first.key_id
    now += timedelta(days=1)
    assert (await process.current("t")).key_id.month == "2026-02"
    again = await keys.data_keys().get(first.key_id)
    assert again.cipher("p").decrypt(first.cipher("p").encrypt(b"old")) == b"old"


async def test_turning_and_retiring_key_encryption_keys(keys: Keys) -> None:
    """A turn needs no restart and leaves the data key as it is; once all is rewrapped the old one can go."""
    encryption = keys.encryption()
    payloads = await encrypting(encryption).encode([MARKER])
    keys.keyring.turn()
    process = encrypting(keys.encryption())
    assert await process.decode(payloads) == [MARKER]
    assert (await process.encode([""]))[0].metadata["encryption-key-id"] == payloads[0].metadata["encryption-key-id"]
    assert "wrapped anew: 1" in await command("rewrap", **keys.environment)
    ring = json.loads(keys.ring)
    keys.ring = json.dumps({"current": ring["current"], "keys": {ring["current"]: ring["keys"][ring["current"]]}})
    assert await encrypting(keys.encryption()).decode(payloads) == [MARKER]


async def test_a_missing_key_encryption_key_can_come_back(keys: Keys) -> None:
    """So it is no reason to fail a workflow."""
    payloads = await encrypting(keys.encryption()).encode([MARKER])
    before = keys.ring
    ring = json.loads(before)
    keys.ring = json.dumps({"current": "k", "keys": {"k": ring["keys"][ring["current"]]}})
    with pytest.raises(KeysUnavailable, match="has no key-encryption key"):
        await encrypting(keys.encryption()).decode(payloads)
    keys.ring = before
    assert await encrypting(keys.encryption()).decode(payloads) == [MARKER]


@pytest.mark.parametrize(
    "damage", ["", "{}", '{"current": "k", "keys": {"k": "c2hvcnQ="}}', '{"current":"k","keys":{}}']
)
async def test_a_damaged_keyring_is_named_without_its_keys(keys: Keys, damage: str) -> None:
    keys.ring = damage
    with pytest.raises(KeysUnavailable, match=r"keyring\.json") as error:
        await keys.data_keys().current("")
    assert "c2hvcnQ" not in str(error.value)


async def test_deleted_keys_end_all_that_they_encrypted(keys: Keys) -> None:
    """In processes that have them in memory, too. The tenant can go on, with a new key."""
    await keys.age("gone")
    converter = encrypting(keys.encryption()).with_context(of("gone/1"))
    other = encrypting(keys.encryption()).with_context(of("other/1"))
    payloads, others = await converter.encode([MARKER]), await other.encode([MARKER])
    await command("delete-tenant", "gone", **keys.environment)

    async def until_unreadable() -> None:
        while True:
            await converter.decode(payloads)
            await asyncio.sleep(0.2)

    with pytest.raises(PayloadError, match="it was deleted"):
        await asyncio.wait_for(until_unreadable(), 10 * RECHECK.total_seconds())
    assert await other.decode(others) == [MARKER]
    assert await converter.decode(await converter.encode(["new"])) == ["new"]
    with pytest.raises(PayloadError, match="it was deleted"):
        await converter.decode(payloads)


async def test_a_key_that_has_not_spread_yet_is_waited_for(keys: Keys) -> None:
    """Network file systems remember for a while that a file was not there."""
    just_made = KeyId.new("t", datetime.now(UTC))
    with pytest.raises(KeysUnavailable):
        await keys.data_keys().get(just_made)


async def test_a_store_that_is_not_mounted_is_no_deletion(keys: Keys, tmp_path: Path) -> None:
    await keys.age()
    payloads = await encrypting(keys.encryption()).encode([MARKER])
    keys.folder.rename(tmp_path / "away")
    keys.folder.mkdir()
    with pytest.raises(KeysUnavailable, match="mount"):
        await encrypting(keys.encryption()).decode(payloads)
    with pytest.raises(KeysUnavailable, match="mount"):
        await encrypting(keys.encryption()).encode([MARKER])
    with pytest.raises(KeysUnavailable, match="mount"):
        open_encryption(settings=EncryptionSettings(**settings_of(keys)))


def settings_of(keys: Keys) -> dict[str, Any]:
    return {name.removeprefix("ENCRYPTION_").lower(): value for name, value in keys.environment.items()}


async def test_init_makes_what_is_missing_and_keeps_what_is_there(tmp_path: Path) -> None:
    environment = {
        "ENCRYPTION_KEY_STORE": str(tmp_path / "a" / "store"),
        "ENCRYPTION_KEYRING": str(tmp_path / "b" / "keyring.json"),
    }
    await command("init", **environment)
    ring = (tmp_path / "b" / "keyring.json").read_text()
    await command("init", **environment)
    assert (tmp_path / "b" / "keyring.json").read_text() == ring
    assert (tmp_path / "b" / "keyring.json").stat().st_mode & 0o077 == 0
    settings_ = EncryptionSettings(key_store=tmp_path / "a" / "store", keyring=tmp_path / "b" / "keyring.json")
    assert open_encryption(settings=settings_) is not None


def test_one_setting_without_the_other_is_refused() -> None:
    with pytest.raises(ValueError, match="ENCRYPTION_KEYRING"):
        EncryptionSettings(key_store=Path("somewhere"))
    assert timedelta(minutes=1) < BEFORE
