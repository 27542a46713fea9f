"""What a training is made of: data sets, and steps that a checkpoint does not change.

The tests import torch, and not the module: every process of pytest-xdist imports all modules, and torch takes seconds.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors import SafetensorError
from temporalio.client import WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from jobs import names, training
from llm_pb import internal_pb2
from models import DOCSTRINGS
from services.trainer.adapters import Adapter, check_modules
from services.trainer.checkpoints import recipe_of
from services.trainer.dataset import inspect, read
from services.trainer.device import Device
from services.trainer.failures import step_errors
from tests.support.training import jsonl, sentences, write_tiny_model

if TYPE_CHECKING:
    from services.trainer.training import TrainedModel, TrainingRun


pytestmark = pytest.mark.heavy
ADAPTER = Adapter(rank=4, alpha=8, dropout=0.1, modules=("down_proj", "q_proj"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tokens(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    from services.trainer.tokenizing import Tokenizing

    path = tmp_path_factory.mktemp("data") / "data"
    path.write_bytes(jsonl(sentences(60)))
    joined = array("i")
    for piece in Tokenizing(tiny).tokens(read(path, "dataset", 100)):
        joined.extend(piece)
    return joined.tobytes()


def weights(run: TrainingRun, path: Path) -> str:
    run.save(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_model_without_a_linear_layer_has_no_module_for_an_adapter() -> None:
    import torch

    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match=r"no module 'q_proj'; it has none that can get an adapter$"):
        check_modules(model, ("q_proj",))


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["all weights", "an adapter"])
def test_a_run_that_goes_on_at_a_checkpoint_has_the_weights_of_an_undisturbed_one(
    tiny: Path, tokens: bytes, tmp_path: Path, adapter: Adapter | None
) -> None:
    from services.trainer.training import Recipe, TrainingRun

    recipe = Recipe(steps=9, seed=3, learning_rate=1e-2, step_tokens=128, adapter=adapter)
    whole = TrainingRun(tiny, recipe, bytearray(tokens), "cpu")
    whole.advance(9, 600)
    for stop in (1, 4, 8):
        run = TrainingRun(tiny, recipe, bytearray(tokens), "cpu")
        run.advance(stop, 600)
        run.save(tmp_path / "checkpoint")
        after = TrainingRun(tiny, recipe, bytearray(tokens), "cpu")
        after.restore(tmp_path / "checkpoint")
        assert (after.step, after.loss, after.tokens) == (stop, run.loss, run.tokens)
        after.advance(9, 600)
        assert weights(after, tmp_path / "b") == weights(whole, tmp_path / "a")
    other = TrainingRun(tiny, recipe._replace(seed=4), bytearray(tokens), "cpu")
    other.advance(9, 600)
    assert weights(other, tmp_path / "b") != weights(whole, tmp_path / "a"), "the seed decides nothing"


@pytest.mark.parametrize(
    ("adapter", "better"), [(None, 0.5), (ADAPTER._replace(modules=()), 0.1)], ids=["all weights", "an adapter"]
)
def test_a_trained_model_is_better_and_its_export_is_always_the_same(
    tiny: Path, tokens: bytes, tmp_path: Path, adapter: Adapter | None, better: float
) -> None:
    from services.trainer.training import Recipe, TrainedModel, TrainingRun

    run = TrainingRun(tiny, Recipe(30, 0, 1e-2, 256, adapter), bytearray(tokens), "cpu")
    run.advance(30, 600)
    run.save(tmp_path / "checkpoint")
    exported = []
    for name in ("a", "b"):
        model = TrainedModel(tiny, "cpu")
        before = loss_of(model, tokens)
        model.take(tmp_path / "checkpoint", adapter)
        assert loss_of(model, tokens) < before - better
        model.export(tmp_path / name)
        exported.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert exported[0] == exported[1]
    assert exported[0].keys() >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_an_adapters_checkpoint_is_small_and_its_model_has_the_base_models_form(
    tiny: Path, tokens: bytes, tmp_path: Path
) -> None:
    """Every engine serves it: no name and no shape tells that there was an adapter."""
    from safetensors import safe_open

    from services.trainer.training import Recipe, TrainedModel, TrainingRun

    run = TrainingRun(tiny, Recipe(2, 0, 1e-2, 256, ADAPTER), bytearray(tokens), "cpu")
    run.advance(2, 600)
    run.save(tmp_path / "checkpoint")
    model = TrainedModel(tiny, "cpu")
    model.take(tmp_path / "checkpoint", ADAPTER)
    model.export(tmp_path / "model")
    changed, tensors = set[str](), []
    for folder in (tiny, tmp_path / "model"):
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            tensors.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    for name, tensor in tensors[0].items():
        assert tensors[1][name].shape == tensor.shape
        if not tensor.equal(tensors[1][name]):
            changed.add(name.rsplit(".", 2)[-2])
    assert tensors[0].keys() == tensors[1].keys()
    assert changed == {"q_proj", "down_proj"}
    with safe_open(tmp_path / "checkpoint", framework="pt") as file:
        names = [*file.keys()]
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names), "the base model is stored as well"


@pytest.mark.parametrize(
    ("module", "words"), [("w_proj", "no module 'w_proj'"), ("lm_head", "'lm_head' are those of another")]
)
def test_modules_that_cannot_have_an_adapter_are_named(tiny: Path, tokens: bytes, module: str, words: str) -> None:
    from services.trainer.training import Recipe, TrainingRun

    adapter = ADAPTER._replace(modules=("q_proj", module))
    with pytest.raises(ValueError, match=words):
        TrainingRun(tiny, Recipe(1, 0, 1e-2, 256, adapter), bytearray(tokens), "cpu")


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["all weights", "an adapter"])
def test_a_model_of_small_numbers_that_has_learnt_nothing_has_the_loss_of_its_base(
    tokens: bytes, tmp_path: Path, adapter: Adapter | None
) -> None:
    """Weights become bfloat16 again, and positions must not."""
    from services.trainer.training import Recipe, TrainedModel, TrainingRun

    TrainingRun(DOCSTRINGS, Recipe(1, 0, 1e-2, 64, adapter), bytearray(tokens), "cpu").save(tmp_path / "checkpoint")
    model = TrainedModel(DOCSTRINGS, "cpu")
    before = loss_of(model, tokens)
    model.take(tmp_path / "checkpoint", adapter)
    assert loss_of(model, tokens) == before


def test_an_evaluation_that_rests_changes_nothing_for_others(tiny: Path, tokens: bytes) -> None:
    """Threads are shared: one that has evaluated some rows trains another model next."""
    from services.trainer.training import Recipe, TrainedModel, TrainingRun

    losses = TrainedModel(tiny, "cpu").losses(bytearray(tokens))
    next(losses)
    TrainingRun(tiny, Recipe(1, 0, 1e-2, 64), bytearray(tokens), "cpu").advance(1, 600)


def loss_of(model: TrainedModel, tokens: bytes) -> float:
    parts = [*model.losses(bytearray(tokens))]
    return sum(loss * rows for loss, rows in parts) / sum(rows for _, rows in parts)


def test_a_learning_rate_that_is_too_high_ends_the_training(tiny: Path, tokens: bytes) -> None:
    from services.trainer.training import Recipe, TrainingRun

    run = TrainingRun(tiny, Recipe(50, 0, 1e30, 128), bytearray(tokens), "cpu")
    with pytest.raises(ApplicationError) as caught:
        run.advance(50, 600)
    assert (caught.value.type, caught.value.non_retryable) == (training.TRAINING_DIVERGED, True)


def test_everything_that_decides_the_weights_is_in_the_recipe() -> None:
    task = internal_pb2.TrainingTask(run="a")
    task.spec.steps = 5
    task.dataset.shards.add(sha256=b"a")
    known = {recipe_of(task)}
    task.run = "b"
    task.spec.checkpoint_every = 7
    assert recipe_of(task) in known, "another run does not go on with it"
    for change in (
        lambda: setattr(task.spec, "steps", 6),
        lambda: setattr(task.spec, "seed", 1),
        lambda: setattr(task.spec, "learning_rate", 0.1),
        lambda: setattr(task.spec, "step_tokens", 7),
        lambda: setattr(task.report, "base_sha256", b"b"),
        lambda: setattr(task.spec, "lora_rank", 8),
        lambda: setattr(task.spec, "lora_rank", 4),
        lambda: setattr(task.spec, "lora_alpha", 3),
        lambda: setattr(task.spec, "lora_dropout", 0.5),
        lambda: task.spec.lora_modules.append("q_proj"),
        lambda: task.dataset.shards.add(sha256=b"b"),
    ):
        change()
        assert recipe_of(task) not in known
        known.add(recipe_of(task))


@pytest.mark.parametrize(
    ("content", "held_out", "reason", "words"),
    [
        (b'{"text": "a"}\n{"text": "b"', None, training.INVALID_DATASET, "dataset: line 2 is no JSON"),
        (b'{"text": "a"}\n\n[1]\n{}\n', None, training.INVALID_DATASET, "line 3 must be an object"),
        (b'{"text": " "}\n{"text": "\\ud800"}\n', None, training.INVALID_DATASET, "half a surrogate pair"),
        (b'{"text": "a", "messages": []}\n', None, training.INVALID_DATASET, "either"),
        (b"[" * 100_000 + b"\n", None, training.INVALID_DATASET, "line 1 is no JSON"),
        (b'{"text": "A  b"}\n{"text": "a B"}\n', None, training.INVALID_DATASET, "fewer than two"),
        (b'{"text": "\xff"}\n', None, training.INVALID_DATASET, "line 1 is no UTF-8 from byte 10 on"),
        ('{"text": "a"}\n'.encode("utf-16-be"), None, training.INVALID_DATASET, "line 1 is no JSON"),
        (
            json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode(),
            None,
            training.INVALID_DATASET,
            "no message of the assistant",
        ),
        (
            json.dumps({"messages": [{"role": "boss", "content": "hi"}]}).encode(),
            None,
            training.INVALID_DATASET,
            "role",
        ),
        (jsonl("abcdefghijk"), None, training.LIMIT_EXCEEDED, "more than 10 documents"),
        (jsonl(["x", "One  two", "y"]), jsonl(["one TWO"]), training.LEAKED_DATASET, "1 documents of dataset"),
        (jsonl(["x", "y"]), b"\n", training.INVALID_DATASET, "held_out has no document"),
    ],
)
def test_a_bad_data_set_is_refused_and_the_line_named(
    tmp_path: Path, content: bytes, held_out: bytes | None, reason: str, words: str
) -> None:
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(held_out or b"")
    with pytest.raises(ApplicationError, match=words) as caught:
        inspect(tmp_path / "a", tmp_path / "b" if held_out is not None else None, 10)
    assert (caught.value.type, caught.value.non_retryable) == (reason, True)


def test_the_same_documents_are_held_out_in_any_order(tmp_path: Path) -> None:
    texts = sentences(50)
    held = []
    for order in (texts, [*reversed(texts)], [*texts, *texts]):
        (tmp_path / "a").write_bytes(jsonl(order))
        held.append(inspect(tmp_path / "a", None, 1000).held_out)
    assert held[0] == held[1] == held[2]
    assert len(held[0]) == 3


def test_messages_become_the_text_of_the_models_template(tiny: Path, tmp_path: Path) -> None:
    from services.trainer.tokenizing import Tokenizing

    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "a").write_text(json.dumps({"messages": messages}) + "\n")
    tokenizing: Any = Tokenizing(tiny)
    (tokens,) = tokenizing.tokens(read(tmp_path / "a", "dataset", 10))
    assert tokenizing._tokenizer.decode([*tokens]) == "<|user|>\nhi<|end|>\n<|assistant|>\nho<|end|>\n<|endoftext|>"


def test_a_full_disk_is_named_and_tried_again() -> None:
    with pytest.raises(ApplicationError, match="TRAINER_WORK_DIR") as caught, step_errors():
        Path("/dev/full").write_bytes(b"a" * 100_000)
    assert (caught.value.type, caught.value.non_retryable) == (training.OUT_OF_SPACE, False)


def test_a_disk_that_is_full_is_known_by_the_error_of_safetensors() -> None:
    """Which has no errno: it writes a file next to the one that it replaces."""
    with pytest.raises(ApplicationError, match="TRAINER_WORK_DIR"), step_errors():
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


async def test_a_second_cancel_does_not_give_the_device_away() -> None:
    """Its thread still writes the weights that whoever is next would read."""
    device, go_on, order = Device(), threading.Event(), list[str]()

    def step() -> None:
        assert go_on.wait(60)
        order.append("step")

    stepping = asyncio.create_task(device.run(step))
    await asyncio.sleep(0)
    saving = asyncio.create_task(device.run(order.append, "save"))
    for _ in range(2):
        stepping.cancel()
        await asyncio.wait([stepping, saving], timeout=0.1)
    assert not saving.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await stepping
    await saving
    assert order == ["step", "save"]


@pytest.mark.parametrize(
    ("message", "reason", "again", "lost"),
    [
        ("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be", training.GPU_LOST, True, True),
        ("CUDA error: the launch timed out and was terminated", training.GPU_LOST, True, True),
        ("No CUDA GPUs are available", training.GPU_LOST, True, True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`", training.GPU_LOST, True, True),
        ("CUDA error: device-side assert triggered", training.TRAINING_FAILED, False, False),
        ("CUDA out of memory. Tried to allocate 20.00 GiB", training.OUT_OF_MEMORY, False, False),
        ("CUDA error: out of memory", training.OUT_OF_MEMORY, False, False),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`", training.OUT_OF_MEMORY, False, False),
        ("DefaultCPUAllocator: can't allocate memory", training.OUT_OF_MEMORY, False, False),
        ("mat1 and mat2 shapes cannot be multiplied", training.TRAINING_FAILED, False, False),
    ],
)
def test_a_lost_gpu_is_tried_elsewhere_and_nothing_else_of_torch(
    message: str, reason: str, again: bool, lost: bool
) -> None:
    device = Device()
    with pytest.raises(ApplicationError) as caught, step_errors(device):
        raise RuntimeError(message)
    error = caught.value
    assert (error.type, not error.non_retryable, device.lost.is_set()) == (reason, again, lost)


async def test_a_trainer_ends_once_its_gpu_is_lost() -> None:
    """Each of its steps would fail, and take one after the other from trainers that have a GPU."""
    device = Device()
    ended = asyncio.create_task(device.require())
    with pytest.raises(ApplicationError), step_errors(device):
        raise RuntimeError("CUDA error: unspecified launch failure")
    with pytest.raises(RuntimeError, match="lost its GPU"):
        await asyncio.wait_for(ended, 10)


@pytest.mark.parametrize(
    ("error_type", "final"),
    [
        (names.TOO_MANY_MODELS, True),
        # The run of the registry has ended meanwhile; its worker failed.
        ("AcceptedUpdateCompletedWorkflow", False),
        ("RuntimeError", False),
    ],
)
async def test_only_a_refusal_of_the_registry_ends_a_training(error_type: str, final: bool) -> None:
    """Whatever else ended its update failed the training for good, after hours."""
    from services.trainer.steps import TrainingSteps

    class Registry:
        async def execute_update_with_start_workflow(self, *_: Any, **__: Any) -> None:
            raise WorkflowUpdateFailedError(ApplicationError("scripted", type=error_type))

    client: Any = Registry()
    steps = TrainingSteps(client, *[None] * 4)  # type: ignore[arg-type]
    with pytest.raises(ApplicationError if final else WorkflowUpdateFailedError) as caught:
        await ActivityEnvironment().run(steps.register, internal_pb2.TrainingTask(workflow_queue="q"))
    assert getattr(caught.value, "non_retryable", False) == final
