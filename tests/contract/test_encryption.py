"""Encryption at rest by itself: keys, ciphers, the codec, and what it refuses."""

import asyncio
import base64
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure
from temporalio.converter import DataConverter, WorkflowSerializationContext
from temporalio.exceptions import ApplicationError
from temporalio.runtime import Runtime

from encryption import DataKeys, Encryption, KeyDeleted, KeysUnavailable, is_hash, open_encryption
from encryption.cipher import Cipher, KeyId, checked_tenant
from encryption.errors import Unreadable
from encryption.key_store import Slot, WrappedKey
from encryption.keyring import Keyring
from encryption.settings import EncryptionSettings
from llm_pb import llm_pb2
from payload_converter import MAX_PAYLOAD_BYTES, PayloadError, data_converter
from payload_converter.encryption import EncryptingCodec, encrypting
from runtime.health import CHECK_TIMEOUT, Readiness
from runtime.temporal import connect
from runtime.tenants import check_tenant
from tests.support.commands import run
from tests.support.encryption import Keys
from tests.support.examples import examples

MARKER = "xyzzy-marker"
SOON = timedelta(seconds=1)
KMS_KEY = "arn:aws:kms:us-east-1:1:key/k"
"""How often a key in memory is looked up where a test waits for it."""


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


@settings(examples(150), suppress_health_check=[HealthCheck.function_scoped_fixture])
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


@pytest.mark.parametrize("alter", [cut, empty, flip, traverse, no_key, impossible_key])
async def test_an_altered_payload_is_refused_for_good(keys: Keys, alter: Callable[[Payload], None]) -> None:
    converter = encrypting(keys.encryption())
    (payload,) = await converter.encode([MARKER])
    alter(payload)
    with pytest.raises(PayloadError, match="cannot be read") as error:
        await converter.decode([payload])
    assert error.value.non_retryable
    assert MARKER not in str(error.value)


@pytest.mark.parametrize("name", ["20200101T000000Z-00000000", "21000101T000000Z-00000000"])
async def test_a_key_that_is_absent_is_not_deleted(keys: Keys, name: str) -> None:
    """It may be on another volume, or in a backup: nothing may be ended for good because of it."""
    converter = encrypting(keys.encryption())
    (payload,) = await converter.encode([MARKER])
    payload.metadata["encryption-key-id"] = name.encode()
    with pytest.raises(KeysUnavailable, match="not in the key store"):
        await converter.decode([payload])


def test_tenant_and_key_id_are_authenticated() -> None:
    """They are, also where the secret is the same: a copied wrapped key is of no use under another name."""
    name, other = "20260101T000000Z-00000000", "20260101T000000Z-00000001"
    encrypted = Cipher(bytes(32), KeyId("t", name)).encrypt(b"text")
    assert Cipher(bytes(32), KeyId("t", name)).decrypt(encrypted) == b"text"
    for key_id in (KeyId("u", name), KeyId("", name), KeyId("t", other)):
        with pytest.raises(Unreadable):
            Cipher(bytes(32), key_id).decrypt(encrypted)


async def test_the_name_of_another_tenant_is_refused(keys: Keys) -> None:
    """Its key decrypts nothing that this tenant's key encrypted, even under the same name."""
    converter = encrypting(keys.encryption())
    await converter.with_context(of("other/1")).encode([""])
    (payload,) = await converter.encode([MARKER])
    slot = next(path.name for path in (keys.folder / "_").iterdir() if path.name[0] != ".")
    own, other = keys.folder / "_" / slot, keys.folder / "other" / slot
    name, others = json.loads(own.read_text())["name"], json.loads(other.read_text())["name"]
    payload.metadata["encryption-tenant"] = b"other"
    payload.metadata["encryption-key-id"] = others.encode()
    with pytest.raises(PayloadError, match="cannot be read"):
        await converter.decode([payload])
    other.write_text(own.read_text())
    payload.metadata["encryption-key-id"] = name.encode()
    with pytest.raises(KeysUnavailable, match="is not the one that wrapped"):
        await encrypting(keys.encryption()).decode([payload])


async def test_a_tenants_payload_is_for_its_workflows_alone(keys: Keys) -> None:
    converter = encrypting(keys.encryption())
    payloads = await converter.with_context(of("one/1")).encode([MARKER])
    assert payloads[0].metadata["encryption-tenant"] == b"one"
    assert await converter.with_context(of("one/2")).decode(payloads) == [MARKER]
    assert await converter.decode(payloads) == [MARKER], "the codec server knows no workflow"
    for other in ("two/1", "of-no-tenant"):
        with pytest.raises(PayloadError, match="of tenant 'one'"):
            await converter.with_context(of(other)).decode(payloads)


async def test_a_payload_that_outgrows_the_limit_is_refused_when_it_is_made(keys: Keys) -> None:
    """By the converter, inside the workflow: behind it the same task would be repeated for ever."""
    converter = encrypting(keys.encryption()).payload_converter
    fits = os.urandom(MAX_PAYLOAD_BYTES - 1000)
    converter.to_payloads([fits])
    with pytest.raises(PayloadError, match="over Temporal's limit"):
        converter.to_payloads([fits + bytes(900)])
    assert await encrypting(keys.encryption()).decode(await encrypting(keys.encryption()).encode([fits]))
    # What comes without a converter, as at the codec server.
    for data in (os.urandom(MAX_PAYLOAD_BYTES), bytes(2 * MAX_PAYLOAD_BYTES)):
        with pytest.raises(PayloadError, match="once encrypted"):
            await EncryptingCodec(keys.encryption(), "").encode([Payload(data=data)])


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
    assert "wrapped by the current key: 1" in await command("rewrap", **keys.environment)
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
    converter = encrypting(keys.encryption(recheck=SOON)).with_context(of("gone/1"))
    other = encrypting(keys.encryption()).with_context(of("other/1"))
    payloads, others = await converter.encode([MARKER]), await other.encode([MARKER])
    await command("delete-tenant", "gone", **keys.environment)

    async def until_unreadable() -> None:
        while True:
            await converter.decode(payloads)
            await asyncio.sleep(0.2)

    with pytest.raises(PayloadError, match="was deleted"):
        await asyncio.wait_for(until_unreadable(), 60)
    assert await other.decode(others) == [MARKER]
    assert await converter.decode(await converter.encode(["new"])) == ["new"]
    with pytest.raises(PayloadError, match="was deleted"):
        await converter.decode(payloads)


async def test_a_store_that_is_not_mounted_is_no_deletion(keys: Keys, tmp_path: Path) -> None:
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


async def test_a_keyring_that_is_not_there_is_not_made_anew(keys: Keys, tmp_path: Path) -> None:
    """A path may be misspelt, or a volume not mounted. A new keyring in its place would unwrap no data key."""
    await encrypting(keys.encryption()).encode([MARKER])
    ring = tmp_path / "keyring.json"
    ring.rename(tmp_path / "away.json")
    for words, says in ((("turn",), "cannot be read"), (("init",), "bring that keyring back")):
        ended = await run(sys.executable, "-m", "encryption", *words, **keys.environment)
        assert (ended.status, ended.errors.count("\n")) == (1, 1), ended.errors
        assert ended.errors.startswith("ENCRYPTION_KEYRING: ")
        assert says in ended.errors
        assert not ring.exists()


@pytest.mark.parametrize("word", ["init", "turn"])
async def test_a_command_refuses_the_keyring_of_another_store(keys: Keys, tmp_path: Path, word: str) -> None:
    """It would get a key that no service needs, and the operator would not notice."""
    await encrypting(keys.encryption()).encode([MARKER])
    (tmp_path / "keyring.json").unlink()
    keys.keyring.create()
    before = keys.ring
    ended = await run(sys.executable, "-m", "encryption", word, **keys.environment)
    assert (ended.status, ended.errors.count("\n")) == (1, 1), ended.errors
    assert "keyring.json has no key-encryption key" in ended.errors
    assert keys.ring == before


async def test_init_names_a_key_store_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    settings = {"ENCRYPTION_KEY_STORE": str(tmp_path / "store"), "ENCRYPTION_KEYRING": str(tmp_path / "ring")}
    ended = await run(sys.executable, "-m", "encryption", "init", **settings)
    problem = f"ENCRYPTION_KEY_STORE: {tmp_path / 'store'} cannot become a key store: File exists\n"
    assert (ended.status, ended.errors) == (1, problem)
    assert not (tmp_path / "ring").exists()


async def test_a_lost_key_is_recorded_as_deleted(keys: Keys) -> None:
    """What it encrypted can never be read again, and nobody waits for it any more."""
    payloads = await encrypting(keys.encryption()).encode([MARKER])
    key_id = (await keys.data_keys().current("")).key_id
    there = await run(sys.executable, "-m", "encryption", "lost", key_id.name, **keys.environment)
    assert (there.status, "is in the key store" in there.errors) == (1, True)
    none = await run(sys.executable, "-m", "encryption", "lost", "20261301T000000Z-0", **keys.environment)
    assert (none.status, "no data key has the id" in none.errors) == (1, True)
    search = (await keys.data_keys().search_key("", create=True)).key_id  # type: ignore[union-attr]
    there = await run(sys.executable, "-m", "encryption", "lost", search.name, **keys.environment)
    assert (there.status, "is in the key store" in there.errors) == (1, True)
    (keys.folder / "_" / key_id.month).unlink()
    assert await keys.data_keys().lacks(key_id)
    with pytest.raises(KeysUnavailable):
        await encrypting(keys.encryption()).decode(payloads)
    assert key_id.name in await command("lost", key_id.name, **keys.environment)
    assert not await keys.data_keys().lacks(key_id)
    with pytest.raises(PayloadError, match="was deleted"):
        await encrypting(keys.encryption()).decode(payloads)


@pytest.mark.parametrize("damage", ["", "{}", '{"current": "k", "keys": {}}'])
@pytest.mark.parametrize("word", ["init", "turn", "rewrap"])
async def test_a_command_names_a_damaged_keyring(keys: Keys, word: str, damage: str) -> None:
    await encrypting(keys.encryption()).encode([MARKER])
    keys.ring = damage
    ended = await run(sys.executable, "-m", "encryption", word, **keys.environment)
    assert (ended.status, ended.errors.count("\n")) == (1, 1), ended.errors
    assert "keyring.json" in ended.errors
    assert "pydantic" not in ended.errors
    assert keys.ring == damage


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


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "ENCRYPTION_KEY_STORE has to be set"),
        ({"ENCRYPTION_KEY_STORE": "/x"}, "ENCRYPTION_KEY_STORE: set it and either"),
        ({"ENCRYPTION_KEY_STORE": "", "ENCRYPTION_KEYRING": "/x"}, "ENCRYPTION_KEY_STORE: is empty: name a path"),
        ({"ENCRYPTION_KEY_STORE": "/x", "ENCRYPTION_KEYRING": ""}, "ENCRYPTION_KEYRING: is empty: name a path"),
        (
            {"ENCRYPTION_KEY_STORE": "/x", "ENCRYPTION_KMS_KEY": KMS_KEY, "ENCRYPTION_KMS_URL": "http://a:secret@b/"},
            "ENCRYPTION_KMS_URL: must be an https URL",
        ),
    ],
)
async def test_a_command_says_what_is_wrong_with_the_settings(settings: dict[str, str], says: str) -> None:
    """In a line without a value, as one may be a secret."""
    ended = await run(sys.executable, "-m", "encryption", "init", **settings)
    assert ended.status == 1
    assert ended.errors.startswith(says)
    assert ended.errors.count("\n") == 1
    assert "secret" not in ended.errors


def test_one_setting_without_the_other_is_refused() -> None:
    with pytest.raises(ValueError, match="ENCRYPTION_KEYRING"):
        EncryptionSettings(key_store=Path("somewhere"))
    with pytest.raises(ValueError, match="needs ENCRYPTION_KEY_STORE"):
        EncryptionSettings(search_attributes="hashed")


# Outages


class Stuck(Keyring):
    """A keyring, the calls of which for one tenant do not return: a service that hangs."""

    def __init__(self, path: Path, tenant: str) -> None:
        super().__init__(path)
        self._tenant = tenant
        self.called = asyncio.Event()

    async def wrap(self, secret: bytes, context: str) -> str:
        if f"tenant {self._tenant!r}" in context:
            self.called.set()
            await asyncio.Event().wait()
        return await super().wrap(secret, context)


async def test_a_tenant_whose_key_is_stuck_delays_no_other(keys: Keys, tmp_path: Path) -> None:
    wrapper = Stuck(tmp_path / "keyring.json", "stuck")
    process = DataKeys(keys.store, wrapper)
    waiting = asyncio.create_task(process.current("stuck"))
    await wrapper.called.wait()
    key = await asyncio.wait_for(process.current("other"), 60)
    assert key.key_id.tenant == "other"
    with pytest.raises(KeysUnavailable):
        await asyncio.wait_for(waiting, 60)


async def test_callers_of_one_key_share_one_look_up(keys: Keys, tmp_path: Path) -> None:
    """One that is cancelled does not take it from the others."""
    wrapper = Counting(tmp_path / "keyring.json")
    process = DataKeys(keys.store, wrapper)
    cancelled, *waiting = (asyncio.create_task(process.current("t")) for _ in range(50))
    await asyncio.sleep(0)
    cancelled.cancel()
    assert len({(await task).key_id for task in waiting}) == 1
    assert wrapper.calls == ["wrap", "unwrap"]


class Counting(Keyring):
    """A keyring that lists its calls."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.calls: list[str] = []

    async def wrap(self, secret: bytes, context: str) -> str:
        self.calls.append("wrap")
        return await super().wrap(secret, context)

    async def unwrap(self, wrapped: str, context: str) -> bytes:
        self.calls.append("unwrap")
        return await super().unwrap(wrapped, context)


async def test_last_months_key_is_used_while_no_new_one_can_be_wrapped(keys: Keys) -> None:
    """A key service that is down when a month begins stops no job."""
    now = datetime(2026, 1, 31, 23, 59, tzinfo=UTC)
    process = keys.data_keys(lambda: now)
    old = await process.current("t")
    ring, keys.ring = keys.ring, ""
    now += timedelta(minutes=2)
    assert (await process.current("t")).key_id == old.key_id
    assert process.problem is not None
    assert "keyring.json is not as docs/encryption.md says" in process.problem
    keys.ring = ring
    async with asyncio.timeout(60):
        while (await process.current("t")).key_id.month != "2026-02":  # noqa: ASYNC110  # the service is asked again
            await asyncio.sleep(0.2)
    assert process.problem is None


@pytest.mark.parametrize("keyring", ["lacks", "has another"])
async def test_a_service_that_starts_with_a_wrong_keyring_names_the_key(
    keys: Keys, keyring: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says nothing of Temporal, which it has not asked yet."""
    await keys.data_keys().current("")
    ring = json.loads(keys.ring)
    id_ = ring["current"]
    if keyring == "lacks":
        keys.ring = json.dumps({"current": "k2", "keys": {"k2": ring["keys"][id_]}})
        problem = f"has no key-encryption key '{id_}'"
    else:
        keys.ring = json.dumps({"current": id_, "keys": {id_: base64.b64encode(os.urandom(32)).decode()}})
        problem = f"the key-encryption key '{id_}' is not the one that wrapped"
    monkeypatch.setenv("TEMPORAL_ADDRESS", "127.0.0.1:1")
    readiness = Readiness("test")
    connecting = asyncio.create_task(connect(Runtime.default(), readiness, keys.encryption()))
    try:
        async with asyncio.timeout(60):
            while problem not in (answer := await asyncio.to_thread(readiness.readyz))["degraded"].get("keys", ""):
                assert not connecting.done()
        assert answer["missing"] == {"process": "is starting"}
    finally:
        connecting.cancel()
        await asyncio.wait([connecting])


@pytest.mark.parametrize("outage", ["away", "hanging"])
async def test_keys_in_memory_are_used_while_the_store_is_away_or_hangs(
    keys: Keys, tmp_path: Path, outage: str
) -> None:
    """A network file system that hangs blocks whoever opens a file, as a pipe without a writer does."""
    converter = encrypting(keys.encryption(recheck=SOON))
    payloads = await converter.encode([MARKER])
    (path,) = (path for path in (keys.folder / "_").iterdir() if path.name[0] != ".")
    text = path.read_text()
    if outage == "away":
        keys.folder.rename(tmp_path / "volume")
    else:
        path.unlink()
        os.mkfifo(path)
    end = asyncio.get_running_loop().time() + 2 * SOON.total_seconds()
    while asyncio.get_running_loop().time() < end:
        assert await asyncio.wait_for(converter.decode(payloads), 60) == [MARKER]
        assert await asyncio.wait_for(converter.encode([MARKER]), 60)
        await asyncio.sleep(0.2)
    with pytest.raises(KeysUnavailable):
        await asyncio.wait_for(encrypting(keys.encryption()).decode(payloads), 60)
    if outage == "hanging":
        # The end of the pipe releases the threads that hang, which would outlive the test.
        pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        path.unlink()
        path.write_text(text)
        os.close(pipe)


async def until_refused(converter: DataConverter) -> None:
    while True:
        await converter.encode([MARKER])
        await asyncio.sleep(0.1)


async def test_a_store_that_has_lost_its_key_decrypts_and_does_not_encrypt(keys: Keys) -> None:
    """Another volume is mounted: what is encrypted now could be lost with the memory of the process."""
    converter = encrypting(keys.encryption(recheck=SOON))
    payloads = await converter.encode([MARKER])
    for path in (keys.folder / "_").iterdir():
        path.rename(keys.folder / path.name)

    with pytest.raises(KeysUnavailable, match="not in the key store any more"):
        await asyncio.wait_for(until_refused(converter), 60)
    assert await converter.decode(payloads) == [MARKER]


@pytest.mark.parametrize("damage", ["gone", "empty", "of another"])
async def test_a_keyring_that_goes_bad_is_named_before_a_service_starts_with_it(
    keys: Keys, tmp_path: Path, damage: str
) -> None:
    """What has its keys in memory goes on. `turn`, `rewrap` and the end of the older key are no damage."""
    encryption = keys.encryption()
    converter = encrypting(encryption)
    payloads = await converter.encode([MARKER])
    keys.keyring.turn()
    await command("rewrap", **keys.environment)
    ring = json.loads(keys.ring)
    keys.ring = json.dumps({"current": ring["current"], "keys": {ring["current"]: ring["keys"][ring["current"]]}})
    assert await encryption.keys.present_problem() is None
    good = keys.ring
    if damage == "gone":
        (tmp_path / "keyring.json").unlink()
    else:
        keys.ring = "" if damage == "empty" else Keys(tmp_path / "other").ring
    assert "key" in (await encryption.keys.present_problem() or "")
    assert await converter.decode(payloads) == [MARKER]
    keys.ring = good
    assert await encryption.keys.present_problem() is None


async def test_another_store_in_its_place_encrypts_nothing(keys: Keys, tmp_path: Path) -> None:
    """Its key of the month would encrypt what nobody else can read."""
    encryption = keys.encryption(recheck=SOON)
    converter = encrypting(encryption)
    payloads = await converter.encode([MARKER])
    other = Keys(tmp_path / "other")
    other.ring = keys.ring
    await encrypting(other.encryption()).encode([MARKER])
    keys.folder.rename(tmp_path / "away")
    other.folder.rename(keys.folder)
    assert "another one is mounted" in (await encryption.keys.present_problem() or ""), "the keyring is right"
    with pytest.raises(KeysUnavailable, match="another one is mounted"):
        await asyncio.wait_for(until_refused(converter), 60)
    assert await converter.decode(payloads) == [MARKER]
    keys.folder.rename(other.folder)
    (tmp_path / "away").rename(keys.folder)

    async def until_encrypted() -> Sequence[Payload]:
        while True:
            with suppress(KeysUnavailable):
                return await converter.encode([MARKER])
            await asyncio.sleep(0.1)

    (again,) = await asyncio.wait_for(until_encrypted(), 60)
    assert again.metadata["encryption-key-id"] == payloads[0].metadata["encryption-key-id"]


async def test_another_store_in_its_place_gets_no_key_of_another_tenant(keys: Keys, tmp_path: Path) -> None:
    """What that key encrypts could be read until the process ends."""
    encryption = keys.encryption()
    await encryption.keys.current("")
    keys.folder.rename(tmp_path / "away")
    keys.store.create()
    with pytest.raises(KeysUnavailable, match="another one than before"):
        await encryption.keys.current("acme")
    with pytest.raises(KeysUnavailable, match="another one than before"):
        await encryption.keys.search_key("acme", create=True)
    assert keys.store.slots() == []
    shutil.rmtree(keys.folder)
    (tmp_path / "away").rename(keys.folder)
    await asyncio.wait_for(until_it_encrypts(encrypting(encryption)), 60)


async def until_it_encrypts(converter: DataConverter) -> None:
    while True:
        with suppress(KeysUnavailable):
            await converter.encode([MARKER])
            return
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("what", ["store", "keyring"])
async def test_a_problem_that_is_over_is_not_shown(keys: Keys, tmp_path: Path, what: str) -> None:
    """Nobody has asked for the key since."""
    await keys.data_keys().current("acme")
    encryption = keys.encryption()
    path = keys.folder if what == "store" else tmp_path / "keyring.json"
    path.rename(tmp_path / "away")
    with pytest.raises(KeysUnavailable):
        await encryption.keys.current("acme")
    assert await encryption.keys.present_problem() is not None
    (tmp_path / "away").rename(path)
    assert await encryption.keys.present_problem() is None


async def test_a_look_at_a_store_makes_no_key_and_takes_none(keys: Keys, tmp_path: Path) -> None:
    """A service that starts with another store waits for the right one. A key of the other one would stay in memory."""
    other = Keys(tmp_path / "other")
    other.ring = keys.ring
    await other.data_keys(lambda: datetime(2026, 1, 1, tzinfo=UTC)).current("acme")
    before = {path: path.read_bytes() for path in other.folder.rglob("*") if path.is_file()}
    right = keys.folder.rename(tmp_path / "right")
    keys.folder.symlink_to(other.folder)
    encryption = keys.encryption(recheck=SOON)
    await asyncio.wait_for(encryption.wait_for_store(), 60)
    assert {path: path.read_bytes() for path in other.folder.rglob("*") if path.is_file()} == before
    keys.folder.unlink()
    keys.folder.symlink_to(right)
    await asyncio.wait_for(encryption.wait_for_keys(), 60)
    assert await encryption.keys.present_problem() is None


async def test_a_damaged_key_of_one_tenant_keeps_no_service_from_starting(keys: Keys) -> None:
    await keys.data_keys().current("")
    await keys.data_keys().current("zeta")
    path = next(path for path in (keys.folder / "zeta").iterdir() if path.name[0] != ".")
    path.write_text("")
    path.rename(path.with_name("2099-12"))
    encryption = keys.encryption()
    await asyncio.wait_for(encryption.wait_for_store(), 30)
    await asyncio.wait_for(encryption.wait_for_keys(), 30)
    assert await encryption.keys.present_problem() is None


async def test_a_key_that_the_store_does_not_have_is_a_problem(keys: Keys, tmp_path: Path) -> None:
    """Nobody deleted it. Only that tells of a service whose store is another one."""
    payloads = await encrypting(Keys(tmp_path / "other").encryption()).encode([MARKER])
    encryption = keys.encryption()
    with pytest.raises(KeysUnavailable):
        await encrypting(encryption).decode(payloads)
    problem = await encryption.keys.present_problem()
    assert payloads[0].metadata["encryption-key-id"].decode() in (problem or "")
    assert "is not in the key store" in (problem or "")


async def test_a_store_that_hangs_does_not_hang_who_looks_at_it(keys: Keys) -> None:
    """/readyz looks, and a service whose keys are in memory goes on."""
    encryption = keys.encryption()
    await encrypting(encryption).encode([MARKER])
    (path,) = (path for path in (keys.folder / "_").iterdir() if path.name[0] != ".")
    text = path.read_text()
    path.unlink()
    os.mkfifo(path)
    for _ in range(10):
        problem = await asyncio.wait_for(encryption.keys.present_problem(), CHECK_TIMEOUT.total_seconds())
        assert problem == "the key store does not answer"
    assert await encrypting(encryption).encode([MARKER])
    # The end of the pipe releases the thread that hangs, which would outlive the test.
    pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    path.unlink()
    path.write_text(text)
    os.close(pipe)
    async with asyncio.timeout(60):
        while await encryption.keys.present_problem():
            await encrypting(encryption).encode([MARKER])
            await asyncio.sleep(0.1)


async def test_a_patient_codec_waits_for_its_key(keys: Keys) -> None:
    """So a worker's attempt does not fail for an outage of some seconds."""
    payloads = await encrypting(keys.encryption(patience=timedelta(minutes=1))).encode([MARKER])
    ring, keys.ring = keys.ring, ""
    converter = encrypting(keys.encryption(patience=timedelta(minutes=1)))
    decoding = asyncio.create_task(converter.decode(payloads))
    encoding = asyncio.create_task(converter.encode([MARKER]))
    with pytest.raises(KeysUnavailable):
        await encrypting(keys.encryption()).decode(payloads)
    assert not decoding.done()
    keys.ring = ring
    assert await decoding == [MARKER]
    assert (await encoding)[0].metadata["encryption-key-id"] == payloads[0].metadata["encryption-key-id"]


@pytest.mark.parametrize("wrapped", ["file:k:A", "file:k:\N{SNOWMAN}", "", "file"])
async def test_a_damaged_wrapped_key_can_be_restored(keys: Keys, wrapped: str) -> None:
    payloads = await encrypting(keys.encryption()).encode([MARKER])
    (path,) = (path for path in (keys.folder / "_").iterdir() if path.name[0] != ".")
    text = path.read_text()
    ring = json.loads(keys.ring)
    damaged = wrapped.replace(":k:", f":{ring['current']}:")
    path.write_text(json.dumps({**json.loads(text), "wrapped": damaged}))
    with pytest.raises(KeysUnavailable):
        await encrypting(keys.encryption()).decode(payloads)
    path.write_text(text[:20])
    with pytest.raises(KeysUnavailable, match="is damaged"):
        await encrypting(keys.encryption()).decode(payloads)
    path.write_text(text)
    assert await encrypting(keys.encryption()).decode(payloads) == [MARKER]


# Files


async def test_a_tenant_may_have_any_name(keys: Keys) -> None:
    """Also that of a file of the store."""
    process = keys.data_keys()
    for tenant in ("key-store", "search", "2026-01", "a" * 32):
        assert (await process.current(tenant)).key_id.tenant == tenant


@pytest.mark.parametrize("tenant", ["a_b", "a.b", "-a", "a/b", "a" * 33])
def test_a_name_that_no_credential_can_have_has_no_keys(tenant: str) -> None:
    """What encrypts takes the same names as what authenticates."""
    with pytest.raises(Unreadable):
        checked_tenant(tenant)
    with pytest.raises(ValueError, match="a tenant has 1 to 32"):
        check_tenant(tenant)


async def test_keys_of_a_tenant_are_deleted_with_what_an_interrupted_write_left(keys: Keys) -> None:
    await keys.data_keys().current("t")
    (keys.folder / "t" / ".interrupted").write_text("a wrapped key")
    assert "deleted: 1" in await command("delete-tenant", "t", **keys.environment)
    assert "deleted: 0" in await command("delete-tenant", "t", **keys.environment)
    assert "deleted: 0" in await command("delete-tenant", "nobody", **keys.environment)
    assert [path.name for path in (keys.folder / "t").iterdir()] == [".deleted"]


async def test_rewrapping_does_not_bring_a_deleted_key_back(keys: Keys) -> None:
    key = (await keys.data_keys().current("t")).key_id
    (slot,) = keys.store.slots()
    stored = keys.store.read(slot)
    assert stored is not None
    keys.store.delete("t")
    assert not keys.store.replace(slot, stored)
    assert keys.store.is_deleted(key)
    assert keys.store.slots() == []


async def test_a_deletion_at_any_moment_leaves_no_key_in_between(keys: Keys) -> None:
    """Of keys that are rewrapped or added meanwhile, each is there or named as deleted, and none is both."""

    def at_once(begun: Barrier, action: Callable[[], object]) -> None:
        begun.wait()
        action()

    def race(number: int) -> None:
        tenant = f"t{number}"
        month, search = Slot.of_month(tenant, "2026-11"), Slot.of_search(tenant)
        old, new = (WrappedKey(name=KeyId.new(tenant, datetime.now(UTC)).name, wrapped="w") for _ in range(2))
        keys.store.add(month, old)
        with ThreadPoolExecutor() as threads:
            begun = Barrier(3)
            actions = (
                lambda: keys.store.replace(month, WrappedKey(name=old.name, wrapped="w2")),
                lambda: keys.store.add(search, new),
                lambda: keys.store.delete(tenant),
            )
            ended = [threads.submit(at_once, begun, action) for action in actions]
        for slot, key, one in ((month, old, ended[0]), (search, new, ended[1])):
            if one.exception() is not None:
                # A service is told when its key is deleted before it is used.
                assert isinstance(one.exception(), KeysUnavailable)
            there = (keys.folder / tenant / slot.name).exists()
            assert there != keys.store.is_deleted(KeyId(tenant, key.name)), (number, slot.name)

    for number in range(60):
        await asyncio.to_thread(race, number)


async def test_a_deleted_key_that_is_restored_stays_deleted(keys: Keys) -> None:
    """From a backup of the store, for example. The tenant gets a new key."""
    before = keys.data_keys()
    deleted = (await before.current("t")).key_id
    (slot,) = keys.store.slots()
    path = keys.folder / slot.tenant / slot.name
    text = path.read_text()
    keys.store.delete("t")
    path.write_text(text)
    after = keys.data_keys()
    with pytest.raises(KeyDeleted):
        await after.get(deleted)
    assert (await after.current("t")).key_id != deleted
    assert keys.store.read(slot) is not None


@pytest.mark.heavy
async def test_keys_that_are_added_at_once_are_all_kept(keys: Keys) -> None:
    """A data key that the second one's writer dropped would be unreadable for ever."""
    added = await asyncio.gather(*(command("turn", **keys.environment) for _ in range(6)))
    assert {line.split()[-1] for line in added} <= {*json.loads(keys.ring)["keys"]}


async def test_a_key_file_that_is_no_text_is_deleted_with_the_others(keys: Keys) -> None:
    await keys.data_keys().current("t")
    (keys.folder / "t" / "2025-01").write_bytes(b"\xff\xfe")
    ended = await run(sys.executable, "-m", "encryption", "rewrap", **keys.environment)
    assert (ended.status, "t/2025-01 of the key store is damaged" in ended.errors) == (1, True)
    assert "deleted: 2" in await command("delete-tenant", "t", **keys.environment)


async def test_a_turn_keeps_a_link(keys: Keys, tmp_path: Path) -> None:
    """Services may read the file that it names."""
    (tmp_path / "keyring.json").rename(tmp_path / "named.json")
    (tmp_path / "keyring.json").symlink_to("named.json")
    await command("turn", **keys.environment)
    assert (tmp_path / "keyring.json").is_symlink()
    assert len(json.loads((tmp_path / "named.json").read_text())["keys"]) == 2


async def test_a_turn_needs_no_key_store(keys: Keys, tmp_path: Path) -> None:
    """The keyring may be on another machine than the volume."""
    before = json.loads((tmp_path / "keyring.json").read_text())["current"]
    await command("turn", **{**keys.environment, "ENCRYPTION_KEY_STORE": str(tmp_path / "elsewhere")})
    after = json.loads((tmp_path / "keyring.json").read_text())
    assert after["current"] != before
    assert before in after["keys"]
    assert not (tmp_path / "elsewhere").exists()


def test_a_turned_keyring_keeps_its_permissions(keys: Keys) -> None:
    """The services may read it by their group."""
    path = Path(keys.environment["ENCRYPTION_KEYRING"])
    path.chmod(0o640)
    keys.keyring.turn()
    assert path.stat().st_mode & 0o777 == 0o640


# Search attributes


async def test_equal_values_have_equal_hashes_in_one_tenant_and_attribute(keys: Keys) -> None:
    one, again = Encryption(keys.data_keys(), hashes=True), Encryption(keys.data_keys(), hashes=True)
    hash_, same, other = await one.search_hash("t"), await again.known_search_hash("t"), await again.search_hash("u")
    assert hash_ is not None
    assert same is not None
    assert other is not None
    value = hash_("UserID", MARKER)
    assert is_hash(value)
    assert MARKER not in value
    assert value == same("UserID", MARKER)
    assert len({value, hash_("ProjectId", MARKER), hash_("UserID", "another"), other("UserID", MARKER)}) == 4
    shown = await command("hash", "UserID", MARKER, "--tenant", "t", **keys.environment)
    assert shown.strip() == value


async def test_hashes_are_lost_with_the_tenants_keys(keys: Keys) -> None:
    before = await Encryption(keys.data_keys(), hashes=True).search_hash("t")
    keys.store.delete("t")
    assert await Encryption(keys.data_keys()).known_search_hash("t") is None
    after = await Encryption(keys.data_keys(), hashes=True).search_hash("t")
    assert before is not None
    assert after is not None
    assert before("UserID", MARKER) != after("UserID", MARKER)


async def test_nothing_is_hashed_unless_the_setting_says_so(keys: Keys) -> None:
    assert await Encryption(keys.data_keys()).search_hash("t") is None
    assert await Encryption(keys.data_keys(), write=False, hashes=True).search_hash("t") is None
    assert not [*keys.folder.glob("t/*")]
