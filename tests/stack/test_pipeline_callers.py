"""Pipelines of tenants: each has its own, within its quota, and with what its credential may do."""

import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from deploy.local.stack import Stack
from llm_pb import common_pb2, llm_pb2, pipeline_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from runtime.scopes import SCOPES
from tests.support.credentials import CallsAs, KeyFile
from tests.support.files import PATIENCE, refusal
from tests.support.jobs import details_of
from tests.support.pipelines import WITH_PIPELINES, answer, cancel, follow, get, new_pipeline, submit

TENANTS: dict[str, dict[str, Any]] = {"acme": {"max_open_jobs": 1}, "globex": {}}
NOT_FOUND = ("NOT_FOUND", "PIPELINE_NOT_FOUND")
DENIED = ("PERMISSION_DENIED", "MISSING_SCOPE")


class Callers:
    """The stubs of callers with keys of their own, at one gateway."""

    def __init__(self, folder: Path) -> None:
        self.file = KeyFile(folder / "keys.json")
        self._keys = {
            (tenant, user, scopes): self.file.add(scopes, tenant=tenant, user_id=user)
            for tenant, user, scopes in (
                ("acme", "", SCOPES),
                ("globex", "", SCOPES),
                ("globex", "alice", SCOPES),
                ("globex", "", frozenset({"jobs:read"})),
                ("globex", "alice", frozenset({"jobs:submit"})),
            )
        }
        self.channel: grpc.aio.Channel

    def of(self, tenant: str, user_id: str = "", scopes: Iterable[str] = SCOPES) -> Any:
        stub: Any = PipelineServiceStub(self.channel)
        return CallsAs(stub, self._keys[tenant, user_id, frozenset(scopes)])

    def jobs_of(self, tenant: str) -> Any:
        stub: Any = LlmServiceStub(self.channel)
        return CallsAs(stub, self._keys[tenant, "", SCOPES])


@pytest.fixture(scope="module")
async def callers(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Callers]:
    callers = Callers(tmp_path_factory.mktemp("keys"))
    environment = {
        "GATEWAY_API_KEYS_FILE": str(callers.file.path),
        "GATEWAY_TENANTS": json.dumps(TENANTS),
        "PYTHONPATH": WITH_PIPELINES["gateway"]["PYTHONPATH"],
    }
    process = stack.add("gateway", environment)
    await process.start()
    await process.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(process.name)) as channel:
        callers.channel = channel
        yield callers
    await process.terminate()


async def test_a_pipeline_and_its_jobs_are_of_its_tenant_and_user(callers: Callers) -> None:
    owner = callers.of("globex")
    pipeline = new_pipeline("essay", StringValue(value="fog"), user_id="bob")
    id_ = (await submit(owner, pipeline)).pipeline_id
    assert id_.startswith("llmpipe--globex-bob-")
    for other in (callers.of("acme"), callers.of("globex", "alice")):
        for call in (get(other, id_), cancel(other, id_), answer(other, id_, "x", "a", approved=True)):
            assert await refusal(call) == NOT_FOUND
        request = pipeline_pb2.StreamPipelineRequest(pipeline_id=id_)
        assert await refusal(anext(aiter(other.StreamPipeline(request, timeout=PATIENCE)))) == NOT_FOUND
    assert await refusal(submit(callers.of("globex", "alice"), pipeline)) == ("PERMISSION_DENIED", "USER_NOT_ALLOWED")
    seen = await follow(owner, id_, "**")
    assert seen.status.state == llm_pb2.JOB_STATE_SUCCEEDED
    asked = llm_pb2.GetStatusRequest(workflow_id=f"{id_}/outline")
    assert (await callers.jobs_of("globex").GetStatus(asked, timeout=PATIENCE)).result.output
    assert await refusal(callers.jobs_of("acme").GetStatus(asked, timeout=PATIENCE)) == ("NOT_FOUND", "JOB_NOT_FOUND")
    listing = pipeline_pb2.ListPipelinesRequest()
    listed = {
        tenant: [status.pipeline_id for status in page.pipelines]
        for tenant in TENANTS
        if (page := await callers.of(tenant).ListPipelines(listing, timeout=PATIENCE))
    }
    assert id_ in listed["globex"]
    assert id_ not in listed["acme"]


async def test_scopes_say_what_a_caller_may_do(callers: Callers) -> None:
    reader = callers.of("globex", scopes={"jobs:read"})
    for call in (
        submit(reader, new_pipeline("essay")),
        cancel(reader, "llmpipe--globex-bob-x"),
        answer(reader, "llmpipe--globex-bob-x", "x", "a", approved=True),
    ):
        assert await refusal(call) == DENIED
    assert await refusal(get(reader, "llmpipe--globex-bob-x")) == NOT_FOUND
    bound = callers.of("globex", "alice", {"jobs:submit"})
    urgent = new_pipeline("essay", user_id="alice", job_class=common_pb2.JOB_CLASS_HIGH)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await submit(bound, urgent)
    named = details_of(error.value)["ErrorInfo"]
    assert (named.reason, dict(named.metadata)) == (DENIED[1], {"scope": "jobs:priority", "user_id": "alice"})


async def test_a_pipeline_is_one_open_job_of_the_quota(callers: Callers) -> None:
    acme = callers.of("acme")
    first = new_pipeline("fan", Int32Value(value=3), user_id="bob")
    id_ = (await submit(acme, first)).pipeline_id
    # Its three jobs run although the tenant may have one.
    await follow(acme, id_, "**", until=lambda seen: len(seen.outputs) == 3)
    more = new_pipeline("essay", StringValue(value="x"), user_id="bob")
    assert await refusal(submit(acme, more)) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
    # A repeat needs no slot.
    assert (await submit(acme, first)).pipeline_id == id_
    await cancel(acme, id_)
    await follow(acme, id_)
    seen = await follow(acme, (await submit(acme, more)).pipeline_id)
    assert seen.status.state == llm_pb2.JOB_STATE_SUCCEEDED
