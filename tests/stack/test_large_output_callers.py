"""Large outputs and prompt files of tenants: whoever may see a job may see its output, and nobody else."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from services.gateway import scopes
from tests.support.credentials import CallsAs, KeyFile
from tests.support.files import delete, download, get, new_file, upload
from tests.support.jobs import details_of, new_job, run_job

ALL = sorted(scopes.SCOPES)


class Callers:
    """Callers with keys of their own, at one gateway."""

    def __init__(self, file: KeyFile) -> None:
        self._keys = {
            "acme": file.add(ALL, tenant="acme"),
            "globex": file.add(ALL, tenant="globex"),
            "alice": file.add(ALL, tenant="acme", user_id="alice"),
            "bob": file.add(ALL, tenant="acme", user_id="bob"),
            "jobs": file.add(["jobs:*"], tenant="acme"),
        }
        self.channel: grpc.aio.Channel

    def jobs(self, name: str) -> Any:
        stub: Any = LlmServiceStub(self.channel)
        return CallsAs(stub, self._keys[name])

    def files(self, name: str) -> Any:
        stub: Any = FileServiceStub(self.channel)
        return CallsAs(stub, self._keys[name])


@pytest.fixture(scope="module")
async def callers(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Callers]:
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")
    callers = Callers(file)
    process = stack.add("gateway", {"GATEWAY_API_KEYS_FILE": str(file.path)})
    await process.start()
    await process.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(process.name)) as channel:
        callers.channel = channel
        yield callers
    await process.terminate()


async def code_of(call: Any) -> tuple[str, str]:
    """Return the code and the reason with which a call fails."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code().name, details_of(error.value)["ErrorInfo"].reason


async def test_an_output_is_of_those_who_may_see_its_job(callers: Callers) -> None:
    params = llm_pb2.SamplingParams(max_tokens=300, seed=7)
    seen = await run_job(callers.jobs("alice"), new_job("[[wide]]", user_id="alice", params=params))
    file_id = seen.final.result.output_file.file_id
    assert file_id.startswith("output-")
    for name in ("alice", "acme"):
        assert await download(callers.files(name), file_id) == seen.output
        assert (await get(callers.files(name), file_id)).user_id == "alice"
    for name in ("bob", "globex"):
        for call in (get, download, delete):
            assert await code_of(call(callers.files(name), file_id)) == ("NOT_FOUND", "FILE_NOT_FOUND")
    assert await code_of(download(callers.files("jobs"), file_id)) == ("PERMISSION_DENIED", "MISSING_SCOPE")


async def test_a_prompt_file_is_one_that_the_caller_may_see(callers: Callers) -> None:
    ref = (await upload(callers.files("alice"), new_file(file={"user_id": "alice"}), b"Say something.")).ref
    job = new_job(params={"max_tokens": 5}, user_id="alice")
    job.ClearField("prompt")
    job.prompt_file.CopyFrom(ref)
    assert (await run_job(callers.jobs("alice"), job)).final.status.state == llm_pb2.JOB_STATE_SUCCEEDED
    for name, user in (("bob", "bob"), ("globex", "alice")):
        job.user_id, job.request_id = user, f"of-{name}"
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await callers.jobs(name).Submit(llm_pb2.SubmitRequest(job=job), timeout=60)
        (violation,) = details_of(error.value)["BadRequest"].field_violations
        assert violation.field == "job.prompt_file.file_id"
        assert "alice" not in violation.description
    submit = callers.jobs("jobs").Submit(llm_pb2.SubmitRequest(job=job), timeout=60)
    assert await code_of(submit) == ("PERMISSION_DENIED", "MISSING_SCOPE")
