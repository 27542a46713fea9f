"""One run of the stack with jobs of every kind, and its results: spans, logs, webhooks and histories."""

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from temporalio.client import Client

from deploy.local.stack import Stack
from jobs.ids import delivery_workflow_id
from jobs.names import DELIVERY_WORKFLOW_TYPE, JOB_WORKFLOW_TYPE
from llm_pb import batch_pb2, llm_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from payload_converter import data_converter
from tests.support.batches import Stubs, lines_of, new_batch
from tests.support.files import PATIENCE
from tests.support.jobs import Seen, new_job, until_output, watch, webhook
from tests.support.otlp import Caller, Collector, Span, Spans
from tests.support.receivers import Receiver, Request, hang, receiving, status
from tests.support.stacks import FAST, stack_settings

MANY = 100
BATCH_LINES = 40
MARKER = "xyzzy"
"""Text that is in every prompt and nowhere else."""
SECRET = "hush-hush"
"""Text in the URLs of the feed and of the webhooks."""
CAPTURING = {
    "GPU_WORKER_MODEL": "idle",
    "GPU_WORKER_TASK_QUEUE": "llm-gpu-activities.idle",
    "GPU_WORKER_CAPTURE_CONTENT": "true",
}
SERVICES = ("gateway", "gateway-2", "gpu-worker", "gpu-worker-2", "notifier")
IMPATIENT = {"GATEWAY_ROLE": "api", "GATEWAY_NOTIFY_HOLD": "PT6S", "GATEWAY_NOTIFY_MAX_DURATION": "PT60S"}
"""Settings of a second gateway. Its jobs do not wait for a Retry-After of over three quarters of NOTIFY_HOLD."""
FEW = {"max_tokens": 2}
LONG = {"max_tokens": 4000}


@dataclass
class Job:
    """A job, its caller, and what the caller received."""

    submit: Caller
    response: llm_pb2.SubmitResponse
    trailing: dict[str, str]
    seen: Seen = field(default_factory=Seen)

    @property
    def id(self) -> str:
        return self.response.workflow_id


class CallingClient:
    """Client of the gateway that begins a new trace for each call."""

    def __init__(self, stub: LlmServiceStub) -> None:
        self.stub = stub
        self.calls: dict[str, Caller] = {}
        """Callers by the test's name for the call."""

    async def submit(self, job: llm_pb2.JobRequest, *, fresh: bool = True) -> Job:
        """Submit the job. On a busy machine Temporal may not answer in time, and the call is then repeated.

        With `fresh` the repeat is of another job, which `job` then is: its trace holds nothing of the first call.
        """
        while True:
            caller = Caller()
            call = self.stub.Submit(llm_pb2.SubmitRequest(job=job), metadata=caller.metadata)
            try:
                response = await call
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise
                job.request_id += "-again" * fresh
            else:
                return Job(caller, response, dict(await call.trailing_metadata()))

    async def run(self, prompt: str = "", **changes: object) -> Job:
        job = await self.submit(new_job(f"{MARKER} {prompt}", **changes))
        job.seen = await watch(self.stub, job.id)
        return job

    def calling(self, name: str) -> tuple[tuple[str, str], ...]:
        """Return the metadata for a call, and store its caller under the name."""
        self.calls[name] = Caller()
        return self.calls[name].metadata


@dataclass
class Traced:
    """Results of the run."""

    spans: Spans
    jobs: dict[str, Job]
    many: list[Job]
    calls: dict[str, Caller]
    webhooks: list[Request]
    requests: dict[str, list[Request]]
    """Requests to the receiver that is unavailable at first, by path."""
    histories: dict[str, str]
    """Histories of a job's workflow and of a delivery workflow, by workflow type."""
    again: Job
    batch: Caller
    """The caller of a CreateBatch."""
    logs: dict[str, str]
    """The whole log of each process, by its name."""

    def tree(self, name: str) -> list[str]:
        """Return the whole trace of a job."""
        return self.spans.tree(self.jobs[name].submit, words)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the services' log lines about a job in order of time."""
        lines = [json.loads(line) for kind in SERVICES for line in self.logs[kind].splitlines()]
        return sorted(
            (line for line in lines if line.get("workflow_id") == self.jobs[name].id), key=lambda line: line["time"]
        )

    def call(self, name: str) -> list[str]:
        """Return the whole trace of a later call."""
        return self.spans.tree(self.calls[name], words)


def words(span: Span) -> str:
    """Return the attributes of a span that the tests compare, as text."""
    about = span.attributes
    parts = []
    if code := about.get("rpc.response.status_code"):
        parts.append(code)
    if answered := about.get("http.response.status_code"):
        parts.append(str(answered))
    if attempt := about.get("llm.job.attempt"):
        parts.append(f"attempt {attempt}")
    parts += about.get("gen_ai.response.finish_reasons", [])
    if reason := about.get("llm.job.finish_reason"):
        parts.append(reason)
    if span.failed or "error.type" in about:
        parts.append(f"{'ERROR' if span.failed else 'not an error:'} {about.get('error.type', '')}".rstrip())
    parts += ["linked"] * len(span.links)
    return f" ({', '.join(parts)})" if parts else ""


async def run_everything(folder: Path, receiver: Receiver) -> Traced:
    """Run jobs of every kind, then stop all processes, which export their last spans."""
    kinds = ("temporal", "nats", "gateway", "gpu-worker", "notifier")
    async with Collector() as collector:
        environment = {kind: {**FAST.get(kind, {}), **collector.environment} for kind in kinds}
        # A long hold keeps every delivery in its job's own workflow, even on a busy machine.
        environment["gateway"] |= {"GATEWAY_NOTIFY_HOLD": "PT60S", "GATEWAY_NOTIFY_TIMEOUT": "PT30S"}
        stack = Stack(stack_settings(folder), only=kinds, environment=environment)
        stack.add("gpu-worker", CAPTURING)
        stack.add("gateway", IMPATIENT)
        for process in stack.processes.values():
            process.environment["FEED_URL"] = f"nats://someone:{SECRET}@{stack.address('nats')}"
        async with (
            stack,
            grpc.aio.insecure_channel(stack.address("gateway")) as channel,
            grpc.aio.insecure_channel(stack.address("gateway-2")) as impatient_channel,
            receiving() as unavailable,
        ):
            client, jobs = CallingClient(LlmServiceStub(channel)), {}
            impatient = CallingClient(LlmServiceStub(impatient_channel))
            targets = webhook(unavailable.on("/left", status(503, retry_after="5"), status(200)))
            jobs["left"] = await impatient.run(params=FEW, notify=targets)
            targets = webhook(unavailable.on("/again", status(503), status(200)))
            jobs["notified again"] = await client.run(params=FEW, notify=targets)
            targets = webhook(unavailable.on("/hung", hang, status(200)))
            jobs["not answered"] = await client.run(params=FEW, notify=targets)
            jobs["killed"], jobs["stopped"] = await interrupted(stack, client, "kill", "terminate")
            jobs |= await all_kinds(client, receiver)
            batch = await batched(channel)
            many = await asyncio.gather(*(client.run(params={"max_tokens": 20 + n}) for n in range(MANY)))
            again = await later_calls(client, jobs["succeeded"], jobs["cancelled"])
            temporal = await Client.connect(stack.address("temporal"), data_converter=data_converter)
            await redelivered(client, temporal, jobs["left"])
            requests = {path: await unavailable.received(path, count) for path, count in (("/left", 3), ("/again", 2))}
            histories = {
                kind: (await temporal.get_workflow_handle(id_).fetch_history()).to_json()
                for kind, id_ in (
                    (JOB_WORKFLOW_TYPE, jobs["retried"].id),
                    (DELIVERY_WORKFLOW_TYPE, delivery_workflow_id(jobs["left"].id)),
                )
            }
            webhooks = await receiver.received("/traced")
        logs = {name: process.log_path.read_text() for name, process in stack.processes.items()}
        return Traced(collector.spans, jobs, many, client.calls, webhooks, requests, histories, again, batch, logs)


async def interrupted(stack: Stack, client: CallingClient, *ways: str) -> list[Job]:
    """Run one job for each way, one after the other, and end its worker in that way in the middle."""
    jobs = []
    for way in ways:
        job = await client.submit(new_job(MARKER, params={"max_tokens": 400}))
        await until_output(client.stub, job.id)
        worker = stack.processes["gpu-worker"]
        await getattr(worker, way)()
        await worker.start()
        job.seen = await watch(client.stub, job.id)
        jobs.append(job)
    return jobs


async def all_kinds(client: CallingClient, receiver: Receiver) -> dict[str, Job]:
    async def cancelled() -> Job:
        job = await client.submit(new_job(MARKER, params=LONG))
        await until_output(client.stub, job.id)
        request = llm_pb2.CancelRequest(workflow_id=job.id, reason="enough")
        await client.stub.Cancel(request, metadata=client.calling("cancel"))
        job.seen = await watch(client.stub, job.id)
        return job

    refused = receiver.on("/refused", status(410))
    kinds = {
        "succeeded": client.run(params={"max_tokens": 20}, notify=webhook(f"{receiver.url}/traced?token={SECRET}")),
        "retried": client.run("[[fault:failed@3:once]]", params={"max_tokens": 20}),
        "failed": client.run("[[fault:oom@3]]", params={"max_tokens": 20}),
        "cancelled": cancelled(),
        "captured": client.run(model="idle", params={"max_tokens": 20}),
        "refused": client.run(params={"max_tokens": 2}, notify=webhook(f"{refused}?token={SECRET}")),
    }
    return dict(zip(kinds, await asyncio.gather(*kinds.values()), strict=True))


async def batched(channel: grpc.aio.Channel) -> Caller:
    """Run a batch to its end, and return who created it."""
    stubs, caller = Stubs(FileServiceStub(channel), BatchServiceStub(channel)), Caller()
    lines = [{**line, "params": FEW} if "prompt" in line else line for line in lines_of(BATCH_LINES, "docstrings")]
    request = batch_pb2.CreateBatchRequest(batch=await new_batch(stubs, lines))
    created = await stubs.batches.CreateBatch(request, metadata=caller.metadata, timeout=PATIENCE)
    await stubs.end(created.status.batch_id)
    return caller


async def redelivered(client: CallingClient, temporal: Client, job: Job) -> None:
    """Redeliver the outcome of a job whose deliveries continued in a delivery workflow."""
    delivering = temporal.get_workflow_handle(delivery_workflow_id(job.id))
    await delivering.result()
    again = llm_pb2.RedeliverRequest(workflow_id=job.id)
    await client.stub.Redeliver(again, metadata=client.calling("redeliver"))
    await delivering.result()
    log = llm_pb2.ListDeliveriesRequest(workflow_id=job.id)
    await client.stub.ListDeliveries(log, metadata=client.calling("deliveries"))


async def later_calls(client: CallingClient, job: Job, cancelled: Job) -> Job:
    """Make calls after a job's end, and return the answer to a repeated Submit."""
    stub = client.stub
    stream = llm_pb2.StreamStatusRequest(workflow_id=job.id)
    async for _ in stub.StreamStatus(stream, metadata=client.calling("stream")):
        pass
    await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=job.id), metadata=client.calling("status"))
    await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=cancelled.id), metadata=client.calling("partial"))
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id="llmjob-no-1"), metadata=client.calling("not found"))
    listing = llm_pb2.ListRequest(model="docstrings", page_size=5)
    await stub.List(listing, metadata=client.calling("list"))
    first = new_job(MARKER, params={"max_tokens": 2})
    await client.submit(first)
    return await client.submit(first, fresh=False)
