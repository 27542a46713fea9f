"""Deletions where Temporal holds hashes and ciphertexts: who may see them, and jobs whose keys were deleted."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from temporalio.client import Client

from deploy.local.stack import Stack
from encryption import is_hash
from jobs import names
from jobs.ids import deletion_workflow_id
from llm_pb import llm_pb2
from payload_converter import data_converter
from runtime.scopes import SCOPES
from tests.stack.test_encrypted_tenants import Tenant, installation, until_known
from tests.stack.test_encryption import LONG, restart, running
from tests.support.credentials import CallsAs, KeyFile
from tests.support.deletions import PATIENCE, delete, until_ended
from tests.support.encryption import Keys
from tests.support.jobs import new_job, run_job, until_output

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
async def hashed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Stack, Tenant]]:
    async with installation(tmp_path_factory.mktemp("hashed")) as (stack, _, tenants):
        yield stack, tenants["acme"]


async def ended(tenant: Tenant, user_id: str) -> str:
    """Run a job of a user and return its id."""
    done = await run_job(tenant.stub, new_job("x", user_id=user_id, params={"max_tokens": 3}))
    return done.final.status.workflow_id


async def user_attribute_of(stack: Stack, id_: str) -> Any:
    client = await Client.connect(stack.address("temporal"), data_converter=data_converter)
    return (await client.get_workflow_handle(id_).describe()).typed_search_attributes.get(names.USER_ID)


async def assert_unknown_to(stub: Any, deletion_id: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.GetDeletion(llm_pb2.GetDeletionRequest(deletion_id=deletion_id), timeout=PATIENCE)
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


async def test_a_key_of_one_user_sees_this_users_deletions_by_their_hash(hashed: tuple[Stack, Tenant]) -> None:
    stack, acme = hashed
    mine, others = await ended(acme, "alice"), await ended(acme, "bob")
    done = await delete(acme.alice, mine)
    assert done.state == llm_pb2.DELETION_STATE_DONE
    assert (await delete(acme.alice, mine)) == done
    assert is_hash(await user_attribute_of(stack, done.deletion_id))
    await assert_unknown_to(acme.alice, (await delete(acme.stub, others)).deletion_id)


async def test_a_deletion_of_many_gives_no_user_away(hashed: tuple[Stack, Tenant]) -> None:
    """Neither do the deletions of each of them. The user's own credential sees all."""
    stack, acme = hashed
    job = await ended(acme, "alice")
    request = llm_pb2.DeleteJobsRequest(user_id="alice")
    started = (await acme.alice.DeleteJobs(request, timeout=PATIENCE)).deletion
    done = await until_ended(acme.alice, started.deletion_id)
    assert (done.state, done.deleted_jobs) == (llm_pb2.DELETION_STATE_DONE, 1)
    for id_ in (started.deletion_id, deletion_workflow_id(job)):
        assert is_hash(await user_attribute_of(stack, id_))
    own = await until_ended(acme.alice, deletion_workflow_id(job))
    assert own.state == llm_pb2.DELETION_STATE_DONE


async def test_jobs_whose_keys_were_deleted_are_deleted(tmp_path: Path) -> None:
    """One by one, all of a user, and by a filter for their state, which is read without the keys. One is open."""
    keys, file = Keys(tmp_path), KeyFile(tmp_path / "keys.json")
    services = keys.for_services()
    services["gateway"] |= {"GATEWAY_API_KEYS_FILE": str(file.path), "GATEWAY_DELETE_GRACE": "PT2S"}
    async with running(tmp_path / "stack", services) as (stack, stub):
        calls = CallsAs(stub, file.add(SCOPES, "", tenant="acme"))
        acme = Tenant("acme", calls, calls)
        await until_known(acme)
        jobs = {user: [await ended(acme, user), await ended(acme, user)] for user in ("carol", "dave")}
        open_ = await acme.submit("x", user_id="carol", params=LONG)
        await until_output(acme.stub, open_)
        keys.store.delete("acme")
        # A gateway that has workflows in memory would go on with what it has decrypted.
        await restart(stack, "gateway")
        one = await delete(acme.stub, jobs["carol"][0])
        assert one.state == llm_pb2.DELETION_STATE_DONE
        assert {copy.place for copy in one.unreached} >= {"targets", "logs"}
        for user, count in (("carol", 1), ("dave", 2)):
            filters: dict[str, Any] = {"states": [llm_pb2.JOB_STATE_SUCCEEDED]} if user == "carol" else {}
            request = llm_pb2.DeleteJobsRequest(user_id=user, **filters)
            started = (await acme.stub.DeleteJobs(request, timeout=PATIENCE)).deletion
            many = await until_ended(acme.stub, started.deletion_id)
            assert (many.state, many.deleted_jobs) == (llm_pb2.DELETION_STATE_DONE, count)
        assert (await delete(acme.stub, open_)).state == llm_pb2.DELETION_STATE_DONE
        async with asyncio.timeout(PATIENCE):
            while (await acme.stub.List(llm_pb2.ListRequest(), timeout=PATIENCE)).jobs:  # noqa: ASYNC110
                await asyncio.sleep(0.2)
