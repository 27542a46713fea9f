"""Batches of tenants: each has its own, within its quota, and with what its credential may do."""

import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest

from deploy.local.stack import Stack
from llm_pb import batch_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from runtime.scopes import SCOPES
from tests.support.batches import Stubs, create, lines_of, new_batch
from tests.support.credentials import CallsAs, KeyFile
from tests.support.files import PATIENCE, refusal
from tests.support.jobs import unpack

TENANTS: dict[str, dict[str, Any]] = {"acme": {"max_open_jobs": 2}, "globex": {}}
SCOPED = (("jobs:submit",), ("jobs:read", "files:*"), ("jobs:submit", "jobs:read", "files:*"))


class Callers:
    """The stubs of callers with keys of their own, at one gateway."""

    def __init__(self, folder: Path) -> None:
        self.file = KeyFile(folder / "keys.json")
        self._keys = {(tenant, "", SCOPES): self.file.add(SCOPES, tenant=tenant) for tenant in TENANTS}
        self._keys["globex", "alice", SCOPES] = self.file.add(SCOPES, tenant="globex", user_id="alice")
        for scopes in map(frozenset, SCOPED):
            self._keys["globex", "", scopes] = self.file.add(scopes, tenant="globex")
        self.channel: grpc.aio.Channel

    def of(self, tenant: str, user_id: str = "", scopes: Iterable[str] = SCOPES) -> Stubs:
        key = self._keys[tenant, user_id, frozenset(scopes)]
        files: Any = FileServiceStub(self.channel)
        batches: Any = BatchServiceStub(self.channel)
        return Stubs(CallsAs(files, key), CallsAs(batches, key))


@pytest.fixture(scope="module")
async def callers(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Callers]:
    callers = Callers(tmp_path_factory.mktemp("keys"))
    environment = {"GATEWAY_API_KEYS_FILE": str(callers.file.path), "GATEWAY_TENANTS": json.dumps(TENANTS)}
    process = stack.add("gateway", environment)
    await process.start()
    await process.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(process.name)) as channel:
        callers.channel = channel
        yield callers
    await process.terminate()


async def test_a_batch_is_of_its_tenant_and_user(callers: Callers) -> None:
    owner = callers.of("globex")
    batch = await new_batch(owner, lines_of(2, model="docstrings"), "bob")
    created = await owner.create(batch)
    assert created.batch_id.startswith("llmbatch--globex-")
    for other in (callers.of("acme"), callers.of("globex", "alice")):
        for call in (other.get(created.batch_id), other.cancel(created.batch_id), other.results(created.batch_id)):
            assert await refusal(call) == ("NOT_FOUND", "BATCH_NOT_FOUND")
    # Its file is another tenant's.
    assert await refusal(callers.of("acme").create(batch)) == ("NOT_FOUND", "FILE_NOT_FOUND")
    assert await refusal(callers.of("globex", "alice").create(batch)) == ("PERMISSION_DENIED", "USER_NOT_ALLOWED")
    status = await owner.end(created.batch_id)
    assert status.counts.succeeded == 2, status
    assert len(await owner.read(status.output)) == 2
    page = await callers.of("acme").batches.ListBatches(batch_pb2.ListBatchesRequest(), timeout=PATIENCE)
    assert created.batch_id not in [found.batch_id for found in page.batches]


async def test_a_batch_of_another_users_file_runs(callers: Callers) -> None:
    owner = callers.of("globex")
    batch = await new_batch(owner, lines_of(1, model="docstrings"), "carol")
    batch.user_id = "dave"
    assert (await owner.end((await owner.create(batch)).batch_id)).state == batch_pb2.BATCH_STATE_SUCCEEDED


async def test_scopes_say_what_a_caller_may_do(callers: Callers) -> None:
    batch = await new_batch(callers.of("globex"), lines_of(1), "bob")
    denied = ("PERMISSION_DENIED", "MISSING_SCOPE")
    assert await refusal(callers.of("globex", scopes=SCOPED[0]).create(batch)) == denied
    assert await refusal(callers.of("globex", scopes=SCOPED[1]).create(batch)) == denied
    assert await refusal(callers.of("globex", scopes=SCOPED[2]).cancel("llmbatch--globex-bob-x")) == denied
    lines = lines_of(4, model="structured")
    lines[2]["params"] = {"regex": "a+"}
    few = callers.of("globex", scopes=SCOPED[2])
    status = await few.end((await create(few, lines, "bob")).batch_id)
    violations = unpack(status.error)["BadRequest"].field_violations
    assert [violation.field for violation in violations] == ["lines[2]"]
    assert "jobs:structured" in violations[0].description


async def test_a_batch_is_one_open_job_of_the_quota(callers: Callers) -> None:
    acme = callers.of("acme")
    open_ones = [await create(acme, lines_of(3), "bob") for _ in range(2)]
    batch = await new_batch(acme, lines_of(3), "bob")
    assert await refusal(acme.create(batch)) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
    # A repeat needs no slot.
    for one in open_ones:
        await acme.cancel(one.batch_id)
        await acme.end(one.batch_id)
    created = await acme.create(batch)
    await acme.cancel(created.batch_id)
    await acme.end(created.batch_id)
