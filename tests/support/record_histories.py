"""`make histories`: record the history of one job for every outcome into tests/contract/histories/.

Run it after a deliberate change of the workflow that jobs which are open during an upgrade survive (see
https://docs.temporal.io/develop/python/versioning). The new histories join the old ones, which are kept because jobs
like them may still be open somewhere.
"""

import asyncio
import itertools
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf.struct_pb2 import Struct
from google.protobuf.wrappers_pb2 import Int32Value, StringValue
from temporalio.client import Client

from deploy.local.stack import Stack
from jobs import names
from jobs.ids import delivery_workflow_id, file_workflow_id, ledger_workflow_id, models_workflow_id
from jobs.limits import MAX_STEP_INLINE_BYTES
from llm_pb import common_pb2, internal_pb2, llm_pb2, pipeline_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from llm_pb.schedule_pb2_grpc import ScheduleServiceStub
from payload_converter import data_converter
from tests.support.batches import Stubs, lines_of
from tests.support.batches import create as create_batch
from tests.support.deletions import delete, until_ended
from tests.support.files import delete as delete_file
from tests.support.files import new_file, upload
from tests.support.files import until as until_true
from tests.support.jobs import new_job, until_message, until_output, watch, webhook
from tests.support.ledgers import lease_in_a_check, reserve_with_a_failing_check, start_ledger
from tests.support.outcomes import run_all
from tests.support.paths import ROOT
from tests.support.pipelines import WITH_PIPELINES, answer, asks, cancel, follow, new_pipeline, submit, until_pending
from tests.support.refinements import refinement
from tests.support.schedules import create, ended, new_schedule, trigger, until
from tests.support.stacks import FAST, stack_settings
from tests.support.trained import register
from tests.support.training import jsonl, new_training, sentences, write_tiny_model
from tests.support.worlds import FILTERED, LONG_OUTPUTS, MODELS, PAINTER, new_world

HISTORIES: Final = ROOT / "tests" / "contract" / "histories"


def without_stack_traces(value: Any) -> Any:
    """Return the JSON without the stack traces of failures, which contain paths of the recording machine."""
    if isinstance(value, dict):
        return {key: without_stack_traces(item) for key, item in value.items() if key != "stackTrace"}
    return [without_stack_traces(item) for item in value] if isinstance(value, list) else value


async def handed_over(stack: Stack, stub: LlmServiceStub) -> str:
    """Run a job whose worker is stopped in the middle of it, and return the job's id."""
    worker = stack.processes["gpu-worker"]
    response = await stub.Submit(llm_pb2.SubmitRequest(job=new_job(params={"max_tokens": 600})))
    await until_output(stub, response.workflow_id)
    await worker.terminate()
    await worker.start()
    await watch(stub, response.workflow_id)
    return response.workflow_id


async def cached(stub: LlmServiceStub) -> str:
    """Run two equal jobs one after another, and return the id of the second, which takes the answer of the first."""
    for user in ("first", "second"):
        job = new_job("An equal job.", user_id=f"{user}-of-equals", params={"max_tokens": 5, "temperature": 0})
        job.cache.ttl.FromSeconds(3600)
        id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
        ended = await watch(stub, id_)
    assert ended.final.result.metadata.cached
    return id_


async def paused(stack: Stack, stub: LlmServiceStub) -> str:
    """Run a background job that goes back to the queue for want of a seat, and return the job's id."""
    await stack.processes["gpu-worker"].terminate()
    worker = stack.add("gpu-worker", {"GPU_WORKER_MAX_CONCURRENT": "1", "GPU_WORKER_PAUSE_WAIT": "PT0.2S"})
    await worker.start()
    background = new_job(params={"max_tokens": 600}, job_class=common_pb2.JOB_CLASS_BACKGROUND)
    id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=background))).workflow_id
    await until_output(stub, id_)
    urgent = (await stub.Submit(llm_pb2.SubmitRequest(job=new_job(params={"max_tokens": 8000})))).workflow_id
    await until_message(stub, id_, lambda message: message.status.progress.stage == "paused")
    # The worker names itself as long as it has the job.
    await until_message(stub, id_, lambda message: message.HasField("status") and not message.status.progress.worker)
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=urgent))
    await watch(stub, id_)
    return id_


async def delivered_later(stub: LlmServiceStub, temporal: Client, job_id: str) -> str:
    """Redeliver the outcome of an ended job, and return the id of the delivery workflow once it has ended."""
    handle = temporal.get_workflow_handle(delivery_workflow_id(job_id))
    await stub.Redeliver(llm_pb2.RedeliverRequest(workflow_id=job_id))
    await handle.result()
    return handle.id


async def counted(temporal: Client) -> str:
    """Reserve and release slots of a ledger, and let it check them; return its id."""
    await start_ledger(temporal, "recorded", check_interval={"nanos": 1})
    handle = temporal.get_workflow_handle(ledger_workflow_id("recorded"))
    for ids in (["a"], ["b", "c"], ["a", "c"]):
        await handle.execute_update(names.UPDATE_RESERVE, internal_pb2.ReserveRequest(workflow_ids=ids, limit=2))
    await handle.signal(names.SIGNAL_RELEASE, internal_pb2.ReleaseRequest(workflow_ids=["a", "c"]))
    # The answer to a query comes after the signal was handled.
    await handle.query(names.QUERY_GET_LEDGER)
    return handle.id


async def reserved_again(temporal: Client) -> str:
    """Submit a pipeline again before the Release of its first run, lease tokens and check its slot; return the id."""
    await start_ledger(temporal, "again", check_interval={"nanos": 1})
    handle, pipeline = temporal.get_workflow_handle(ledger_workflow_id("again")), "llmpipe--again-a-b"
    lease = internal_pb2.LeaseRequest(workflow_id=pipeline, least_tokens=1, wanted_tokens=9, output_tokens_limit=100)
    for reservation in (1, 2):
        reserve = internal_pb2.ReserveRequest(workflow_ids=[pipeline], limit=1, reservations=[reservation])
        await handle.execute_update(names.UPDATE_RESERVE, reserve)
        lease.reservation = reservation
        await handle.execute_update(names.UPDATE_LEASE, lease)
    for reservation in (1, 2):
        release = internal_pb2.ReleaseRequest(workflow_ids=[pipeline], output_tokens=[4], reservations=[reservation])
        await handle.signal(names.SIGNAL_RELEASE, release)
        await handle.execute_update(names.UPDATE_LEASE, lease)
        await handle.execute_update(names.UPDATE_RESERVE, internal_pb2.ReserveRequest(workflow_ids=["a"], limit=1))
    await handle.query(names.QUERY_GET_LEDGER)
    return handle.id


async def deletions(stub: LlmServiceStub) -> dict[str, str]:
    """Delete a job that runs, one that has ended, all jobs of a user, all that one has; return the ids by name."""
    running, ended = new_job(params={"max_tokens": 8000}), new_job(params={"max_tokens": 2})
    ids = {}
    for name, job in {"deletion-running": running, "deletion-ended": ended}.items():
        job_id = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
        await (until_output(stub, job_id) if job is running else watch(stub, job_id))
        ids[name] = (await delete(stub, job_id)).deletion_id
    tombstone = job_id
    job = new_job(params={"max_tokens": 2})
    await stub.Submit(llm_pb2.SubmitRequest(job=job))
    started = await stub.DeleteJobs(llm_pb2.DeleteJobsRequest(user_id=job.user_id))
    ids["deletion-of-many"] = (await until_ended(stub, started.deletion.deletion_id)).deletion_id
    again = new_job(user_id=job.user_id, params={"max_tokens": 2})
    await stub.Submit(llm_pb2.SubmitRequest(job=again))
    whole = await stub.DeleteUser(llm_pb2.DeleteUserRequest(user_id=job.user_id))
    ids["deletion-of-user"] = (await until_ended(stub, whole.deletion.deletion_id)).deletion_id
    return {**ids, "tombstone": tombstone}


async def scheduled(schedules: ScheduleServiceStub, stub: LlmServiceStub, temporal: Client) -> dict[str, str]:
    """Run two jobs of a schedule, and cancel the second run; return the ids of the workflows by name."""
    id_ = await create(schedules, new_schedule(), paused=True)
    await trigger(schedules, id_)
    first = ended(await until(schedules, id_, ended))[0]
    long = await create(schedules, new_schedule(params={"max_tokens": 8000}), paused=True)
    await trigger(schedules, long)
    second = (
        await until(schedules, long, lambda status: status.recent_runs and status.recent_runs[0].workflow_id)
    ).recent_runs[0]
    await until_output(stub, second.workflow_id)
    run = f"{long}-{second.nominal_time.ToJsonString()}"
    await temporal.get_workflow_handle(run).cancel()
    await temporal.get_workflow_handle(run).result()
    return {
        "schedule": f"{id_}-{first.nominal_time.ToJsonString()}",
        "schedule-cancelled": run,
        "succeeded-of-a-schedule": first.workflow_id,
    }


async def uploaded(files: FileServiceStub) -> str:
    """Upload a file in two calls and delete it; return the id of its workflow."""
    key = new_file()
    await upload(files, key, b"one", last=False)
    file = await upload(files, key, b"one and two", 3)
    await delete_file(files, file.ref.file_id)
    return file_workflow_id(file.ref.file_id, "")


async def batches(stubs: Stubs, stub: LlmServiceStub) -> dict[str, str]:
    """Run a batch with an item that is a job of its own, and cancel one; return the ids by name.

    The receiver of the first one's end is not there.
    """
    params = llm_pb2.JobRequest(params=llm_pb2.SamplingParams(max_tokens=5))
    lines = [{**line, "watch": number == 0} for number, line in enumerate(lines_of(3, "docstrings"))]
    ran = await create_batch(stubs, lines, notify=webhook("http://127.0.0.1:1/"), defaults=params)
    await stubs.end(ran.batch_id)
    # Of a user who has no other jobs.
    idle = await create_batch(stubs, [{**line, "watch": True} for line in lines_of(2)], user_id="watches")

    async def begun() -> bool:
        page = await stub.List(llm_pb2.ListRequest(user_id=idle.user_id))
        return len(page.jobs) == 2

    await until_true(begun)
    await stubs.cancel(idle.batch_id)
    await stubs.end(idle.batch_id)
    return {"batch-watched": ran.batch_id, "batch-watched-cancelled": idle.batch_id}


async def pipelines(channel: grpc.aio.Channel) -> dict[str, str]:
    """Run pipelines that end in different ways; return the ids by name."""
    stub: Any = PipelineServiceStub(channel)
    essay = (await submit(stub, new_pipeline("essay", StringValue(value="rain")))).pipeline_id
    await follow(stub, essay)
    careful = (await submit(stub, new_pipeline("careful", StringValue(value="this")))).pipeline_id
    asked = "review/approve"
    await follow(stub, careful, until=lambda seen: asked in seen.steps and seen.steps[asked].question)
    await answer(stub, careful, asked, "yes", approved=True)
    await follow(stub, careful)
    fan = (await submit(stub, new_pipeline("leaves", Int32Value(value=6)))).pipeline_id
    await follow(stub, fan, "**", until=lambda seen: len(seen.outputs) == 6)
    await cancel(stub, fan)
    await follow(stub, fan)
    large = (await submit(stub, new_pipeline("large", Int32Value(value=1)))).pipeline_id
    await follow(stub, large)
    left = (await submit(stub, new_pipeline("forgetful", StringValue(value="rain")))).pipeline_id
    await follow(stub, left)
    hasty = (await submit(stub, new_pipeline("hasty", StringValue(value="rain")))).pipeline_id
    await follow(stub, hasty)
    batching = (await submit(stub, new_pipeline("batching", Int32Value(value=2)))).pipeline_id
    await follow(stub, batching)
    stopped = (await submit(stub, new_pipeline("lingering", Int32Value(value=1)))).pipeline_id
    await follow(stub, stopped, until=lambda seen: "lines" in seen.steps and seen.steps["lines"].counts.running == 1)
    await cancel(stub, stopped)
    await follow(stub, stopped)
    spec = Struct()
    spec.update({"code": "careless", "topics": ["rain"]})
    nesting = (await submit(stub, new_pipeline("nesting", spec, notify=webhook("http://127.0.0.1:1/")))).pipeline_id
    await follow(stub, nesting)
    spec.update({"code": "careful"})
    asking = (await submit(stub, new_pipeline("nesting", spec))).pipeline_id
    within = f"{asking}/parts/0/write"
    await follow(stub, asking, until=lambda seen: seen.status.root.counts.needs_answer == 1)
    await answer(stub, within, asked, "no", approved=False)
    await follow(stub, asking)
    return {
        "pipeline": essay,
        "pipeline-failed": careful,
        "pipeline-cancelled": fan,
        "pipeline-left-task": left,
        "pipeline-cancelled-start": hasty,
        "pipeline-of-large-outputs": large,
        "pipeline-with-a-batch": batching,
        "pipeline-with-a-cancelled-batch": stopped,
        "pipeline-of-pipelines": nesting,
        "pipeline-within": f"{nesting}/parts/0/write",
        "pipeline-of-an-asking-one": asking,
        "pipeline-asking-within": within,
    }


async def away(channel: grpc.aio.Channel, temporal: Client, store: Path) -> str:
    """Run a pipeline whose store is away while the prompt_file of its step is checked; return its id."""
    stub: Any = PipelineServiceStub(channel)
    key, elsewhere = new_file(), store.with_name("elsewhere")
    ref = (await upload(FileServiceStub(channel), key, b"Rain falls.")).ref
    id_ = (await submit(stub, new_pipeline("asked-reader", ref, user_id=key["file"].user_id))).pipeline_id
    await follow(stub, id_, until=asks)
    shutil.move(store, elsewhere)
    await answer(stub, id_, "ask", "yes", approved=True)
    await until_pending(temporal, id_, names.ACTIVITY_ADMIT_STEP)
    shutil.move(elsewhere, store)
    await follow(stub, id_)
    return id_


async def recalled(folder: Path, version: str) -> None:
    """Record the second run of a pipeline that takes JSON of the first one from a file."""
    services = ("temporal", "nats", "gateway", "gpu-worker")
    stack = Stack(stack_settings(folder), only=services, environment=LONG_OUTPUTS)
    async with stack, grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        temporal = await Client.connect(stack.address("temporal"), data_converter=data_converter)
        stub: Any = PipelineServiceStub(channel)
        request = new_pipeline("forming", Int32Value(value=MAX_STEP_INLINE_BYTES))
        for answer_id, approved in (("no", False), ("yes", True)):
            id_ = (await submit(stub, request)).pipeline_id
            await follow(stub, id_, until=asks)
            await answer(stub, id_, "ask", answer_id, approved=approved)
            await follow(stub, id_)
        await record(temporal, id_, f"pipeline-recalls-json.{version}")


async def trainings(stack: Stack, channel: grpc.aio.Channel, folder: Path) -> dict[str, str]:
    """Train a model that is registered, cancel a training, and preprocess a data set; return the ids by name."""
    models = {"tiny": str(write_tiny_model(folder))}
    await stack.add("trainer", {"TRAINER_BASE_MODELS": json.dumps(models), "TRAINER_DEVICE": "cpu"}).start()
    dataset = (await upload(FileServiceStub(channel), new_file(), jsonl(sentences(60)))).ref
    stub: Any = PipelineServiceStub(channel)
    trained = (await submit(stub, new_training(dataset, steps=20))).pipeline_id
    await follow(stub, trained)
    stopped = (await submit(stub, new_training(dataset, steps=100_000))).pipeline_id
    await follow(stub, stopped, until=lambda seen: "train" in seen.steps)
    await cancel(stub, stopped)
    await follow(stub, stopped)
    spec = pipeline_pb2.PreprocessSpec(base_model="tiny", dataset=dataset)
    prepare = pipeline_pb2.PipelineRequest(user_id="trainer", request_id="prepare", preprocess=spec)
    prepared = (await submit(stub, prepare)).pipeline_id
    await follow(stub, prepared)
    return {
        "training": trained,
        "training-cancelled": stopped,
        "preprocess": prepared,
        "models": models_workflow_id(""),
    }


async def removed_models(stub: LlmServiceStub, temporal: Client) -> str:
    """Remove a model with its last version, and register one of its name; return the id of the registry."""
    for version in [await register(temporal, "removed") for _ in range(2)]:
        await stub.DeleteModelVersion(llm_pb2.DeleteModelVersionRequest(model="removed", version=version))
    await register(temporal, "removed")
    return models_workflow_id("")


async def worlds(folder: Path, version: str) -> None:
    """Record a world that succeeds, one with a step that fails, the second run of that one, and a refinement."""
    environment = {
        "gateway": {**FAST["gateway"], "GATEWAY_MODELS": json.dumps(MODELS)},
        "gpu-worker": {**FAST["gpu-worker"], "GPU_WORKER_ENGINE_OPTIONS": '{"context_tokens": 16384}'},
    }
    services = ("temporal", "nats", "gateway", "gpu-worker")
    stack = Stack(stack_settings(folder), only=services, environment=environment)
    stack.add("gpu-worker", {**PAINTER, **FILTERED})
    async with stack, grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        temporal = await Client.connect(stack.address("temporal"), data_converter=data_converter)
        stub: Any = PipelineServiceStub(channel)
        whole, bad, refined = (
            new_world("whole"),
            new_world("bad", bad_post="a dragon"),
            refinement("r", 5, 9, doubtful=1),
        )
        named = {"world": whole, "world-incomplete": bad, "world-resumed": bad, "refine": refined}
        for name, pipeline in named.items():
            id_ = (await submit(stub, pipeline)).pipeline_id
            await follow(stub, id_)
            await record(temporal, id_, f"{name}.{version}")


async def main(version: str) -> None:
    """Record one history for each outcome into a file named after the outcome and the version.

    Raises FileExistsError if the version has histories.
    """
    recorded = {path.stem.partition(".")[2] for path in HISTORIES.glob("*.json")}
    if version in recorded:
        free = next(name for number in itertools.count(1) if (name := f"v{number}") not in recorded)
        raise FileExistsError(f"{version} has histories, which must stay: the next free version is {free}")
    with tempfile.TemporaryDirectory() as folder:
        async with (
            Stack(stack_settings(folder), environment=WITH_PIPELINES) as stack,
            grpc.aio.insecure_channel(stack.address("gateway")) as channel,
        ):
            temporal = await Client.connect(stack.address("temporal"), data_converter=data_converter)
            stub = LlmServiceStub(channel)
            ids = await run_all(stub, temporal)
            ids["succeeded-after-a-handover"] = await handed_over(stack, stub)
            failed = ids["succeeded-notification-failed"]
            await temporal.get_workflow_handle(delivery_workflow_id(failed)).result()
            ids["delivery-given-up"] = delivery_workflow_id(failed)
            for outcome, id_ in ids.items():
                await record(temporal, id_, f"{outcome}.{version}")
            await record(temporal, await cached(stub), f"succeeded-cached.{version}")
            await record(temporal, await counted(temporal), f"ledger.{version}")
            _, _, ledger = await lease_in_a_check(temporal, "checked")
            await record(temporal, ledger, f"ledger-of-a-batch.{version}")
            _, _, ledger = await reserve_with_a_failing_check(temporal, "unchecked")
            await record(temporal, ledger, f"ledger-with-a-failing-check.{version}")
            await record(temporal, await reserved_again(temporal), f"ledger-of-a-pipeline.{version}")
            id_ = await uploaded(FileServiceStub(channel))
            await temporal.get_workflow_handle(id_).result()
            await record(temporal, id_, f"file.{version}")
            again = await delivered_later(stub, temporal, failed)
            await record(temporal, again, f"delivery-sent-again.{version}")
            stubs = Stubs(FileServiceStub(channel), BatchServiceStub(channel))
            further = {
                **await batches(stubs, stub),
                **await pipelines(channel),
                **await deletions(stub),
                **await scheduled(ScheduleServiceStub(channel), stub, temporal),
            }
            for name, id_ in further.items():
                await record(temporal, id_, f"{name}.{version}")
            id_ = await away(channel, temporal, Path(folder) / "store")
            await record(temporal, id_, f"pipeline-of-a-store-away.{version}")
            for name, id_ in (await trainings(stack, channel, Path(folder) / "tiny")).items():
                await record(temporal, id_, f"{name}.{version}")
            await record(temporal, await removed_models(stub, temporal), f"models-removed.{version}")
            await record(temporal, await paused(stack, stub), f"succeeded-after-a-pause.{version}")
        await worlds(Path(folder) / "worlds", version)
        await recalled(Path(folder) / "recalled", version)


async def record(temporal: Client, id_: str, name: str) -> None:
    """Write the history of a workflow's last run to a file."""
    history = await temporal.get_workflow_handle(id_).fetch_history()
    text = json.dumps(without_stack_traces(history.to_json_dict()), indent=1)
    (HISTORIES / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
