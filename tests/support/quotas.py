"""Gateways whose tenants have quotas, and calls as these tenants make them."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2
from temporalio.client import Client

from deploy.local.process import Process
from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from runtime.scopes import SCOPES
from tests.support.credentials import CallsAs, KeyFile
from tests.support.jobs import details_of, new_job

PATIENCE = 120
"""Seconds that a busy machine has for anything."""


@dataclass
class TenantGateway:
    """A gateway of its own for tenants."""

    process: Process
    stub: LlmServiceStub
    keys: Mapping[str, str]
    """The key of each tenant."""
    files: Any
    batches: Any
    pipelines: Any

    def of(self, tenant: str) -> Any:
        """Return a stub whose calls are the tenant's."""
        return CallsAs(self.stub, self.keys[tenant])

    async def used(self, tenant: str) -> int:
        """Return the number of the tenant's open jobs."""
        response: llm_pb2.GetQuotaResponse = await self.of(tenant).GetQuota(llm_pb2.GetQuotaRequest())
        return response.open_jobs.used


class Installation:
    """The keys of some tenants, and gateways that know them."""

    def __init__(self, stack: Stack, folder: Path, tenants: Mapping[str, Mapping[str, Any]]) -> None:
        """`tenants` is the setting GATEWAY_TENANTS."""
        self.stack = stack
        self.tenants = tenants
        self._file = KeyFile(folder / "keys.json")
        self.keys = {tenant: self._file.add(SCOPES, tenant=tenant) for tenant in ("", *tenants)}

    def environment(self, **changes: str) -> dict[str, str]:
        """Return the environment of a gateway."""
        return {
            "GATEWAY_ROLE": "all",
            "GATEWAY_API_KEYS_FILE": str(self._file.path),
            "GATEWAY_TENANTS": json.dumps({name: dict(quotas) for name, quotas in self.tenants.items()}),
            **changes,
        }

    @asynccontextmanager
    async def gateway(self, **changes: str) -> AsyncIterator[TenantGateway]:
        """Run a gateway more. It may have died when the context ends."""
        process = self.stack.add("gateway", self.environment(**changes))
        await process.start()
        await process.wait_ready()
        async with grpc.aio.insecure_channel(self.stack.address(process.name)) as channel:
            yield TenantGateway(
                process,
                LlmServiceStub(channel),
                self.keys,
                FileServiceStub(channel),  # type: ignore[no-untyped-call]
                BatchServiceStub(channel),  # type: ignore[no-untyped-call]
                PipelineServiceStub(channel),  # type: ignore[no-untyped-call]
            )
        if process.running:
            await process.terminate()

    @asynccontextmanager
    async def gateways(self, number: int) -> AsyncIterator[list[TenantGateway]]:
        """Run some gateways."""
        async with AsyncExitStack() as opened:
            yield [await opened.enter_async_context(self.gateway()) for _ in range(number)]


def queued_job(**changes: Any) -> llm_pb2.JobRequest:
    """Return a job that stays open: its model has no worker."""
    return new_job(model="idle", **changes)


async def submit(stub: Any, job: llm_pb2.JobRequest) -> llm_pb2.SubmitResponse | grpc.aio.AioRpcError:
    """Submit a job; return the answer, or what the call failed with."""
    try:
        response: llm_pb2.SubmitResponse = await stub.Submit(llm_pb2.SubmitRequest(job=job), timeout=PATIENCE)
    except grpc.aio.AioRpcError as error:
        return error
    return response


async def answered(stub: Any, job: llm_pb2.JobRequest) -> llm_pb2.SubmitResponse | grpc.aio.AioRpcError:
    """Submit a job, again while Temporal does not answer; return the answer, or what the call failed with."""
    async with asyncio.timeout(PATIENCE):
        while True:
            answer = await submit(stub, job)
            if not isinstance(answer, grpc.aio.AioRpcError) or reason_of(answer) != "TEMPORAL_UNAVAILABLE":
                return answer


async def race(stubs: Sequence[Any], jobs: Iterable[llm_pb2.JobRequest]) -> list[str]:
    """Submit all jobs at once, at the gateways in turns; return the ids of those that were accepted.

    The others must have met the quota.
    """
    answers = await asyncio.gather(*(answered(stubs[n % len(stubs)], job) for n, job in enumerate(jobs)))
    refused = Counter(reason_of(answer) for answer in answers if isinstance(answer, grpc.aio.AioRpcError))
    assert set(refused) <= {"QUOTA_EXCEEDED"}, refused
    return [answer.workflow_id for answer in answers if isinstance(answer, llm_pb2.SubmitResponse)]


async def until_accepted(stub: Any, job: llm_pb2.JobRequest) -> str:
    """Submit a job until it is accepted; return its id. Until then the quota must be what refuses it."""
    async with asyncio.timeout(PATIENCE):
        while isinstance(answer := await submit(stub, job), grpc.aio.AioRpcError):
            assert reason_of(answer) == "QUOTA_EXCEEDED", answer
            await asyncio.sleep(0.1)
    return answer.workflow_id


async def is_refused(stub: Any) -> bool:
    """Return whether one more job is beyond the quota."""
    answer = await submit(stub, queued_job())
    return isinstance(answer, grpc.aio.AioRpcError) and reason_of(answer) == "QUOTA_EXCEEDED"


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """Return the reason of a failed call."""
    info: error_details_pb2.ErrorInfo = details_of(error)["ErrorInfo"]
    return info.reason


async def end(temporal: Client, stub: Any, ids: Iterable[str]) -> None:
    """Cancel jobs; return once they have ended."""

    async def end_one(id_: str) -> None:
        async with limit:
            await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_), timeout=PATIENCE)
        await closed(temporal, id_)

    limit = asyncio.Semaphore(20)
    await asyncio.gather(*map(end_one, ids))


async def closed(temporal: Client, id_: str) -> None:
    """Return once a workflow has closed, however."""
    async for _ in temporal.get_workflow_handle(id_).fetch_history_events(wait_new_event=True):
        pass
