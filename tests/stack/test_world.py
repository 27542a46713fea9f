"""Images as jobs, and the pipeline `world` that is made of them and of texts."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import ResetWorkflowExecutionRequest
from temporalio.client import Client, WorkflowExecutionStatus

from deploy.local.process import Process
from deploy.local.stack import Stack
from jobs import names
from jobs.errors import reason_of
from llm_pb import batch_pb2, common_pb2, llm_pb2, pipeline_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from llm_pb.schedule_pb2_grpc import ScheduleServiceStub
from payload_converter import data_converter
from services.gpu_worker.engines.simulated_images import png
from tests.support.batches import Stubs, create, lines_of
from tests.support.commands import run
from tests.support.deletions import delete
from tests.support.files import PATIENCE, bad_fields, download, get, refusal, sha256
from tests.support.jobs import new_job, run_job
from tests.support.pipelines import WITH_PIPELINES, Followed, follow, new_pipeline, submit
from tests.support.schedules import create as create_schedule
from tests.support.schedules import ended, new_schedule, trigger, until
from tests.support.stacks import FAST, stack_settings
from tests.support.worlds import FILTERED, MODELS, PAINTER, leaves, new_world, world_of

SUCCEEDED = pipeline_pb2.STEP_STATE_SUCCEEDED
DEFAULT_TOKENS: Any = MODELS[0]["default_max_tokens"]
DEFAULTS = {
    "refine": {"models": {"write": "docstrings"}, "maxRounds": 2},
    "world": {"imageSize": {"width": 32, "height": 32}},
}


class Clients:
    def __init__(self, stack: Stack, painter: Process, channel: grpc.aio.Channel) -> None:
        self.stack = stack
        self.painter = painter
        self.channel = channel
        self.jobs: Any = LlmServiceStub(channel)
        self.files: Any = FileServiceStub(channel)
        self.pipelines: Any = PipelineServiceStub(channel)


@pytest.fixture(scope="module")
async def clients(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Clients]:
    environment = {
        "gateway": {
            **WITH_PIPELINES["gateway"],
            "GATEWAY_MODELS": json.dumps(MODELS),
            "GATEWAY_PIPELINE_DEFAULTS": json.dumps(DEFAULTS),
        },
        "gpu-worker": {
            **FAST["gpu-worker"],
            "GPU_WORKER_ENGINE_OPTIONS": '{"tokens_per_second": 2000, "context_tokens": 16384}',
        },
    }
    services = ("temporal", "nats", "gateway", "gpu-worker")
    stack = Stack(stack_settings(tmp_path_factory.mktemp("world")), only=services, environment=environment)
    painter = stack.add("gpu-worker", PAINTER)
    async with stack, grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield Clients(stack, painter, channel)


def image_job(prompt: str = "a cat", **changes: Any) -> llm_pb2.JobRequest:
    return new_job(prompt, model="painter", **changes)


async def test_an_image_is_a_job_whose_file_its_user_can_download(clients: Clients) -> None:
    asked = image_job(params=llm_pb2.SamplingParams(seed=3))
    seen = await run_job(clients.jobs, asked)
    result = seen.final.result
    assert seen.final.status.state == llm_pb2.JOB_STATE_SUCCEEDED, seen.final.status.error
    assert (result.output, seen.output, result.HasField("output_file")) == ("", b"", False)
    assert result.finish_reason == llm_pb2.FINISH_REASON_STOP
    assert (result.metadata.engine, result.metadata.output_tokens) == ("simulated-images", 2)
    assert result.metadata.cost_micros == 40_000
    (ref,) = result.images
    data = await download(clients.files, ref.file_id)
    assert data == png("a cat", 64, 48, 3)
    assert (ref.size_bytes, ref.sha256, ref.media_type) == (len(data), sha256(data), "image/png")
    assert (await get(clients.files, ref.file_id)).user_id == asked.user_id
    job = await clients.jobs.GetJob(llm_pb2.GetJobRequest(workflow_id=seen.final.status.workflow_id))
    assert job.result.images == result.images
    small = await run_job(clients.jobs, image_job(image_size={"width": 32, "height": 32}))
    assert await download(clients.files, small.final.result.images[0].file_id) == png("a cat", 32, 32, 0)


async def test_list_models_shows_what_makes_images_and_other_jobs_are_refused(clients: Clients) -> None:
    models = {model.name: model for model in (await clients.jobs.ListModels(llm_pb2.ListModelsRequest())).models}
    assert [(size.width, size.height) for size in models["painter"].image_sizes] == [(64, 48), (32, 32)]
    assert models["painter"].available
    assert not models["docstrings"].image_sizes
    user = llm_pb2.ChatMessage(role=llm_pb2.ROLE_USER, content="Hi.")
    for changes, fields in (
        ({"image_size": {"width": 65, "height": 48}}, {"job.image_size"}),
        (
            {"params": {"seed": 1, "max_tokens": 1, "temperature": 1}},
            {"job.params.max_tokens", "job.params.temperature"},
        ),
        ({"params": {"json_schema": "{}"}}, {"job.params.json_schema"}),
        ({"prompt": "", "messages": [user]}, {"job.messages"}),
        ({"model": "docstrings", "image_size": {"width": 64, "height": 48}}, {"job.image_size"}),
    ):
        job = image_job()
        job.ClearField("params")
        for name, value in changes.items():
            job.ClearField(name)
            job.MergeFrom(llm_pb2.JobRequest(**{name: value}))
        assert await bad_fields(clients.jobs.Submit(llm_pb2.SubmitRequest(job=job))) == fields
    poor = await run_job(clients.jobs, image_job(budget=common_pb2.Budget(output_tokens=1)))
    assert reason_of(poor.final.status.error) == "BUDGET_SPENT"


async def test_a_world_has_texts_and_pictures_and_the_tree_names_their_files(clients: Clients) -> None:
    status = await submit(clients.pipelines, new_world("whole", images=2))
    seen = await follow(clients.pipelines, status.pipeline_id, "describe")
    world = world_of(seen)
    assert seen.status.state == llm_pb2.JOB_STATE_SUCCEEDED
    assert (world.name, world.description) == ("Aqua", "All is water.")
    assert [(one.number, one.name) for one in world.characters] == [(0, "Fish 1"), (1, "Fish 2")]
    assert [(post.number, post.character, post.text) for post in world.posts] == [
        (0, 0, "Blub 1"),
        (1, 1, "Blub 2"),
        (2, 0, "Blub 3"),
    ]
    assert not world.missing
    steps = {path: step for path, step in seen.steps.items() if step.workflow_id}
    assert steps.keys() == leaves(images=2)
    assert {step.state for step in steps.values()} == {SUCCEEDED}
    # The size is the operator's default, the seed that of the world and the number.
    for number, image in enumerate(world.images):
        assert await download(clients.files, image.file_id) == png("sea whole", 32, 32, 7 + number)
        assert [*steps[f"images/{number}/image"].files] == [image]
    for number, post in enumerate(world.posts):
        assert await download(clients.files, post.image.file_id) == png(
            f"bubble {number + 1} whole", 32, 32, 7 + number
        )
        assert [*steps[f"posts/{number}/image"].files] == [post.image]
    assert seen.status.root.usage.cost_micros == 5 * 40_000
    assert json.loads(seen.outputs["describe"]) == {
        "name": "Aqua",
        "description": "All is water.",
        "picture": "sea whole",
    }
    assert (await submit(clients.pipelines, new_world("whole", images=2))).state == llm_pb2.JOB_STATE_SUCCEEDED


async def test_a_world_with_a_failed_leaf_keeps_the_rest_and_goes_on_when_it_is_submitted_again(
    clients: Clients,
) -> None:
    prude = clients.stack.add("gpu-worker", {**PAINTER, **FILTERED})
    await clients.painter.terminate()
    await prude.start()
    await prude.wait_ready()
    request = new_world("filtered", bad_post="a dragon")
    id_ = (await submit(clients.pipelines, request)).pipeline_id
    seen = await follow(clients.pipelines, id_, "posts/*/write")
    assert seen.status.state == llm_pb2.JOB_STATE_FAILED
    assert reason_of(seen.status.root.error) == "INCOMPLETE"
    assert "posts/2/image" in seen.status.root.error.message
    partial = world_of(seen)
    (missing,) = partial.missing
    assert (missing.path, reason_of(missing.error)) == ("posts/2/image", "INVALID_JOB")
    assert [post.HasField("image") for post in partial.posts] == [True, True, False]
    read = await clients.pipelines.GetPipeline(pipeline_pb2.GetPipelineRequest(pipeline_id=id_))
    assert read.result == seen.result
    await prude.terminate()
    await clients.painter.start()
    await clients.painter.wait_ready()
    again = await submit(clients.pipelines, request)
    assert (again.pipeline_id, again.state) == (id_, llm_pb2.JOB_STATE_RUNNING)
    # A cursor of the earlier run brings everything again, each output after a rewind.
    more = Followed(outputs=dict(seen.outputs), cursor=seen.cursor)
    more = await follow(clients.pipelines, id_, "posts/*/write", known=more)
    assert more.status.state == llm_pb2.JOB_STATE_SUCCEEDED, more.status.root.error
    whole = world_of(more)
    assert [*whole.images] == [*partial.images]
    assert [post.image for post in whole.posts][:2] == [post.image for post in partial.posts][:2]
    assert await download(clients.files, whole.posts[2].image.file_id) == png("a dragon", 32, 32, 9)
    assert more.outputs == seen.outputs
    assert {path for path, step in more.steps.items() if step.workflow_id} == leaves()
    # Only the leaf that had failed has run twice.
    temporal = await Client.connect(clients.stack.address("temporal"), data_converter=data_converter)
    history = await temporal.get_workflow_handle(id_).fetch_history()
    started = [
        event.start_child_workflow_execution_initiated_event_attributes.workflow_id
        for event in history.events
        if event.HasField("start_child_workflow_execution_initiated_event_attributes")
    ]
    (job_id,) = started
    assert job_id == f"{id_}/posts/2/image"
    # Both runs of its job are deleted with it, and the file.
    assert (await delete(clients.jobs, job_id)).state == llm_pb2.DELETION_STATE_DONE
    assert [run.workflow_type async for run in temporal.list_workflows(f"WorkflowId = '{job_id}'")] == [
        names.TOMBSTONE_WORKFLOW_TYPE
    ]
    gone = download(clients.files, whole.posts[2].image.file_id)
    assert await refusal(gone) == ("NOT_FOUND", "FILE_NOT_FOUND")
    # What has succeeded is returned as it is.
    assert (await submit(clients.pipelines, request)).root.end_time == more.status.root.end_time


@pytest.mark.long
async def test_a_failed_world_without_any_text_goes_on_as_well(clients: Clients) -> None:
    """An answer that is no JSON is a job that has succeeded, and nevertheless is run again."""
    request = new_world("broken", posts=0, images=0)
    request.world.theme = request.world.theme.replace("[[when Describe a world: {", "[[when Describe a world: ")
    id_ = (await submit(clients.pipelines, request)).pipeline_id
    for _ in range(2):
        seen = await follow(clients.pipelines, id_)
        assert reason_of(seen.status.root.error) == "INVALID_OUTPUT"
        assert seen.result is None
        assert (await submit(clients.pipelines, request)).state == llm_pb2.JOB_STATE_RUNNING
    assert reason_of((await follow(clients.pipelines, id_)).status.root.error) == "INVALID_OUTPUT"


async def test_json_of_another_form_than_asked_for_is_a_failed_step_that_may_be_run_again(clients: Clients) -> None:
    """A provider may ignore the schema. Such a job has succeeded, and ended its world for ever."""
    request = new_world("formless", posts=0, images=0)
    request.world.theme = request.world.theme.replace('{"name": "Aqua"', '{"title": "Aqua"')
    id_ = (await submit(clients.pipelines, request)).pipeline_id
    job = llm_pb2.GetStatusRequest(workflow_id=f"{id_}/describe")
    runs = set()
    for _ in range(2):
        seen = await follow(clients.pipelines, id_)
        error = seen.status.root.error
        assert (reason_of(error), seen.steps["describe"].error) == ("INVALID_OUTPUT", error)
        assert error.message.endswith("name is missing")
        runs.add((await clients.jobs.GetStatus(job)).status.run_id)
        assert (await submit(clients.pipelines, request)).state == llm_pb2.JOB_STATE_RUNNING
    assert len(runs) == 2
    await follow(clients.pipelines, id_)
    critique = {"score": "9", "strengths": [], "weaknesses": [], "suggestions": [], "facts_doubtful": False}
    pipeline = pipeline_pb2.PipelineRequest(user_id="alice", request_id="formless-critique")
    pipeline.refine.topic = f"rain[[when Criticise: {json.dumps(critique)}]]"
    seen = await follow(clients.pipelines, (await submit(clients.pipelines, pipeline)).pipeline_id)
    assert reason_of(seen.status.root.error) == "INVALID_OUTPUT"
    assert seen.status.root.error.message.endswith("score must be of the type number")


@pytest.mark.long
async def test_a_failed_world_does_not_go_on_when_its_schedule_tries_its_start_again(clients: Clients) -> None:
    """As it does when it has not learned that the start was done: nobody has asked for another run."""
    world = new_world("", posts=0, images=0)
    world.user_id = ""
    world.world.theme = world.world.theme.replace("[[when Describe a world: {", "[[when Describe a world: ")
    schedules: Any = ScheduleServiceStub(clients.channel)
    schedule = new_schedule()
    schedule.pipeline.CopyFrom(world)
    id_ = await create_schedule(schedules, schedule)
    await trigger(schedules, id_)
    (run,) = ended(await until(schedules, id_, ended))
    temporal = await Client.connect(clients.stack.address("temporal"), data_converter=data_converter)
    before = await temporal.get_workflow_handle(run.workflow_id).describe()
    starter = await temporal.get_workflow_handle(await before.memo_value(names.MEMO_WAITER)).describe()
    again = await temporal.workflow_service.reset_workflow_execution(
        ResetWorkflowExecutionRequest(
            namespace=temporal.namespace,
            workflow_execution=WorkflowExecution(workflow_id=starter.id, run_id=starter.run_id),
            # The end of the first task, which asks for the start.
            workflow_task_finish_event_id=4,
            reason="the start is tried again",
            request_id=starter.id,
        )
    )
    async with asyncio.timeout(PATIENCE):
        await temporal.get_workflow_handle(starter.id, run_id=again.run_id).result()
    after = await temporal.get_workflow_handle(run.workflow_id).describe()
    assert (after.run_id, after.status) == (before.run_id, WorkflowExecutionStatus.FAILED)


async def test_a_batch_takes_no_line_for_a_model_that_makes_images(clients: Clients) -> None:
    stubs = Stubs(clients.files, BatchServiceStub(clients.channel))
    created = await create(stubs, lines_of(1, model="painter"), "alice")
    ended = await stubs.end(created.batch_id)
    assert ended.state == batch_pb2.BATCH_STATE_FAILED
    assert "makes images" in str(ended.error)


async def test_what_the_operator_has_set_holds_for_what_a_request_leaves_out(clients: Clients) -> None:
    pipeline = pipeline_pb2.PipelineRequest(user_id="alice", request_id="defaults")
    critique = {"score": 1, "strengths": [], "weaknesses": [], "suggestions": [], "facts_doubtful": False}
    pipeline.refine.topic = f"rain[[when Criticise: {json.dumps(critique)}]]"
    seen = await follow(clients.pipelines, (await submit(clients.pipelines, pipeline)).pipeline_id)
    assert seen.result is not None
    result = pipeline_pb2.RefineResult()
    assert seen.result.value.Unpack(result)
    assert (result.rounds, result.below_threshold) == (2, True)
    # Also where it runs within another one.
    outer = new_pipeline("refining", StringValue(value=pipeline.refine.topic))
    seen = await follow(clients.pipelines, (await submit(clients.pipelines, outer)).pipeline_id)
    assert seen.result is not None, seen.status.root.error
    assert seen.result.value.Unpack(result)
    assert result.rounds == 2
    swapped = new_world("swapped", models={"describe": "painter"}, image_model="docstrings")
    fields = {'pipeline.world.models["describe"]', "pipeline.world.image_model"}
    assert await bad_fields(submit(clients.pipelines, swapped)) == fields
    bare = pipeline_pb2.PipelineRequest(user_id="alice", request_id="bare")
    bare.world.SetInParent()
    assert await bad_fields(submit(clients.pipelines, bare)) == {"pipeline.world.theme", "pipeline.world.models"}


async def test_a_critique_is_not_cut_whatever_its_models_default_of_tokens(clients: Clients) -> None:
    """Its bounds say how many tokens it may have, and max_tokens is of the other steps."""
    critique = {"score": 9, "strengths": [], "weaknesses": [], "suggestions": ["x" * 400], "facts_doubtful": False}
    script = f"[[when Criticise: {json.dumps(critique)}]]"

    async def refined(key: str, **bounds: int) -> Followed:
        pipeline = pipeline_pb2.PipelineRequest(user_id="alice", request_id=key)
        spec = {"topic": f"rain{script}", "max_tokens": 3, **bounds}
        pipeline.refine.CopyFrom(pipeline_pb2.RefineSpec(**spec))
        return await follow(clients.pipelines, (await submit(clients.pipelines, pipeline)).pipeline_id)

    def used(seen: Followed) -> dict[str, int]:
        return {path: step.usage.output_tokens for path, step in seen.steps.items() if step.workflow_id}

    bounded = await refined("bounded", max_remarks=2, max_remark_length=400)
    assert bounded.status.state == llm_pb2.JOB_STATE_SUCCEEDED, bounded.status.root.error
    tokens = used(bounded)
    assert tokens.pop("rounds/1/critique") >= len(json.dumps(critique)) > DEFAULT_TOKENS
    assert tokens == {"rounds/1/write": 3, "edit": 3}
    job_id = bounded.steps["rounds/1/critique"].workflow_id
    job = (await clients.jobs.GetJob(llm_pb2.GetJobRequest(workflow_id=job_id))).job
    properties = json.loads(job.params.json_schema)["properties"]
    remarks = {"type": "array", "items": {"type": "string", "maxLength": 400}, "maxItems": 2}
    assert [properties[name] for name in ("strengths", "weaknesses", "suggestions")] == [remarks] * 3

    unbounded = await refined("unbounded", max_remark_length=0)
    assert reason_of(unbounded.status.root.error) == "INVALID_OUTPUT"
    assert unbounded.status.root.error.message.startswith(f"the output was cut after {DEFAULT_TOKENS} tokens")
    assert used(unbounded) == {"rounds/1/write": 3, "rounds/1/critique": DEFAULT_TOKENS}


async def test_the_command_downloads_the_pictures(clients: Clients, tmp_path: Path) -> None:
    request = new_world("command", posts=1)
    spec = json.dumps({"theme": request.world.theme, "models": {"describe": "docstrings"}, "imageModel": "painter"})
    folder = tmp_path / "pictures"
    words = ("pipeline", "run", "world", spec, "--images", str(folder), "--user", "ann", "--request-id", "w")
    ended = await run(
        *(sys.executable, "-m", "durable_llm", *words), DURABLE_LLM_ADDRESS=clients.stack.address("gateway")
    )
    assert ended.status == 1, ended.errors
    assert "posts/" in ended.errors
    assert len(json.loads(ended.output)["posts"]) == 1
    assert {path.name for path in folder.iterdir()} == {"images-0-image.png", "posts-0-image.png"}
    assert (folder / "images-0-image.png").read_bytes().startswith(b"\x89PNG")
    assert await refusal(download(clients.files, "output-" + "0" * 64)) == ("NOT_FOUND", "FILE_NOT_FOUND")
