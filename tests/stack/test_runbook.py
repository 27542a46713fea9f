"""Every command of docs/runbook.md works in the situation that it is for, and shows it.

A block of the page names its situation. Here it is produced with real processes, the block runs as it stands but for
addresses, and what it prints is what the section speaks of.
"""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from deploy.local.process_specs import METRICS, OPTIONAL
from deploy.local.settings import StackSettings
from deploy.local.stack import Stack
from llm_pb import batch_pb2, llm_pb2, pipeline_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from runtime.scopes import SCOPES
from tests.support import batches, files, pipelines
from tests.support.blocks import Block, blocks
from tests.support.commands import run
from tests.support.credentials import CallsAs, KeyFile, id_of
from tests.support.jobs import new_job, run_job, until_output, watch, webhook
from tests.support.lists import until_lists_are_refused
from tests.support.paths import ROOT
from tests.support.pipelines import WITH_PIPELINES
from tests.support.quotas import is_refused, queued_job
from tests.support.receivers import Receiver, status
from tests.support.scrapes import get
from tests.support.stacks import stack_settings

BLOCKS = [block for block in blocks() if block.place.startswith("docs/runbook.md")]
PATIENCE = 120
VERSION = {"TEMPORAL_DEPLOYMENT_NAME": "durable-llm"}
COMMAND = ("worker", "deployment", "set-current-version")
LONG = {"max_tokens": 1500, "min_tokens": 1500}
"""Parameters of a job that takes seconds."""


class Situation(NamedTuple):
    """What the blocks of a situation are run with, and what they have to print."""

    variables: Mapping[str, str]
    shown: tuple[str, ...]
    """Patterns, one or more for each block."""


@dataclass
class Site:
    """An installation with callers that are known, and a tenant with quotas."""

    stack: Stack
    folder: Path
    keys: KeyFile
    operator: str
    tenant: str
    receiver: Receiver
    channel: grpc.aio.Channel

    def as_(self, stub: Any, key: str = "") -> Any:
        """Return a stub of the gateway that calls as the operator, or with a key."""
        return CallsAs(stub(self.channel), key or self.operator)

    @property
    def jobs(self) -> Any:
        return self.as_(LlmServiceStub)

    async def submit(self, job: llm_pb2.JobRequest) -> str:
        response: llm_pb2.SubmitResponse = await self.jobs.Submit(llm_pb2.SubmitRequest(job=job), timeout=PATIENCE)
        return response.workflow_id

    async def running_job(self) -> str:
        """Return the id of a job that has begun, and takes seconds."""
        id_ = await self.submit(new_job(params=LONG))
        await until_output(self.jobs, id_)
        return id_

    async def until_workers(self, count: int) -> None:
        """Return once so many workers are listed."""

        async def listed() -> bool:
            try:
                answer = await self.jobs.ListWorkers(llm_pb2.ListWorkersRequest())
            except grpc.aio.AioRpcError:
                # No gateway lists workers without NATS.
                return False
            else:
                return len(answer.workers) == count

        await until(listed)

    async def until_ready_says(self, name: str, member: str, part: str) -> None:
        """Return once a process says of a part that it is `missing` or `degraded`."""

        async def said() -> bool:
            url = self.stack.metrics_url(name).replace("/metrics", "/readyz")
            answer = (await run("curl", "--silent", "--max-time", "5", url)).output
            return bool(answer) and part in json.loads(answer)[member]

        await until(said)

    async def until_metrics_show(self, name: str, text: str) -> None:
        """Return once the metrics of a process hold a text."""

        async def shown() -> bool:
            return text in await get(self.stack.metrics_url(name))

        await until(shown)

    async def start_again(self, name: str) -> None:
        await self.stack.processes[name].start()
        await self.stack.processes[name].wait_ready()

    async def run(self, block: Block, variables: Mapping[str, str]) -> str:
        """Run a block in the repository's root, and return what it prints."""
        text = block.text.replace(".stack", str(self.stack.state_dir))
        for port, address in addresses(self.stack).items():
            text = text.replace(f"127.0.0.1:{port}", address)
        environment = {
            "LLM_ADDRESS": self.stack.address("gateway"),
            "DURABLE_LLM_API_KEY": self.operator,
            "DURABLE_LLM_CONFIG": str(self.folder / "config.toml"),
            "PATH": f"{self.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            **variables,
        }
        async with asyncio.timeout(PATIENCE):
            ended = await run("bash", "-euo", "pipefail", "-c", text, **environment)
        assert ended.status == 0, f"{block.place}: {ended.output}{ended.errors}"
        assert ended.output, block.place
        return ended.output


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Return once a condition holds."""
    async with asyncio.timeout(PATIENCE):
        while not await condition():  # noqa: ASYNC110  nothing notifies
            await asyncio.sleep(0.1)


def addresses(stack: Stack) -> dict[int, str]:
    """Return the addresses of the stack by the ports of `make up`."""
    ports = {kind: StackSettings.model_fields[f"{kind}_port"].default for kind in ("gateway", "temporal", "http")}
    found = {port: stack.address(kind) for kind, port in ports.items()}
    for kind in METRICS.keys() - OPTIONAL:
        found[StackSettings.model_fields[f"{METRICS[kind]}_port"].default] = stack.metrics_url(kind).split("/")[2]
    return found


@pytest.fixture(scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("runbook")
    program = folder / "durable-llm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m durable_llm "$@"\n')
    program.chmod(0o700)
    keys = KeyFile(folder / "keys.json")
    changes = {
        "gateway": {
            "GATEWAY_API_KEYS_FILE": str(keys.path),
            "GATEWAY_TENANTS": '{"acme": {"max_open_jobs": 1}}',
            "GATEWAY_CANARY": '{"interval": "PT5M", "models": ["docstrings"]}',
            "GATEWAY_OPEN_JOBS_INTERVAL": "PT1S",
            "GATEWAY_HEARTBEAT_TIMEOUT": "PT3S",
        },
        "gpu-worker": {"GPU_WORKER_REPORT_INTERVAL": "PT1S", "GPU_WORKER_SHUTDOWN_GRACE": "PT0S"},
    }
    environment = {kind: {**values, **changes.get(kind, {})} for kind, values in WITH_PIPELINES.items()}
    operator, tenant = keys.add(SCOPES), keys.add(SCOPES, tenant="acme")
    async with (
        Stack(stack_settings(folder / "stack"), environment=environment) as stack,
        grpc.aio.insecure_channel(stack.address("gateway")) as channel,
    ):
        yield Site(stack, folder, keys, operator, tenant, receiver, channel)


@asynccontextmanager
async def all_is_well(site: Site) -> AsyncIterator[Situation]:
    yield Situation({}, (r'"ready": true', "SERVING", r"\bdocstrings\b", "llm_pipeline_open", r"Keyword\b"))


@asynccontextmanager
async def a_canary_runs(site: Site) -> AsyncIterator[Situation]:
    yield Situation({}, (r"llmschedule-llm\.canary-docstrings",))


@asynccontextmanager
async def a_worker_is_killed(site: Site) -> AsyncIterator[Situation]:
    """With a job that waits for one."""
    await site.stack.processes["gpu-worker"].kill()
    id_ = await site.submit(new_job(params={"max_tokens": 1}))
    await site.until_workers(0)
    try:
        yield Situation({}, (r"is down", r"gateway-api|lives", r"activity +[1-9]"))
    finally:
        await site.start_again("gpu-worker")
    assert (await watch(site.jobs, id_)).final.status.state == llm_pb2.JOB_STATE_SUCCEEDED


@asynccontextmanager
async def a_lost_workers_job_goes_on(site: Site) -> AsyncIterator[Situation]:
    id_ = await site.running_job()
    await site.stack.processes["gpu-worker"].kill()
    await site.start_again("gpu-worker")
    await watch(site.jobs, id_)
    await site.until_workers(1)
    yield Situation({"JOB": id_}, (r"attempt +2", "docstrings", r"llm_job_continuations_total\{.*\} [1-9]"))


@asynccontextmanager
async def a_job_has_failed(site: Site) -> AsyncIterator[Situation]:
    job = new_job("[[fault:oom@1]]")
    id_ = await site.submit(job)
    await watch(site.jobs, id_)
    yield Situation({"JOB": id_}, (id_, r"error +.*no memory", 'error_type="OUT_OF_MEMORY"', rf"Failed +{id_}"))


@asynccontextmanager
async def a_receiver_is_gone_and_back(site: Site) -> AsyncIterator[Situation]:
    url = site.receiver.on("/runbook", status(410), status(200))
    seen = await run_job(site.jobs, new_job(params={"max_tokens": 1}, notify=webhook(url)))
    yield Situation({"JOB": seen.final.status.workflow_id}, ("410", 'error_type="DELIVERY_REFUSED"', "activity"))
    await site.receiver.received("/runbook", 2)


@asynccontextmanager
async def the_feed_is_away(site: Site) -> AsyncIterator[Situation]:
    await site.stack.processes["nats"].kill()
    await site.until_ready_says("gateway", "degraded", "feed")
    try:
        yield Situation({}, (r'"ready": true', r'"feed": "is not connected'))
    finally:
        await site.start_again("nats")
        await site.until_workers(1)


@asynccontextmanager
async def temporal_is_away(site: Site) -> AsyncIterator[Situation]:
    await site.stack.processes["temporal"].kill()
    await site.until_ready_says("gateway", "missing", "temporal")
    try:
        yield Situation({}, (r'"ready": false', r'"temporal": "does not answer"', "Temporal does not answer"))
    finally:
        await site.start_again("temporal")
        for name in ("gateway", "gpu-worker", "notifier", "http"):
            await site.stack.processes[name].wait_ready()


@asynccontextmanager
async def lists_are_refused(site: Site) -> AsyncIterator[Situation]:
    await until_lists_are_refused(site.stack.address("temporal"))
    await site.until_metrics_show("temporal", "service_errors_resource_exhausted{")
    yield Situation({}, (r'operation="CountWorkflowExecutions",resource_exhausted_cause="RpsLimit"',))


@asynccontextmanager
async def a_quota_is_full(site: Site) -> AsyncIterator[Situation]:
    stub = site.as_(LlmServiceStub, site.tenant)
    open_ = (await stub.Submit(llm_pb2.SubmitRequest(job=queued_job()), timeout=PATIENCE)).workflow_id
    assert await is_refused(stub)
    full = 'llm_quota_usage_ratio{llm_quota="max_open_jobs",llm_tenant="acme"} 1.0'
    await site.until_metrics_show("gateway", full)
    refused = r'llm_gateway_quota_refusals_total\{llm_quota="max_open_jobs",llm_tenant="acme"\} [1-9]'
    shown = (r"open.*jobs", re.escape(full), refused, "class_refusals")
    try:
        yield Situation({"DURABLE_LLM_API_KEY": site.tenant}, shown)
    finally:
        await stub.Cancel(llm_pb2.CancelRequest(workflow_id=open_))


@asynccontextmanager
async def a_batch_stands_still(site: Site) -> AsyncIterator[Situation]:
    stubs = batches.Stubs(site.as_(FileServiceStub), site.as_(BatchServiceStub))
    id_ = (await batches.create(stubs, batches.lines_of(2, model="idle"))).batch_id

    async def begun() -> bool:
        return (await stubs.get(id_)).state == batch_pb2.BATCH_STATE_RUNNING

    await until(begun)
    yield Situation(
        {"BATCH": id_, "QUEUE": "llm-gpu-activities.idle"}, (r"(?i)running", r"activity +[1-9]", "docstrings")
    )


@asynccontextmanager
async def a_pipeline_waits(site: Site) -> AsyncIterator[Situation]:
    stub = site.as_(PipelineServiceStub)
    id_ = (await pipelines.submit(stub, pipelines.new_pipeline("stubborn", StringValue(value="once")))).pipeline_id
    waits = pipeline_pb2.STEP_STATE_NEEDS_ANSWER
    await pipelines.follow(stub, id_, until=lambda seen: any(step.state == waits for step in seen.steps.values()))
    yield Situation({"PIPELINE": id_}, (id_, r"Shall I stop\?", r"ask"))
    assert (await pipelines.follow(stub, id_)).ended


@asynccontextmanager
async def a_worker_hands_its_job_over(site: Site) -> AsyncIterator[Situation]:
    first, id_ = site.stack.processes["gpu-worker"], await site.running_job()
    second = site.stack.add("gpu-worker")
    await second.start()
    await second.wait_ready()
    await site.until_workers(2)
    yield Situation({"JOB": id_, "WORKER": str(first.pid)}, (r"(docstrings.*\n.*){2}", r"SUCCEEDED[^$]*attempt +1\b"))
    await first.wait()
    seen = await watch(site.jobs, id_)
    assert len({attempt.worker for attempt in seen.final.result.attempts}) == 2
    await site.start_again("gpu-worker")
    await second.terminate()


@asynccontextmanager
async def the_earlier_version_is_started_again(site: Site) -> AsyncIterator[Situation]:
    """After Temporal was told to use it while none of its gateways was left. It has a namespace of its own."""
    place = {"TEMPORAL_ADDRESS": site.stack.address("temporal"), "TEMPORAL_NAMESPACE": "versions"}

    async def use(build: str) -> bool:
        """Make a version the current one. Return False while Temporal does not know its workers."""
        version = ("--deployment-name", "durable-llm", "--build-id", build)
        return (await run("temporal", *COMMAND, *version, "--yes", **place)).status == 0

    async def start(build: str) -> str:
        """Start a gateway of a version, make it the current one, and return the gateway's name."""
        added = site.stack.add("gateway", {**VERSION, "TEMPORAL_WORKER_BUILD_ID": build, **place})
        await added.start()
        await added.wait_ready()
        await until(lambda: use(build))
        return added.name

    assert (await run("temporal", "operator", "namespace", "create", "--namespace", "versions", **place)).status == 0
    earlier, later = await start("earlier"), await start("later")
    await site.stack.processes[earlier].terminate()
    assert await use("earlier")
    async with grpc.aio.insecure_channel(site.stack.address(later)) as channel:
        stub = CallsAs(LlmServiceStub(channel), site.operator)
        id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=new_job()), timeout=PATIENCE)).workflow_id
        await site.start_again(earlier)
        address = site.stack.metrics_url(earlier).split("/")[2]
        shown = (r'"ready": true', r'"version": ".*earlier"', r"CurrentVersionBuildID +earlier")
        yield Situation({"EARLIER": address, "BUILD": "earlier", **place}, shown)
        # Its workflow takes its first step.
        await stub.Cancel(llm_pb2.CancelRequest(workflow_id=id_), timeout=PATIENCE)
        assert (await watch(stub, id_)).final.status.state == llm_pb2.JOB_STATE_CANCELLED
    for name in (earlier, later):
        await site.stack.processes[name].terminate()


@asynccontextmanager
async def a_backup_is_restored(site: Site) -> AsyncIterator[Situation]:
    """A job that has ended before the backup is read from the copy, and a file of then is in it."""
    await files.upload(site.as_(FileServiceStub), files.new_file(), b"kept")
    kept = (await run_job(site.jobs, new_job(params={"max_tokens": 5}))).final
    backup, restored = site.folder / "backup", site.folder / "restored"
    yield Situation({"BACKUP": str(backup), "RESTORED": str(restored)}, (r"store\.tar", r"temporal\.db"))
    assert [*(restored / "store").iterdir()]
    async with (
        Stack(stack_settings(restored), only=("temporal", "nats", "gateway")) as stack,
        grpc.aio.insecure_channel(stack.address("gateway")) as channel,
    ):
        request = llm_pb2.GetStatusRequest(workflow_id=kept.status.workflow_id)
        found = await LlmServiceStub(channel).GetStatus(request, timeout=PATIENCE)
    assert found.result == kept.result


@asynccontextmanager
async def keys_are_turned(site: Site) -> AsyncIterator[Situation]:
    old = id_of(site.keys.add(["jobs:read"]))
    folder = site.folder / "encryption"
    files = {"ENCRYPTION_KEY_STORE": str(folder), "ENCRYPTION_KEYRING": str(site.folder / "keyring.json")}
    assert (await run(sys.executable, "-m", "encryption", "init", **files)).status == 0
    yield Situation({"KEYS": str(site.keys.path), "OLD": old, **files}, ("llmk_", "jobs:submit", '"current"'))
    assert old not in site.keys.path.read_text()


SITUATIONS: dict[tuple[str, ...], Callable[[Site], AbstractAsyncContextManager[Situation]]] = {
    ("",): all_is_well,
    ("worker-killed",): a_worker_is_killed,
    ("worker-back",): a_lost_workers_job_goes_on,
    ("job-failed",): a_job_has_failed,
    ("receiver-gone", "receiver-back"): a_receiver_is_gone_and_back,
    ("feed-away",): the_feed_is_away,
    ("temporal-away",): temporal_is_away,
    ("lists-refused",): lists_are_refused,
    ("quota-full",): a_quota_is_full,
    ("batch-stands",): a_batch_stands_still,
    ("pipeline-waits",): a_pipeline_waits,
    ("canary",): a_canary_runs,
    ("second-worker", "hand-over"): a_worker_hands_its_job_over,
    ("earlier-version",): the_earlier_version_is_started_again,
    ("backup", "restore"): a_backup_is_restored,
    ("api-keys", "encryption-keys"): keys_are_turned,
}
"""How the situations come about that blocks of the page name. Blocks without one run where all is well."""


@pytest.mark.long
@pytest.mark.parametrize("names", SITUATIONS, ids=lambda names: names[0] or "well")
async def test_the_commands_show_what_their_section_speaks_of(site: Site, names: tuple[str, ...]) -> None:
    """They run in the order of the page, each once."""
    async with SITUATIONS[names](site) as situation:
        printed = [await site.run(block, situation.variables) for block in BLOCKS if block.of in names]
        assert printed
        for pattern in situation.shown:
            assert re.search(pattern, "\n".join(printed)), f"{pattern} is not in {printed}"


def test_every_command_of_the_runbook_is_run() -> None:
    """It has no block that cannot run here, and none of a situation that nobody produces."""
    assert {block.language for block in BLOCKS} == {"sh"}
    assert {block.of for block in BLOCKS} == {name for names in SITUATIONS for name in names}
    assert len(BLOCKS) == (ROOT / "docs" / "runbook.md").read_text().count("```") // 2
