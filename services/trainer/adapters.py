"""LoRA adapters by peft: two thin matrices at each linear layer are trained, and the layers themselves are not.

The trained model is registered with the adapter merged into its weights, so every engine serves it like any other.
peft takes seconds to import, which trainings of all weights are spared.
"""

from typing import Any, Final, NamedTuple

from jobs.training import DEFAULT_LORA_ALPHA
from llm_pb import pipeline_pb2

_ALL: Final = "all-linear"
"""peft's name for every linear layer but the output."""
_SHOWN: Final = 32
"""Maximum number of names of modules in an error message."""


class Adapter(NamedTuple):
    """An adapter that is trained. See TrainingSpec."""

    rank: int
    alpha: float
    dropout: float
    modules: tuple[str, ...] = ()


def adapter_of(spec: pipeline_pb2.TrainingSpec) -> Adapter | None:
    """Return the adapter of a training; None for one of all weights."""
    if not spec.lora_rank:
        return None
    alpha = spec.lora_alpha if spec.HasField("lora_alpha") else DEFAULT_LORA_ALPHA * spec.lora_rank
    return Adapter(spec.lora_rank, alpha, spec.lora_dropout, tuple(sorted({*spec.lora_modules})))


def add_adapter(model: Any, adapter: Adapter) -> Any:
    """Return a model with a new adapter, whose parameters alone require gradients.

    torch's seed decides its first values. Raises ValueError for modules that the model does not have, or that peft
    cannot adapt, and ImportError without peft.
    """
    # Seconds: see the module.
    from peft import LoraConfig, get_peft_model

    check_modules(model, adapter.modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        # peft scales by alpha / r and takes any number.
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=[*adapter.modules] or _ALL,
    )
    return get_peft_model(model, config)


def merge_adapter(model: Any) -> Any:
    """Return the model of add_adapter() with the adapter merged into its weights, as it was before otherwise."""
    return model.merge_and_unload()


def check_modules(model: Any, modules: tuple[str, ...]) -> None:
    """Raise ValueError for names of modules that would be left out silently, or merged into what others share.

    The model may be one without weights, on torch's device "meta".
    """
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for wanted in modules:
        found = [part for name, part in model.named_modules() if f".{name}".endswith(f".{wanted}")]
        if not found:
            layers = {
                name.rpartition(".")[2]
                for name, part in model.named_modules()
                if _is_linear(part) and all(owners[id(parameter)] == 1 for parameter in part.parameters())
            }
            known = ", ".join(sorted(layers)[:_SHOWN]) or "none that can get an adapter"
            raise ValueError(f"lora_modules: the model has no module {wanted!r}; it has {known}")
        if any(owners[id(parameter)] > 1 for part in found for parameter in part.parameters()):
            raise ValueError(f"lora_modules: the weights of {wanted!r} are those of another module as well")


def _is_linear(part: Any) -> bool:
    """Return whether a part of a model is a linear layer, by torch's or transformers' name of its class."""
    return type(part).__name__ in ("Linear", "Conv1D")
