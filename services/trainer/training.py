"""Training by torch: steps of the optimizer, checkpoints of all that the next step depends on, the loss.

A step depends on nothing but the weights, the optimizer, the number of the step and the recipe: its rows and its random
numbers come from the seed and its number. So a training that goes on at a checkpoint makes the steps of an undisturbed
one, bit by bit where the arithmetic is the same.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from temporalio.exceptions import ApplicationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from jobs.training import TRAINING_DIVERGED
from services.trainer.adapters import Adapter, add_adapter, check_modules, merge_adapter

ROW_TOKENS: Final = 512
"""Maximum length of a row, which is what a document's token can see."""
_WARM_UP: Final = 0.05
_LAST_RATE: Final = 0.02
_SMOOTHING: Final = 0.9
_EVALUATED_ROWS: Final = 8
_METADATA: Final = "training"


class Recipe(NamedTuple):
    """How a model is trained."""

    steps: int
    seed: int
    learning_rate: float
    step_tokens: int
    adapter: Adapter | None = None
    """The adapter that is trained. None: all weights are."""

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: a linear warm-up, then a cosine."""
        warm_up = max(int(self.steps * _WARM_UP), 1)
        if step < warm_up:
            return self.learning_rate * (step + 1) / warm_up
        done = (step - warm_up) / max(self.steps - warm_up, 1)
        return self.learning_rate * (_LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * done)) / 2)


class Rows:
    """The tokens of a data set as rows of one length. The last one overlaps the one before it."""

    def __init__(self, content: bytearray, longest: int) -> None:
        """`content` has 32-bit integers."""
        self.tokens = torch.frombuffer(content, dtype=torch.int32)
        self.length = min(ROW_TOKENS, longest, len(self.tokens))
        self.count = -(-len(self.tokens) // self.length)

    def rows(self, numbers: list[int]) -> torch.Tensor:
        """Return some rows, as 64-bit integers."""
        last = len(self.tokens) - self.length
        starts = [min(number * self.length, last) for number in numbers]
        return torch.stack([self.tokens[start : start + self.length] for start in starts]).long()


class TrainingRun:
    """A model in training."""

    def __init__(self, folder: Path, recipe: Recipe, tokens: bytearray, device: str | None) -> None:
        """Load the model from its folder. Raises the errors of transformers and torch."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = load_model(folder, self._device).float()
        if recipe.adapter is not None:
            torch.manual_seed(_seed(recipe.seed, "adapter", 0))
            self._model = add_adapter(self._model, recipe.adapter)
        self._model.train()
        self._trained = trained_parameters(self._model)
        self._recipe = recipe
        self._rows = Rows(tokens, context_of(self._model))
        self._at_once = max(recipe.step_tokens // self._rows.length, 1)
        self._optimizer = torch.optim.AdamW(self._trained.values(), betas=(0.9, 0.95), weight_decay=0.05)
        self._order: tuple[int, list[int]] = (-1, [])
        self.step = 0
        """Number of steps that were done."""
        self.loss = 0.0
        """Mean loss of the last steps."""
        self.tokens_per_second = 0.0

    @property
    def tokens(self) -> int:
        """Number of tokens that the steps have read."""
        return self.step * self._at_once * self._rows.length

    def advance(self, until: int, seconds: float) -> None:
        """Do steps up to the one of a number, or until so much time is over; at least one.

        Raises ApplicationError, which is not retried, when the loss is no number.
        """
        began, before = time.monotonic(), self.tokens
        while self.step < until:
            self._do_step()
            if time.monotonic() - began >= seconds:
                break
        self.tokens_per_second = (self.tokens - before) / max(time.monotonic() - began, 1e-9)

    def _do_step(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._recipe.rate(self.step)
        # Dropout is the same in a step that is done again.
        torch.manual_seed(_seed(self._recipe.seed, "step", self.step))
        rows = self._rows.rows(self._numbers(self.step)).to(self._device)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._device.type == "cuda"):
            loss = self._model(input_ids=rows, labels=rows, use_cache=False).loss
        value = loss.item()
        if not math.isfinite(value):
            message = f"the loss of step {self.step + 1} is {value}: try a lower learning_rate"
            raise ApplicationError(message, type=TRAINING_DIVERGED, non_retryable=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained.values(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.loss = value if not self.step else _SMOOTHING * self.loss + (1 - _SMOOTHING) * value
        self.step += 1

    def _numbers(self, step: int) -> list[int]:
        """Return the numbers of the rows of a step: each epoch has all rows, in an order of its own."""
        numbers: list[int] = []
        for place in range(step * self._at_once, (step + 1) * self._at_once):
            epoch, within = divmod(place, self._rows.count)
            if self._order[0] != epoch:
                chance = torch.Generator().manual_seed(_seed(self._recipe.seed, "epoch", epoch))
                self._order = (epoch, torch.randperm(self._rows.count, generator=chance).tolist())
            numbers.append(self._order[1][within])
        return numbers

    def save(self, path: Path) -> bytes:
        """Write a checkpoint to a path; return its SHA-256. Raises OSError."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self._trained.items():
            tensors[f"model.{name}"] = parameter.detach().contiguous()
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value.contiguous()
        # One value alone: safetensors writes several in any order.
        about = {"step": self.step, "loss": self.loss}
        save_file(tensors, path, {_METADATA: json.dumps(about)})
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    def restore(self, path: Path) -> None:
        """Go on at a checkpoint. Raises ValueError for one of another model."""
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()[_METADATA])
            names = set(file.keys())
            for name, parameter in self._trained.items():
                _copy(file.get_tensor(f"model.{name}"), parameter)
                prefix = f"optimizer.{name}."
                self._optimizer.state[parameter] = {
                    key.removeprefix(prefix): file.get_tensor(key).clone() for key in names if key.startswith(prefix)
                }
        # The step stays on the CPU, the rest goes to the device.
        for state in self._optimizer.state.values():
            for key, value in state.items():
                state[key] = value if key == "step" else value.to(self._device)
        self.step, self.loss = about["step"], about["loss"]


class TrainedModel:
    """The model that a training has made, in the type of the base model's numbers."""

    def __init__(self, folder: Path, device: str | None) -> None:
        """Load the base model from its folder."""
        self._folder = folder
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = load_model(folder, self._device)
        self._dtype = self._model.dtype

    def take(self, path: Path, adapter: Adapter | None = None) -> None:
        """Take the weights of a checkpoint, or merge those of its adapter into the weights.

        Raises ValueError for a checkpoint of another model, and what add_adapter raises.
        """
        if adapter is not None:
            self._model = add_adapter(self._model.float(), adapter)
        with safe_open(path, framework="pt") as file:
            for name, parameter in trained_parameters(self._model).items():
                _copy(file.get_tensor(f"model.{name}"), parameter)
        if adapter is not None:
            self._model = merge_adapter(self._model)
            _convert(self._model, self._dtype)

    def losses(self, content: bytearray) -> Iterator[tuple[float, int]]:
        """Yield the loss per token of some rows, and the number of these rows."""
        model: Any = self._model.float().eval()
        rows = Rows(content, context_of(model))
        for start in range(0, rows.count, _EVALUATED_ROWS):
            numbers = [*range(start, min(start + _EVALUATED_ROWS, rows.count))]
            part = rows.rows(numbers).to(self._device)
            # The mode is the thread's, so it must end before the generator rests.
            with torch.inference_mode():
                loss = model(input_ids=part, labels=part, use_cache=False).loss.item()
            yield loss, len(numbers)
        _convert(model, self._dtype)

    def export(self, folder: Path) -> None:
        """Write the model with its tokenizer to a folder, in Hugging Face format."""
        _convert(self._model, self._dtype)
        self._model.save_pretrained(folder, max_shard_size="1TB")
        AutoTokenizer.from_pretrained(self._folder, local_files_only=True).save_pretrained(folder)


def load_model(folder: Path, device: torch.device) -> Any:
    """Load a model in the type of its numbers."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True, use_safetensors=True)
    return model.to(device)


def require_modules(folder: Path, adapter: Adapter) -> None:
    """Raise ValueError for modules of an adapter that the model in a folder does not have. No weights are loaded."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    check_modules(model, adapter.modules)


def trained_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of a model that are trained, by name: those of the adapter, if it has one."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def context_of(model: Any) -> int:
    """Return the maximum length of a row for a model."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or ROW_TOKENS)


def use_threads(threads: int | None) -> None:
    """Set the number of CPU threads of torch in this process."""
    if threads is not None:
        torch.set_num_threads(threads)


def _convert(model: Any, dtype: torch.dtype) -> None:
    """Convert the weights of a model, and not its buffers: a position in bfloat16 would be another one."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _copy(tensor: torch.Tensor, parameter: torch.nn.Parameter) -> None:
    if tensor.shape != parameter.shape:
        raise ValueError("the checkpoint is of another model")
    with torch.no_grad():
        parameter.copy_(tensor)


def _seed(seed: int, what: str, number: int) -> int:
    """Return a seed for one purpose."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{what}/{number}".encode()).digest()[:7])
