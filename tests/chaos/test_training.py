"""Trainings on a model of two layers: from a data set to a model that answers, while trainers are killed."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest

from deploy.local.stack import Stack
from jobs import names, training
from jobs.errors import reason_of
from llm_pb import common_pb2, llm_pb2, pipeline_pb2
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from runtime.scopes import SCOPES
from tests.support.credentials import CallsAs, KeyFile
from tests.support.files import PATIENCE, bad_fields, new_file, refusal, until, upload
from tests.support.jobs import watch
from tests.support.pipelines import Followed, cancel, follow, submit
from tests.support.stacks import stack_settings
from tests.support.training import jsonl, new_training, sentences, write_tiny_model

pytestmark = pytest.mark.timeout(900)
KILLS = int(os.environ.get("CHAOS_TRAINING_KILLS", "2"))
STEPS = 100 + 60 * KILLS
SUCCEEDED = pipeline_pb2.STEP_STATE_SUCCEEDED
MODEL = {"context_tokens": 64, "max_output_tokens": 64, "default_max_tokens": 8}
MODELS = [
    {"name": "docstrings", **MODEL},
    {"name": "tuned@latest", "queue": "tuned", "tenant": "acme", **MODEL},
]


class Tenants:
    """The callers of two tenants."""

    def __init__(self, folder: Path) -> None:
        self.file = KeyFile(folder / "keys.json")
        self._keys = {tenant: self.file.add(SCOPES, tenant=tenant) for tenant in ("acme", "globex")}
        self._keys["poor"] = self.file.add(SCOPES - {"models:train", "models:*"}, tenant="acme")
        self.channel: grpc.aio.Channel

    def pipelines(self, who: str = "acme") -> Any:
        return self._as(PipelineServiceStub, who)

    def jobs(self, who: str = "acme") -> Any:
        return self._as(LlmServiceStub, who)

    async def dataset(self, texts: Iterable[str], who: str = "acme") -> common_pb2.FileRef:
        file = await upload(self._as(FileServiceStub, who), new_file(), jsonl(texts))
        return file.ref

    async def models(self, who: str = "acme") -> llm_pb2.ListModelsResponse:
        found: llm_pb2.ListModelsResponse = await self.jobs(who).ListModels(
            llm_pb2.ListModelsRequest(), timeout=PATIENCE
        )
        return found

    def _as(self, stub: Any, who: str) -> Any:
        return CallsAs(stub(self.channel), self._keys[who])


@pytest.fixture(scope="module")
async def tenants(tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    return Tenants(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
async def stack(tenants: Tenants, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    tiny = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    environment = {
        "gateway": {
            "GATEWAY_MODELS": json.dumps(MODELS),
            "GATEWAY_API_KEYS_FILE": str(tenants.file.path),
            "GATEWAY_TENANTS": '{"acme": {}, "globex": {}}',
        },
        "trainer": {
            "TRAINER_BASE_MODELS": json.dumps({"tiny": str(tiny)}),
            "TRAINER_DEVICE": "cpu",
            "TRAINER_THREADS": "1",
            "TRAINER_HEARTBEAT_TIMEOUT": "PT6S",
            "TRAINER_MAX_STEPS": "100000",
        },
        "gpu-worker": {
            "GPU_WORKER_MODEL": "tuned@latest",
            "GPU_WORKER_MODEL_TENANT": "acme",
            "GPU_WORKER_TASK_QUEUE": "tuned",
            "GPU_WORKER_ENGINE_OPTIONS": '{"device": "cpu"}',
        },
    }
    folder = tmp_path_factory.mktemp("training")
    only = ("temporal", "nats", "gateway", "trainer")
    async with (
        Stack(stack_settings(folder, engine="torch"), only=only, environment=environment) as running,
        grpc.aio.insecure_channel(running.address("gateway")) as channel,
    ):
        tenants.channel = channel
        yield running


def objects(stack: Stack, folder: str) -> list[str]:
    """Return the objects of a folder of the store, by their names."""
    root = stack.state_dir / "store"
    return sorted(str(path.relative_to(root)) for path in (root / folder).rglob("*") if path.is_file())


def last_step(stack: Stack) -> int:
    """Return the step of the last checkpoint in the store."""
    found = objects(stack, "training/checkpoints")
    return max((int(name.split("/")[-2].partition("-")[0]) for name in found if "#" not in name), default=0)


def result_of(seen: Followed) -> pipeline_pb2.TrainingResult:
    assert seen.status.state == llm_pb2.JOB_STATE_SUCCEEDED, seen.status
    assert seen.result is not None
    result = pipeline_pb2.TrainingResult()
    assert seen.result.value.Unpack(result)
    return result


async def follow_to_end(stub: Any, id_: str) -> Followed:
    """Follow a pipeline for longer than a call of tests may take."""
    seen = Followed()
    while not seen.ended:
        try:
            await follow(stub, id_, known=seen)
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
    return seen


async def train(tenants: Tenants, dataset: common_pb2.FileRef, **changes: Any) -> Followed:
    id_ = (await submit(tenants.pipelines(), new_training(dataset, **changes))).pipeline_id
    return await follow(tenants.pipelines(), id_)


async def generated(tenants: Tenants, job: llm_pb2.JobRequest) -> str:
    """Return what a job has generated, once it has succeeded."""
    submitted = await tenants.jobs().Submit(llm_pb2.SubmitRequest(job=job), timeout=PATIENCE)
    ended = await watch(tenants.jobs(), submitted.workflow_id)
    assert ended.final.status.state == llm_pb2.JOB_STATE_SUCCEEDED, ended.final
    return ended.output.decode()


async def test_a_training_makes_a_better_model_that_its_tenant_alone_uses(stack: Stack, tenants: Tenants) -> None:
    dataset = await tenants.dataset([*sentences(60), *sentences(10)])
    seen = await train(tenants, dataset, alias="stable")
    result = result_of(seen)
    assert (result.model, result.version, result.steps, result.tokens) == ("tuned@1", 1, 40, 40 * 128)
    assert result.loss < result.base_loss
    data = result.dataset
    assert (data.documents, data.held_out_documents, data.duplicates, data.reused) == (57, 3, 10, False)
    steps = ("validate", "preprocess", "train", "evaluate", "register", "clean")
    assert {path: step.state for path, step in seen.steps.items()} == dict.fromkeys(steps, SUCCEEDED)
    assert json.loads(seen.steps["train"].summary_json)["steps"] == 40
    assert not objects(stack, "training/checkpoints")
    # It is listed for its tenant alone, and a worker that starts with its name loads it.
    (model,) = (await tenants.models()).trained
    assert (model.name, dict(model.aliases)) == ("tuned", {"latest": 1, "stable": 1})
    (version,) = model.versions
    assert (version.version, version.base_model, version.pipeline_id) == (1, "tiny", seen.status.pipeline_id)
    assert (version.sha256, version.loss) == (result.sha256, result.loss)
    assert [one.name for one in (await tenants.models()).models] == ["docstrings", "tuned@latest"]
    others = await tenants.models("globex")
    assert ([one.name for one in others.models], [*others.trained]) == (["docstrings"], [])
    worker = stack.add("gpu-worker")
    await worker.start()
    await worker.wait_ready()
    # By chance a model ends its output before the first token.
    params = llm_pb2.SamplingParams(min_tokens=5)
    job = llm_pb2.JobRequest(user_id="u", request_id="r", model="tuned@latest", prompt="Day 7:", params=params)
    assert await generated(tenants, job)
    assert await bad_fields(tenants.jobs("globex").Submit(llm_pb2.SubmitRequest(job=job), timeout=PATIENCE)) == {
        "job.model"
    }
    await worker.terminate()
    # The tokens are taken over, and a version that is not better by so much is not registered.
    before = objects(stack, "models")
    seen = await train(tenants, dataset, min_improvement=50)
    result = result_of(seen)
    assert (result.model, result.version, result.sha256, result.dataset.reused) == ("", 0, b"", True)
    assert "register" not in seen.steps
    assert objects(stack, "models") == before
    # A trained model is what another training starts from.
    result = result_of(await train(tenants, dataset, base_model="tuned@stable", seed=1))
    assert (result.version, result.base_loss) == (2, version.loss)
    (model,) = (await tenants.models()).trained
    assert (dict(model.aliases), model.versions[0].base_model) == ({"latest": 2, "stable": 1}, "tuned@1")
    # An alias moves, and a version goes that none names. Other tenants and those without the scope change nothing.
    jobs = tenants.jobs()
    delete = llm_pb2.DeleteModelVersionRequest(model="tuned", version=1)
    move = llm_pb2.SetModelAliasRequest(model="tuned", alias="stable", version=2)
    assert await refusal(jobs.DeleteModelVersion(delete)) == ("FAILED_PRECONDITION", names.MODEL_VERSION_IN_USE)
    assert await refusal(tenants.jobs("globex").SetModelAlias(move)) == ("NOT_FOUND", names.MODEL_NOT_FOUND)
    assert await refusal(tenants.jobs("poor").SetModelAlias(move)) == ("PERMISSION_DENIED", "MISSING_SCOPE")
    for _ in range(2):
        assert dict((await jobs.SetModelAlias(move)).model.aliases) == {"latest": 2, "stable": 2}
    missing = llm_pb2.SetModelAliasRequest(model="tuned", alias="next", version=3)
    assert await refusal(jobs.SetModelAlias(missing)) == ("NOT_FOUND", names.MODEL_NOT_FOUND)
    for number in range(8):
        await jobs.SetModelAlias(llm_pb2.SetModelAliasRequest(model="tuned", alias=f"a{number}", version=1))
    more = llm_pb2.SetModelAliasRequest(model="tuned", alias="a8", version=1)
    full = ("FAILED_PRECONDITION", names.TOO_MANY_MODELS)
    assert await refusal(jobs.SetModelAlias(more)) == full
    assert await refusal(submit(tenants.pipelines(), new_training(dataset, alias="a8"))) == full
    for number in range(8):
        await jobs.SetModelAlias(llm_pb2.SetModelAliasRequest(model="tuned", alias=f"a{number}"))
    await jobs.SetModelAlias(llm_pb2.SetModelAliasRequest(model="tuned", alias="stable", version=1))
    # "latest" is the newest version that is left.
    delete.version = 2
    left = (await jobs.DeleteModelVersion(delete)).model
    assert ([one.version for one in left.versions], left.aliases["latest"]) == ([1], 1)
    assert await refusal(jobs.DeleteModelVersion(delete)) == ("NOT_FOUND", names.MODEL_NOT_FOUND)
    # A number is never given again. A version that was trained as an adapter is one like others.
    size, base_loss = left.versions[0].size_bytes, left.versions[0].base_loss
    result = result_of(
        await train(tenants, dataset, lora_rank=4, lora_dropout=0.1, lora_modules=["q_proj", "down_proj"])
    )
    assert (result.version, result.base_loss) == (3, base_loss)
    (model,) = (await tenants.models()).trained
    assert model.versions[0].size_bytes == pytest.approx(size, rel=0.01)
    # A worker follows its alias when it starts again.
    await worker.start()
    await worker.wait_ready()
    assert "tuned@latest is version 3" in worker.log
    job.request_id = "r-3"
    assert await generated(tenants, job)
    await worker.terminate()
    seen = await train(tenants, dataset, lora_rank=4, lora_modules=["w_proj"])
    assert reason_of(seen.status.root.error) == training.TRAINING_FAILED
    assert "the model has no module 'w_proj'; it has down_proj, " in seen.status.root.error.message
    assert "preprocess" not in seen.steps, "it is found before the data set is tokenized"


@pytest.mark.long
@pytest.mark.parametrize("adapter", [{}, {"lora_rank": 4, "lora_dropout": 0.1}], ids=["all weights", "an adapter"])
async def test_a_killed_trainers_training_has_the_weights_of_an_undisturbed_one(
    stack: Stack, tenants: Tenants, adapter: dict[str, Any]
) -> None:
    dataset = await tenants.dataset(sentences(40, seed=2))
    spec = {"steps": STEPS, "checkpoint_every": 5, "model": "killed", **adapter}
    whole = result_of(await train(tenants, dataset, **spec))
    pipelines, trainer = tenants.pipelines(), stack.processes["trainer"]
    id_ = (await submit(pipelines, new_training(dataset, **spec))).pipeline_id
    following = asyncio.create_task(follow_to_end(pipelines, id_))
    step = 0
    for _ in range(KILLS):
        before = step
        await until(lambda before=before: last_step(stack) > before or following.done())
        assert not following.done(), "the training ended before it was disturbed"
        await trainer.kill()
        step = last_step(stack)
        await trainer.start()
    seen = await following
    result = result_of(seen)
    assert result.sha256 == whole.sha256
    assert (result.loss, result.base_loss, result.tokens) == (whole.loss, whole.base_loss, whole.tokens)
    assert not objects(stack, "training/checkpoints")


@pytest.mark.long
async def test_a_trainer_that_stops_hands_over_at_its_step(stack: Stack, tenants: Tenants) -> None:
    """What it has done since the last checkpoint is not done again, and the store away for a while costs nothing."""
    dataset = await tenants.dataset(sentences(40, seed=3))
    spec = {"steps": 300, "checkpoint_every": 100_000, "model": "handed"}
    whole = result_of(await train(tenants, dataset, **spec))
    pipelines, trainer = tenants.pipelines(), stack.processes["trainer"]
    id_ = (await submit(pipelines, new_training(dataset, **spec))).pipeline_id
    await follow(pipelines, id_, until=lambda seen: "train" in seen.steps)
    following = asyncio.create_task(follow(pipelines, id_))
    await until(lambda: "training begins" in trainer.log or following.done())
    await trainer.terminate()
    stopped = last_step(stack)
    assert stopped, "it has left no checkpoint"
    away, here = stack.state_dir / "away", stack.state_dir / "store" / "training" / "checkpoints"
    here.rename(away)
    here.write_text("no folder")
    await trainer.start()
    await until(lambda: "the store is away" in trainer.log)
    here.unlink()
    away.rename(here)
    assert result_of(await following).sha256 == whole.sha256
    assert f"training begins at step {stopped} of 300" in trainer.log


@pytest.mark.long
async def test_a_cancelled_training_keeps_its_last_checkpoint_and_an_equal_one_goes_on(
    stack: Stack, tenants: Tenants
) -> None:
    dataset = await tenants.dataset(sentences(40, seed=4))
    spec = {"steps": 300, "checkpoint_every": 10, "model": "cancelled"}
    pipelines, trainer = tenants.pipelines(), stack.processes["trainer"]
    id_ = (await submit(pipelines, new_training(dataset, **spec))).pipeline_id
    await until(lambda: last_step(stack) > 0)
    await cancel(pipelines, id_)
    seen = await follow(pipelines, id_)
    assert seen.status.state == llm_pb2.JOB_STATE_CANCELLED
    assert seen.steps["train"].state == pipeline_pb2.STEP_STATE_CANCELLED
    told = json.loads(seen.steps["clean"].summary_json)
    assert told["stopped_at_step"] == last_step(stack) > 0
    assert len(objects(stack, "training/checkpoints")) == 1
    result = result_of(await train(tenants, dataset, **spec))
    assert f"training begins at step {told['stopped_at_step']} of 300" in trainer.log
    assert result.steps == 300
    # That of another's run stays until it is swept.
    assert len(objects(stack, "training/checkpoints")) == 1
    # While it runs its step shows how far it is.
    id_ = (await submit(pipelines, new_training(dataset, steps=100_000, model="endless"))).pipeline_id
    advanced = lambda seen: "train" in seen.steps and seen.steps["train"].training.step > 0  # noqa: E731
    seen = await follow(pipelines, id_, until=advanced)
    progress = seen.steps["train"].training
    assert (progress.steps, progress.loss > 0, progress.tokens_per_second > 0) == (100_000, True, True)
    await cancel(pipelines, id_)
    assert not (await follow(pipelines, id_, known=seen)).steps["train"].HasField("training")


async def test_what_cannot_be_trained_is_refused_with_a_reason(tenants: Tenants) -> None:
    pipelines, dataset = tenants.pipelines(), await tenants.dataset(sentences(5))
    assert await refusal(submit(tenants.pipelines("poor"), new_training(dataset))) == (
        "PERMISSION_DENIED",
        "MISSING_SCOPE",
    )
    # A file of another tenant is no file.
    for field, changes in (("dataset", {}), ("held_out", {"held_out": dataset})):
        own = await tenants.dataset(["a", "b"], "globex") if changes else dataset
        refused = submit(tenants.pipelines("globex"), new_training(own, **changes))
        assert await bad_fields(refused) == {f"pipeline.training.{field}.file_id"}
    for reason, changes in (
        (training.UNKNOWN_BASE_MODEL, {"base_model": "other"}),
        (training.UNKNOWN_BASE_MODEL, {"base_model": "nothing@latest"}),
        (training.LIMIT_EXCEEDED, {"steps": 100_001}),
        (training.LEAKED_DATASET, {"held_out": await tenants.dataset([sentences(1)[0].upper()])}),
    ):
        seen = await train(tenants, dataset, **changes)
        assert seen.status.state == llm_pb2.JOB_STATE_FAILED
        assert (reason_of(seen.status.root.error), reason_of(seen.steps["validate"].error)) == (reason, reason)
    prepared = pipeline_pb2.PipelineRequest(user_id="trainer", request_id="prepared")
    prepared.preprocess.CopyFrom(pipeline_pb2.PreprocessSpec(base_model="tiny", dataset=dataset))
    seen = await follow(pipelines, (await submit(pipelines, prepared)).pipeline_id)
    assert seen.result is not None
    result = pipeline_pb2.PreprocessResult()
    assert seen.result.value.Unpack(result)
    assert (result.documents, result.held_out_documents) == (4, 1)
