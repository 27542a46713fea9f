"""Rolling upgrade and rollback: processes of an earlier version run next to processes of this version.

UPGRADE_FROM is the folder of the earlier version's checkout, and UPGRADE_PYTHON the interpreter of an environment with
the packages of its lock. `make test-upgrade` creates both. Without them all tests of this module are skipped.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import Int32Value, StringValue
from temporalio.api.enums.v1 import EventType
from temporalio.client import Client
from temporalio.worker import Replayer, UnsandboxedWorkflowRunner

from deploy.local.stack import Stack
from jobs import names
from jobs.errors import reason_of
from llm_pb import llm_pb2, pipeline_pb2
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from payload_converter import data_converter
from pipelines.workflow import LLMPipelineWorkflow
from services.gateway.pipelines.catalogue import load_pipelines
from tests.support import pipelines
from tests.support.jobs import Seen, new_job, webhook
from tests.support.outcomes import run_all
from tests.support.receivers import Reply, Request, receiving, status
from tests.support.stacks import stack_settings, temporal_cli
from tests.support.versions import (
    ENVIRONMENT,
    SECONDS,
    Running,
    Version,
    Versions,
    generated,
    get_status,
    submit,
    until,
    watch_wherever,
)
from workflows.llm_delivery import LLMDeliveryWorkflow
from workflows.llm_job import LLMJobWorkflow

FROM: Final = os.environ.get("UPGRADE_FROM", "")
PYTHON: Final = os.environ.get("UPGRADE_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(not (FROM and PYTHON), reason="UPGRADE_FROM and UPGRADE_PYTHON name no earlier version"),
    pytest.mark.timeout(600),
]
upgrade_and_rollback = pytest.mark.parametrize(
    ("first", "then"), [("earlier", "this"), ("this", "earlier")], ids=["upgrade", "rollback"]
)
TOKENS: Final = 1600
PLAIN: Final = "".join(f"{number:04} " for number in range(TOKENS // 5))
"""Text that is the same in every attempt. It is ASCII because versions cut other characters differently."""
SAME: Final = {"max_tokens": 2 * TOKENS, "choice": llm_pb2.Choice(options=[PLAIN])}
SHORT: Final = {"max_tokens": 5}
STRUCTURED: Final = {"GPU_WORKER_MODEL": "structured"}
# This version's rules refuse these forms.
SHORT_ADDRESS: Final = "http://127.1:9/"
NO_HOST: Final = "http://a.b%c/"
COSTLY_REGEX: Final = "((a*)*)*"


def exactly(tokens: int) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": tokens, "min_tokens": tokens}


@pytest.fixture(scope="module")
async def versions(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Versions]:
    settings = stack_settings(tmp_path_factory.mktemp("upgrade"))
    async with Stack(settings, only=("temporal", "nats"), environment=ENVIRONMENT) as stack:
        temporal = await Client.connect(stack.address("temporal"), data_converter=data_converter)
        yield Versions(stack, temporal, FROM, PYTHON)


def assert_whole(seen: Seen) -> None:
    assert seen.states[-1] == "SUCCEEDED", seen.final.status
    assert seen.final.result.output.encode() == seen.output


@upgrade_and_rollback
@pytest.mark.parametrize(
    ("how", "order"),
    [(signal.SIGKILL, ("gateway", "gpu-worker", "notifier")), (signal.SIGTERM, ("notifier", "gpu-worker", "gateway"))],
    ids=["SIGKILL", "SIGTERM"],
)
async def test_jobs_go_on_in_the_other_version(
    versions: Versions, first: Version, then: Version, how: signal.Signals, order: tuple[str, ...]
) -> None:
    """The other version starts while jobs run, and the first version's processes end one by one. No byte is lost."""
    async with versions.running(first, worker=STRUCTURED) as one:
        same = [await submit(one, new_job(model="structured", params=SAME)) for _ in range(3)]
        prompts = ("[[vary]] Other words in each attempt.", "Words of many scripts.")
        varying = [await submit(one, new_job(prompt, model="structured", params=exactly(TOKENS))) for prompt in prompts]
        worker = (await generated(one, same[0], 1)).progress.worker
        async with versions.running(then, worker=STRUCTURED) as two:
            both = [one, two]
            watching = []
            async with asyncio.TaskGroup() as tasks:
                for id_ in (*same, *varying):
                    ways = [partial(watch_wherever, [two])]
                    if then == "this" or id_ in same:
                        # A watcher of a job that rewinds may not reconnect to an earlier gateway. It has no resume
                        # token, so it would apply the watcher's offset to the new text.
                        ways += [partial(watch_wherever, both), partial(watch_wherever, both, leave=20)]
                    if id_ in same:
                        ways.append(partial(watch_wherever, both, leave=20, token=False))
                    watching += [tasks.create_task(way(id_)) for way in ways]
                await generated(two, same[0], TOKENS // 4)
                for kind in order:
                    one.processes[kind].signal(how)
                    await one.processes[kind].wait()
            late = [await watch_wherever([two], id_) for id_ in (*same, *varying)]
    for seen in (*(task.result() for task in watching), *late):
        assert_whole(seen)
        if seen.final.status.workflow_id in same:
            assert (seen.output, seen.rewinds) == (PLAIN.encode(), 0)
    assert late[0].final.result.metadata.worker != worker, "the job ended before its worker: this machine is too slow"


@pytest.mark.parametrize(
    "sequence", [("earlier", "this", "earlier", "this"), ("this", "earlier", "this")], ids=["upgrade", "rollback"]
)
async def test_a_job_rewinds_across_versions(versions: Versions, sequence: tuple[Version, ...]) -> None:
    """Its workers die one after the other, and each attempt generates other text. Watchers hold the last one's text."""
    async with (
        versions.running("earlier", ["gateway"]) as earlier,
        versions.running("this", ["gateway"]) as this,
        asyncio.TaskGroup() as tasks,
    ):
        id_ = await submit(this, new_job("[[vary]] Again and again.", params=exactly(TOKENS // 2)))
        watching = [
            tasks.create_task(watch_wherever([earlier], id_)),
            tasks.create_task(watch_wherever([this], id_)),
            # These reconnect to this version's gateway alone. An earlier one would miss that a rewind came in between.
            tasks.create_task(watch_wherever([this], id_, leave=10)),
            tasks.create_task(watch_wherever([this], id_, leave=10, token=False)),
        ]
        clients = [
            tasks.create_task(versions.earlier_watch(earlier.address, id_)),
            tasks.create_task(versions.earlier_watch(this.address, id_)),
            tasks.create_task(versions.earlier_watch(this.address, id_, leave_after=10)),
        ]
        *dying, last = sequence
        workers: set[str] = set()
        for version in dying:
            async with versions.worker(version):
                # Each attempt generates fewer tokens than the one before, so each but the first rewinds.
                job = await generated(this, id_, 300 - 60 * len(workers), but=workers)
                workers.add(job.progress.worker)
        async with versions.worker(last):
            await asyncio.wait([*watching, *clients])
    for task in watching:
        assert_whole(task.result())
    output = watching[0].result().final.result.output
    for client in clients:
        assert client.result()["output"] == client.result()["result"] == output


async def test_clients_with_the_earlier_stubs(versions: Versions) -> None:
    """At this version's gateway they can submit, repeat the Submit, watch, cancel, list and redeliver."""
    async with versions.running("this") as this, receiving() as receiver:

        async def call(method: str, **fields: Any) -> Any:
            request, answer = (getattr(llm_pb2, f"{method}{end}") for end in ("Request", "Response"))
            return await versions.earlier_call(this.address, method, request(**fields), answer)

        job = new_job(params=exactly(600), notify=webhook(receiver.on("/earlier", status(200))))
        submitted = await call("Submit", job=job)
        assert (await call("Submit", job=job)).run_id == submitted.run_id
        id_ = submitted.workflow_id
        watches = (versions.earlier_watch(this.address, id_, leave_after=leave) for leave in (0, 3, 40))
        for seen in await asyncio.gather(*watches):
            assert (seen["state"], seen["rewinds"]) == ("SUCCEEDED", 0)
            assert seen["output"] == seen["result"] != ""
        cancelled = (await call("Submit", job=new_job(params=exactly(TOKENS)))).workflow_id
        await generated(this, cancelled, 20)
        await call("Cancel", workflow_id=cancelled, reason="enough")
        assert (await versions.earlier_watch(this.address, cancelled))["state"] == "CANCELLED"
        await receiver.received("/earlier", 1)

        async def list_jobs() -> Any:
            return (await call("List", user_id=job.user_id)).jobs

        listed = await until(list_jobs)
        assert [entry.status.workflow_id for entry in listed] == [id_]
        assert len((await call("Redeliver", workflow_id=id_)).deliveries) == 1
        await receiver.received("/earlier", 2)
        assert len((await call("ListDeliveries", workflow_id=id_)).deliveries) == 1


async def test_a_large_result_reaches_clients_with_the_earlier_stubs(versions: Versions) -> None:
    """They do not know output_omitted. The deltas and GetStatus have the output that the last message omits."""
    fast = {"GPU_WORKER_ENGINE_OPTIONS": '{"tokens_per_second": 400}'}
    async with versions.running("this", worker=fast) as this:
        id_ = await submit(this, new_job(params={**exactly(TOKENS), "logprobs": 20}))
        seen = await versions.earlier_watch(this.address, id_)
        request = llm_pb2.GetStatusRequest(workflow_id=id_)
        answer = await versions.earlier_call(this.address, "GetStatus", request, llm_pb2.GetStatusResponse)
        assert answer.ByteSize() > 256 * 1024
        assert (seen["output"], seen["result"]) == (answer.result.output, "")


@upgrade_and_rollback
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda how: how.name)
async def test_pending_deliveries_go_on(versions: Versions, first: Version, then: Version, how: signal.Signals) -> None:
    """Deliveries in delivery workflows and in the job's workflow, also those of a Redeliver, keep their id."""
    ready = False

    async def once_ready(writer: asyncio.StreamWriter, request: Request) -> None:
        await status(200 if ready else 503)(writer, request)

    async with receiving() as receiver:
        async with versions.running(first) as one:

            async def submit_to(path: str, reply: Reply, **changes: Any) -> str:
                return await submit(one, new_job(params=SHORT, notify=webhook(receiver.on(path, reply)), **changes))

            ids = {
                "/left": await submit_to("/left", once_ready),
                "/again": await submit_to("/again", status(200)),
            }
            for id_ in ids.values():
                await watch_wherever([one], id_)
            receiver.on("/again", once_ready)
            await one.stub.Redeliver(llm_pb2.RedeliverRequest(workflow_id=ids["/again"]), timeout=SECONDS)
            await receiver.received("/again", 2)
            if then == "this":
                # The earlier version's gateways refuse the id that this one shortens.
                longest = {"user_id": "u" * 128, "request_id": how.name.ljust(114, "r")}
                ids["/long"] = await submit_to("/long", once_ready, **longest)
                await receiver.received("/long", 1)
            # The outcome is settled, and the job's workflow runs its delivery, when all processes end.
            ids["/held"] = await submit_to("/held", once_ready)
            await receiver.received("/held", 1)
            for process in one.processes.values():
                process.signal(how)
            for process in one.processes.values():
                await process.wait()
        tried = {path: len(receiver.so_far(path)) for path in ids}
        async with versions.running(then) as two:
            ready = True
            for path, id_ in ids.items():
                await delivered(two, id_)
                requests = receiver.so_far(path)
                assert len(requests) > tried[path]
                assert len({request.headers["webhook-id"] for request in requests}) == 1
                job = (await get_status(two, id_)).status
                assert job.state == llm_pb2.JOB_STATE_SUCCEEDED
                assert [notification.state for notification in job.notifications] == [llm_pb2.NOTIFY_STATE_DELIVERED]


async def delivered(running: Running, id_: str) -> None:
    """Return once the delivery log has one delivery and its state is DELIVERED."""
    request = llm_pb2.ListDeliveriesRequest(workflow_id=id_)

    async def arrived() -> bool:
        log = (await running.stub.ListDeliveries(request, timeout=SECONDS)).deliveries
        return [delivery.state for delivery in log] == [llm_pb2.NOTIFY_STATE_DELIVERED]

    await until(arrived)


async def test_jobs_that_this_versions_rules_refuse_go_on(versions: Versions) -> None:
    """An earlier gateway accepted the jobs, and no worker has run them yet."""
    refused: dict[str, dict[str, Any]] = {
        "a short address": {"notify": webhook(SHORT_ADDRESS)},
        "an invalid host": {"notify": webhook(NO_HOST)},
        "a priority for operators": {"priority": 1},
    }
    async with versions.running("earlier", ["gateway"]) as earlier:
        ids = {about: await submit(earlier, new_job(params=SHORT, **job)) for about, job in refused.items()}
    async with versions.running("this") as this:
        for about, id_ in ids.items():
            seen = await watch_wherever([this], id_)
            assert seen.states[-1] == "SUCCEEDED", (about, seen.final.status)


HAND: Final = {"user_id": "hand", "model": "docstrings", "prompt": "By hand.", "params": {"max_tokens": 1000}}


async def start_by_hand(versions: Versions, id_: str, job: dict[str, Any] | None) -> None:
    written = () if job is None else ("--input", json.dumps({**HAND, "request_id": id_, **job}))
    await temporal_cli(
        *(versions.stack, "workflow", "start", "--workflow-id", id_, *written),
        *("--type", names.JOB_WORKFLOW_TYPE, "--task-queue", names.WORKFLOW_QUEUE),
    )


@pytest.mark.parametrize("taken", [True, False], ids=["taken", "waiting"])
async def test_workflows_started_by_hand_go_on(versions: Versions, *, taken: bool) -> None:
    """They follow the rules under which they began, whether or not a worker of the earlier version has run them."""
    async with receiving() as receiver:
        url = receiver.on("/hand", *[status(503)] * 3, status(200))
        jobs: dict[str, dict[str, Any] | None] = {
            "SUCCEEDED plain": {},
            "SUCCEEDED webhook": {"notify": [{"webhook": {"url": url}}]},
            "SUCCEEDED short address": {"notify": [{"webhook": {"url": SHORT_ADDRESS}}]},
            "SUCCEEDED no host": {"notify": [{"webhook": {"url": NO_HOST}}]},
            "FAILED regex": {"params": {"max_tokens": 5, "regex": COSTLY_REGEX}},
            "FAILED model": {"model": "m" * 256},
            # Earlier code fails the workflow task. This version fails the workflow.
            "FAILED nothing": None,
        }
        ids = {about: f"hand-{about.replace(' ', '-')}-{taken}" for about in jobs}
        async with versions.running("earlier", ["gateway", "notifier"]) as earlier:
            for about, job in jobs.items():
                await start_by_hand(versions, ids[about], job)
            if taken:
                async with versions.worker("earlier"):
                    await generated(earlier, ids["SUCCEEDED plain"], 50)
            for about, id_ in ids.items():
                kind = EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED
                if jobs[about] is None:
                    kind = EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED
                await until(partial(versions.events, id_, kind))
        async with versions.running("this") as this:
            seen = await asyncio.gather(*(watch_wherever([this], id_) for id_ in ids.values()))
    for about, one in zip(ids, seen, strict=True):
        assert one.states[-1] == about.split()[0], (about, one.final.status)
        if jobs[about] is not None:
            assert not await versions.events(ids[about], EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED), about


async def test_a_workflow_started_by_hand_waits_out_a_rollback(versions: Versions) -> None:
    """Earlier code does not know the workflow's patch. The workflow continues when this version is back."""
    async with versions.running("this") as this:
        await start_by_hand(versions, "hand-back", {})
        await generated(this, "hand-back", 50)
    async with versions.running("earlier") as earlier:
        other = await submit(earlier, new_job(params=SHORT))
        assert_whole(await watch_wherever([earlier], other))
    async with versions.running("this") as this:
        assert_whole(await watch_wherever([this], "hand-back"))


@upgrade_and_rollback
async def test_a_job_that_was_submitted_to_the_other_version_is_found(
    versions: Versions, first: Version, then: Version
) -> None:
    """Both an open and an ended job are found. Another job under the same key is refused."""
    async with versions.running(first) as one, versions.running(then, ["gateway"]) as two:
        for model in ("idle", "docstrings"):
            job = new_job(model=model, priority=3, params=SHORT)
            id_ = await submit(one, job)
            if model == "docstrings":
                await watch_wherever([one], id_)
            run = (await get_status(one, id_)).status.run_id
            found = await two.stub.Submit(llm_pb2.SubmitRequest(job=job), timeout=SECONDS)
            assert (found.workflow_id, found.run_id) == (id_, run)
            job.prompt = "Another."
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await submit(two, job)
            assert refused.value.code() == grpc.StatusCode.ALREADY_EXISTS


@upgrade_and_rollback
async def test_every_outcome_reads_the_same_at_the_other_version(
    versions: Versions, first: Version, then: Version
) -> None:
    """The other version reads memos and closing events, and replays the workflow for queries."""
    async with versions.running(first) as one:
        ids = await run_all(one.stub, versions.temporal)
        before = {outcome: await get_status(one, id_) for outcome, id_ in ids.items()}
    async with versions.running(then, ["gateway"]) as two:
        after = {outcome: await get_status(two, id_) for outcome, id_ in ids.items()}
    if then == "earlier" and f'"{names.PATCH_ORDERED}"' not in (Path(FROM) / "jobs" / "names.py").read_text():
        # It cannot replay a job whose output was read back by this version, and answers from the memo, without it.
        for outcome in ("cancelled", "cancelled-by-temporal", "timed-out-in-all"):
            if not after[outcome].result.output:
                assert after[outcome].result == llm_pb2.JobResult(), outcome
                after[outcome].result.CopyFrom(before[outcome].result)
        async with versions.running("this", ["gateway"]) as back:
            assert {outcome: (await get_status(back, id_)).result for outcome, id_ in ids.items()} == {
                outcome: answer.result for outcome, answer in before.items()
            }
    for answer in (*before.values(), *after.values()):
        # Deliveries may continue between the two calls.
        answer.status.ClearField("notifications")
        # An earlier version takes the first from Temporal, a moment after Submit, and knows no attempts.
        answer.status.ClearField("create_time")
        answer.result.ClearField("attempts")
        # Nor classes.
        answer.status.ClearField("job_class")
        if answer.status.state in (llm_pb2.JOB_STATE_CANCELLED, llm_pb2.JOB_STATE_TIMED_OUT):
            # Earlier versions take these from a replay, where they differ by the time that reading the feed took.
            answer.status.ClearField("end_time")
            answer.status.progress.ClearField("updated_at")
            # Of an output that is read back they know neither of these.
            answer.result.metadata.ClearField("queue_time")
            answer.result.metadata.ClearField("engine_time")
    assert after == before


@pytest.mark.skipif(not (Path(FROM) / "pipelines").is_dir(), reason="the earlier version has no pipelines")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda how: how.name)
async def test_pipelines_go_on_in_this_version(versions: Versions, how: signal.Signals) -> None:
    """They began in the earlier one, and are at an answer, at one of many steps, and at two jobs to cancel."""
    texts = {"approved": True, "declined": False}
    async with versions.running("earlier") as one, grpc.aio.insecure_channel(one.address) as channel:
        stub = PipelineServiceStub(channel)

        async def begin(name: str, input_: Message) -> str:
            return (await pipelines.submit(stub, pipelines.new_pipeline(name, input_))).pipeline_id

        ended = await begin("spending", Int32Value(value=1))

        async def result() -> Message | None:
            found = await pipelines.get(stub, ended)
            return found.result.value if found.status.state == llm_pb2.JOB_STATE_SUCCEEDED else None

        def asks(seen: pipelines.Followed) -> bool:
            step = seen.steps.get("review/approve")
            return step is not None and step.state == pipeline_pb2.STEP_STATE_NEEDS_ANSWER

        # A stream of the earlier version may have a message after the one with the final state.
        before = await until(result)
        asking = {text: await begin("careful", StringValue(value=text)) for text in texts}
        for id_ in asking.values():
            await pipelines.follow(stub, id_, until=asks)
        fan = await begin("fan", Int32Value(value=2))
        generating = await pipelines.follow(stub, fan, "**", until=lambda seen: len(seen.outputs) == 2)
        stepping = await begin("spending", Int32Value(value=100))
        done = lambda seen: seen.status.root.counts.succeeded >= 3  # noqa: E731
        known = await pipelines.follow(stub, stepping, until=done)
        async with versions.running("this") as two, grpc.aio.insecure_channel(two.address) as channel_:
            stub = PipelineServiceStub(channel_)
            for process in one.processes.values():
                process.signal(how)
                await process.wait()
            for text, id_ in asking.items():
                await pipelines.answer(stub, id_, "review/approve", text, approved=texts[text])
            await pipelines.cancel(stub, fan)
            generating = await pipelines.follow(stub, fan, "**", known=generating, patience=SECONDS)
            known = await pipelines.follow(stub, stepping, known=known, patience=SECONDS)
            approved = await pipelines.follow(stub, asking["approved"], patience=SECONDS)
            declined = await pipelines.follow(stub, asking["declined"], patience=SECONDS)
            after = await pipelines.get(stub, ended)
            for number in range(2):
                job = (await get_status(two, f"{fan}/parts/{number}/write")).result
                assert job.output.encode() == generating.outputs[f"parts/{number}/write"] != b""
    assert (after.status.state, after.result.value) == (llm_pb2.JOB_STATE_SUCCEEDED, before)
    assert generating.status.root.counts.cancelled == 2
    assert known.status.state == declined.status.state == llm_pb2.JOB_STATE_SUCCEEDED
    assert known.status.root.counts.succeeded == 100
    # It fails at its last step on purpose, and is undone.
    assert reason_of(approved.status.root.error) == "ENGINE_FAILED"
    assert approved.steps["undo/1"].state == pipeline_pb2.STEP_STATE_SUCCEEDED


async def test_histories_of_all_of_this_replay(versions: Versions) -> None:
    """Every workflow of the tests above replays with this version's code."""
    sys.path.append(str(pipelines.REGISTERED))
    load_pipelines()
    replayer = Replayer(
        workflows=[LLMJobWorkflow, LLMDeliveryWorkflow, LLMPipelineWorkflow],
        data_converter=data_converter,
        workflow_runner=UnsandboxedWorkflowRunner(),
    )
    async for execution in versions.temporal.list_workflows():
        handle = versions.temporal.get_workflow_handle(execution.id, run_id=execution.run_id)
        await replayer.replay_workflow(await handle.fetch_history())
