"""Files of tenants: each has its own, its own limits, and a record of who did what."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from temporalio.client import Client

from deploy.local.stack import Stack
from jobs import names
from jobs.ids import files_ledger_workflow_id
from llm_pb import common_pb2, file_pb2, internal_pb2, llm_pb2
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from runtime.scopes import SCOPES
from tests.support.credentials import CallsAs, KeyFile
from tests.support.files import (
    bad_fields,
    delete,
    download,
    get,
    listed,
    new_file,
    objects,
    refusal,
    until,
    upload,
    upload_again,
)
from tests.support.jobs import details_of
from tests.support.temporal_proxy import TemporalProxy, temporal_proxy

MIB = 1024 * 1024
TENANTS: dict[str, dict[str, Any]] = {
    "acme": {},
    "globex": {},
    "few": {"max_files": 2},
    "small": {"max_file_bytes": 3 * MIB},
    "racing": {"max_files": 5},
    "shared": {"max_file_bytes": 1000},
    "twice": {"max_files": 1},
    "gone": {"max_files": 1},
    "brief": {"max_files": 1},
}


SCOPED = (("files:write",), ("files:delete",), ("files:read",), ("files:*",), ("jobs:*",))


class Callers:
    """The stubs of callers with keys of their own, at one gateway."""

    def __init__(self, folder: Path) -> None:
        """Make all keys: the gateway learns of a new one after a moment."""
        self.file = KeyFile(folder / "keys.json")
        self._keys = {(tenant, "", SCOPES): self.file.add(SCOPES, tenant=tenant) for tenant in TENANTS}
        self._keys["acme", "alice", SCOPES] = self.file.add(SCOPES, tenant="acme", user_id="alice")
        for scopes in map(frozenset, SCOPED):
            self._keys["acme", "", scopes] = self.file.add(scopes, tenant="acme")
        self.channel: grpc.aio.Channel

    def of(self, tenant: str, user_id: str = "", scopes: Iterable[str] = SCOPES) -> Any:
        return self.at(self.channel, tenant, user_id, scopes)

    def at(self, channel: grpc.aio.Channel, tenant: str, user_id: str = "", scopes: Iterable[str] = SCOPES) -> Any:
        stub: Any = FileServiceStub(channel)
        return CallsAs(stub, self._keys[tenant, user_id, frozenset(scopes)])

    async def quota(self, tenant: str) -> llm_pb2.FilesQuota:
        stub = CallsAs(LlmServiceStub(self.channel), self._keys[tenant, "", SCOPES])
        response: llm_pb2.GetQuotaResponse = await stub.GetQuota(llm_pb2.GetQuotaRequest())
        return response.files


@pytest.fixture(scope="module")
def audit_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit") / "audit.jsonl"


@asynccontextmanager
async def gateway(stack: Stack, callers: Callers, audit_log: Path, **settings: str) -> AsyncIterator[grpc.aio.Channel]:
    process = stack.add(
        "gateway",
        {
            "GATEWAY_API_KEYS_FILE": str(callers.file.path),
            "GATEWAY_TENANTS": json.dumps(TENANTS),
            "GATEWAY_FILE_MAX_BYTES": str(4 * MIB),
            "GATEWAY_MAX_UPLOADS": "8",
            "GATEWAY_AUDIT": str(audit_log),
            **settings,
        },
    )
    await process.start()
    await process.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(process.name)) as channel:
        yield channel
    await process.terminate()


@pytest.fixture(scope="module")
async def callers(stack: Stack, audit_log: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Callers]:
    callers = Callers(tmp_path_factory.mktemp("keys"))
    async with gateway(stack, callers, audit_log) as channel:
        callers.channel = channel
        yield callers


class Slow(NamedTuple):
    """A gateway to which anything may happen between a call to Temporal and its answer."""

    temporal: TemporalProxy
    channel: grpc.aio.Channel


@pytest.fixture(scope="module")
async def slow(stack: Stack, callers: Callers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Slow]:
    log = tmp_path_factory.mktemp("audit-of-slow") / "audit.jsonl"
    async with (
        temporal_proxy(stack.address("temporal")) as (proxy, address),
        gateway(stack, callers, log, TEMPORAL_ADDRESS=address, GATEWAY_ROLE="api") as channel,
    ):
        yield Slow(proxy, channel)


async def test_another_tenants_file_is_not_there(callers: Callers) -> None:
    acme, globex = callers.of("acme"), callers.of("globex")
    key = new_file(file={"user_id": "same"})
    mine = await upload(acme, key, b"of acme")
    theirs = await upload(globex, key, b"of globex")
    assert mine.ref.file_id != theirs.ref.file_id
    missing = "file-" + "0" * 64
    for call in (get, download, delete):
        with pytest.raises(grpc.aio.AioRpcError) as foreign:
            await call(globex, mine.ref.file_id)
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await call(globex, missing)
        assert (foreign.value.code(), (foreign.value.details() or "").replace(mine.ref.file_id, missing)) == (
            unknown.value.code(),
            unknown.value.details(),
        )

    async def are_listed() -> bool:
        return await listed(acme, user_id="same") == [mine] and await listed(globex, user_id="same") == [theirs]

    await until(are_listed)
    assert await download(acme, mine.ref.file_id) == b"of acme"


async def test_a_caller_who_is_bound_to_a_user_sees_that_users_files_alone(callers: Callers) -> None:
    all_users, alice = callers.of("acme"), callers.of("acme", "alice")
    mine = await upload(alice, new_file(file={"user_id": "alice"}), b"1")
    other = await upload(all_users, new_file(file={"user_id": "bob"}), b"2")
    assert await refusal(upload(alice, new_file(file={"user_id": "bob"}), b"3")) == (
        "PERMISSION_DENIED",
        "USER_NOT_ALLOWED",
    )
    for call in (get, download, delete):
        assert await refusal(call(alice, other.ref.file_id)) == ("NOT_FOUND", "FILE_NOT_FOUND")

    async def is_listed() -> bool:
        return await listed(alice) == [mine]

    await until(is_listed)


async def test_each_method_needs_its_scope(callers: Callers) -> None:
    file = await upload(callers.of("acme"), new_file(), b"1")
    id_ = file.ref.file_id
    denied = ("PERMISSION_DENIED", "MISSING_SCOPE")
    for scopes in (("files:write",), ("files:delete",), ("jobs:*",)):
        stub = callers.of("acme", scopes=scopes)
        for call in (get(stub, id_), download(stub, id_), listed(stub)):
            assert await refusal(call) == denied
    reader = callers.of("acme", scopes=("files:read",))
    assert await refusal(upload(reader, new_file(), b"1")) == denied
    assert await refusal(delete(reader, id_)) == denied
    assert await download(reader, id_) == b"1"
    await delete(callers.of("acme", scopes=("files:*",)), id_)


async def test_a_file_may_not_be_larger_than_the_operator_says(callers: Callers) -> None:
    acme = callers.of("acme")
    declared = new_file(file={"ref": common_pb2.FileRef(size_bytes=5 * MIB)})
    assert await bad_fields(upload(acme, declared, b"1")) == {"file.ref.size_bytes"}
    assert await bad_fields(upload(acme, new_file(), bytes(5 * MIB))) == {"data"}


async def test_a_tenant_may_have_so_many_files(callers: Callers) -> None:
    few = callers.of("few")
    first, key = await upload(few, new_file(), b"1"), new_file()
    await upload(few, key, b"2")
    beyond = ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
    assert await refusal(upload(few, new_file(), b"3")) == beyond
    assert (await upload(few, key, b"2")).committed_bytes == 1, "a repeat finds its file"
    quota = await callers.quota("few")
    assert (quota.limit_files, quota.used_files, quota.used_bytes) == (2, 2, 2)
    assert not quota.HasField("limit_bytes")
    await delete(few, first.ref.file_id)
    await upload(few, new_file(), b"3")


async def test_uploads_that_race_at_one_gateway_keep_the_quota(callers: Callers) -> None:
    racing = callers.of("racing")
    outcomes: list[str] = []

    async def client() -> None:
        # A tenant may have four uploads at this gateway at a time.
        for _ in range(5):
            try:
                await upload(racing, new_file(), b"1")
            except grpc.aio.AioRpcError as error:
                outcomes.append(details_of(error)["ErrorInfo"].reason)
            else:
                outcomes.append("accepted")

    await asyncio.gather(*(client() for _ in range(4)))
    assert Counter(outcomes) == {"accepted": 5, "QUOTA_EXCEEDED": 15}


async def test_the_files_of_a_tenant_may_have_so_many_bytes(callers: Callers) -> None:
    small = callers.of("small")
    await upload(small, new_file(), bytes(2 * MIB))
    beyond = ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
    assert await refusal(upload(small, new_file(file={"ref": common_pb2.FileRef(size_bytes=2 * MIB)}), b"1")) == beyond
    assert await refusal(upload(small, new_file(), bytes(2 * MIB))) == beyond
    quota = await callers.quota("small")
    assert (quota.limit_bytes, quota.used_bytes) == (3 * MIB, 2 * MIB)
    assert not (await callers.quota("acme")).used_files, "a tenant without a quota has no count"


async def test_uploads_that_race_at_two_gateways_keep_the_quota(stack: Stack, callers: Callers, tmp_path: Path) -> None:
    """Of files of 100 bytes, exactly those fit that 1000 bytes have room for, whether they declare it or not."""
    outcomes: list[str] = []
    accepted: list[str] = []

    async def client(stub: Any) -> None:
        for number in range(4):
            declared = common_pb2.FileRef(size_bytes=100 * (number % 2))
            try:
                file = await upload(stub, new_file(file={"ref": declared}), bytes(100))
            except grpc.aio.AioRpcError as error:
                outcomes.append(details_of(error)["ErrorInfo"].reason)
            else:
                outcomes.append("accepted")
                accepted.append(file.ref.file_id)

    async with gateway(stack, callers, tmp_path / "audit.jsonl") as channel:
        stubs = [callers.at(one, "shared") for one in (callers.channel, channel)]
        # A tenant may have four uploads at each gateway at a time.
        await asyncio.gather(*(client(stub) for stub in stubs * 4))
        assert Counter(outcomes) == {"accepted": 10, "QUOTA_EXCEEDED": 22}
        # What one gateway deletes is free at the other, too.
        one, other = stubs
        for file_id in accepted[:2]:
            await delete(one, file_id)
        freed = new_file(file={"ref": common_pb2.FileRef(size_bytes=200)})
        assert (await upload(other, freed, bytes(200))).committed_bytes == 200
        assert await refusal(upload(one, new_file(), b"1")) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")


@pytest.mark.parametrize(("method", "calls"), [("DescribeWorkflowExecution", 2), ("UpdateWorkflowExecution", 1)])
async def test_of_two_uploads_under_one_key_at_once_the_file_counts_no_more_once_it_is_deleted(
    callers: Callers, slow: Slow, method: str, calls: int
) -> None:
    """Each has counted a file that it was to create, and one of them has created it: before the other or after it."""
    one, other = callers.of("twice"), callers.at(slow.channel, "twice")
    key = new_file()

    async def after(calls: int) -> None:
        # A gateway describes a workflow twice before it counts as unknown.
        if calls > 1:
            slow.temporal.meanwhile[method] = partial(after, calls - 1)
        else:
            await upload(one, key, b"1")

    slow.temporal.meanwhile[method] = partial(after, calls)
    file = await upload(other, key, b"1")
    assert not slow.temporal.meanwhile
    assert await refusal(upload(one, new_file(), b"2")) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
    await delete(one, file.ref.file_id)
    for stub in (other, one):
        another = await upload(stub, new_file(), b"2")
        await delete(stub, another.ref.file_id)


async def test_a_deletion_deletes_no_file_that_is_uploaded_under_its_id_meanwhile(callers: Callers, slow: Slow) -> None:
    acme, other = callers.of("acme"), callers.at(slow.channel, "acme")
    key = new_file()
    first = await upload(acme, key, b"1")
    again: list[file_pb2.File] = []

    async def replace() -> None:
        await delete(acme, first.ref.file_id)
        again.append(await upload_again(acme, key, b"1"))

    slow.temporal.meanwhile["DescribeWorkflowExecution"] = replace
    await delete(other, first.ref.file_id)
    assert again == [await get(acme, first.ref.file_id)]
    assert again[0].create_time.ToNanoseconds() > first.create_time.ToNanoseconds()


async def test_an_upload_adds_nothing_to_a_file_that_was_begun_again_under_its_id(callers: Callers, slow: Slow) -> None:
    twice, other = callers.of("twice"), callers.at(slow.channel, "twice")
    key = new_file()
    first = await upload(twice, key, b"", last=False)

    async def begin_again() -> None:
        await delete(twice, first.ref.file_id)
        await upload_again(twice, key, b"", last=False)

    slow.temporal.meanwhile["QueryWorkflow"] = begin_again
    assert await refusal(upload(other, key, b"of the first")) == ("NOT_FOUND", "FILE_NOT_FOUND")
    assert not (await get(twice, first.ref.file_id)).committed_bytes
    assert (await upload(twice, key, b"of the second")).state == file_pb2.FILE_STATE_READY
    # What counts is the second one.
    await delete(twice, first.ref.file_id)
    await delete(twice, (await upload(twice, new_file(), b"2")).ref.file_id)


@pytest.mark.parametrize("what", ["content", "folder"])
async def test_an_upload_whose_file_is_deleted_meanwhile_is_not_found(
    stack: Stack, callers: Callers, slow: Slow, what: str
) -> None:
    """Although the content to read back is gone, or the store cannot write where it was. The file counts no more."""
    gone, other = callers.of("gone"), callers.at(slow.channel, "gone")
    key, store = new_file(), stack.state_dir / "store"
    id_ = (await upload(gone, key, b"first", last=False)).ref.file_id
    (committed,) = (path for path in objects(store) if id_ in str(path))

    async def delete_it() -> None:
        await delete(gone, id_)
        await until(lambda: not committed.parent.exists())
        if what == "folder":
            committed.parent.parent.mkdir(exist_ok=True)
            committed.parent.touch()

    slow.temporal.meanwhile["QueryWorkflow"] = delete_it
    try:
        assert await refusal(upload(other, key, b"firstsecond", 5)) == ("NOT_FOUND", "FILE_NOT_FOUND")
    finally:
        if what == "folder":
            committed.parent.unlink()
    assert not slow.temporal.meanwhile
    await delete(gone, (await upload(other, new_file(), b"2")).ref.file_id)


async def test_an_upload_that_was_deleted_before_its_commit_counts_no_more(callers: Callers, slow: Slow) -> None:
    gone, other = callers.of("gone"), callers.at(slow.channel, "gone")
    key = new_file()
    id_ = (await upload(gone, key, b"", last=False)).ref.file_id

    slow.temporal.meanwhile["QueryWorkflow"] = partial(delete, gone, id_)
    assert await refusal(upload(other, key, b"1")) == ("NOT_FOUND", "FILE_NOT_FOUND")
    assert not slow.temporal.meanwhile
    await delete(gone, (await upload(gone, new_file(), b"2")).ref.file_id)


async def test_a_file_that_has_expired_is_free_as_soon_as_it_is_gone(
    stack: Stack, callers: Callers, temporal: Client, tmp_path: Path
) -> None:
    """The ledger learns of it: it knows the file although Temporal lists it no more."""
    settings = {"GATEWAY_FILE_TTL": "PT1S", "GATEWAY_WORKFLOW_QUEUE": "brief"}
    async with gateway(stack, callers, tmp_path / "audit.jsonl", **settings) as channel:
        brief = callers.at(channel, "brief")
        file = await upload(brief, new_file(), b"1")
        ledger = temporal.get_workflow_handle(files_ledger_workflow_id("brief"))

        async def is_gone() -> bool:
            state = await ledger.query(names.QUERY_GET_LEDGER, result_type=internal_pb2.LedgerState)
            return [(one.file_id, one.gone) for one in state.files] == [(file.ref.file_id, True)]

        await until(is_gone)
        await upload(brief, new_file(), b"2")


@pytest.mark.parametrize("method", ["DescribeWorkflowExecution", "QueryWorkflow"])
async def test_an_upload_that_another_one_overtakes_removes_nothing(callers: Callers, slow: Slow, method: str) -> None:
    """It has the content of the other one before its own, or is not what was declared although the other one is."""
    acme, other = callers.of("acme"), callers.at(slow.channel, "acme")
    key = new_file(file={"ref": common_pb2.FileRef(size_bytes=6)})
    id_ = (await upload(acme, key, b"", last=False)).ref.file_id

    async def overtake() -> None:
        await upload(acme, key, b"abc", last=False)

    slow.temporal.meanwhile[method] = overtake
    mine = b"abcdef" if method == "DescribeWorkflowExecution" else b"other"
    assert await refusal(upload(other, key, mine)) == ("ABORTED", "UPLOAD_OVERTAKEN")
    assert not slow.temporal.meanwhile
    assert (await upload(acme, key, b"abcdef", 3)).state == file_pb2.FILE_STATE_READY
    assert await download(acme, id_) == b"abcdef"


async def test_uploads_and_deletions_are_recorded(callers: Callers, audit_log: Path) -> None:
    acme = callers.of("acme")
    file = await upload(acme, new_file(file={"user_id": "audited"}), b"xyzzy")
    await delete(acme, file.ref.file_id)

    written = await asyncio.to_thread(audit_log.read_text)
    records = [json.loads(line) for line in written.splitlines() if file.ref.file_id in line]
    assert {(record["method"], record["decision"], record["tenant"]) for record in records} == {
        ("UploadFile", "allowed", "acme"),
        ("DeleteFile", "allowed", "acme"),
    }
    assert "xyzzy" not in written
    assert "notes.txt" not in written


async def test_the_record_of_a_continued_upload_names_its_user_and_its_file(callers: Callers, audit_log: Path) -> None:
    acme, key = callers.of("acme"), new_file(file={"user_id": "continues"})
    file = await upload(acme, key, b"abc", last=False)
    await upload(acme, key, b"abcdef", 3, piece=1)

    written = await asyncio.to_thread(audit_log.read_text)
    records = [json.loads(line) for line in written.splitlines() if "continues" in line]
    assert [(record["method"], record["file"]) for record in records] == [("UploadFile", file.ref.file_id)] * 2
