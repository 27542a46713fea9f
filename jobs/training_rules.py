"""The rules that pipeline.proto states for TrainingSpec and PreprocessSpec, as code."""

from collections.abc import Iterator

from jobs.field_rules import Violation, check_model
from jobs.file_rules import check_file
from jobs.ids import OUTPUT_ID_PREFIX
from jobs.training import (
    ALIAS_PATTERN,
    LORA_MODULE_PATTERN,
    MAX_CHECKPOINT_STEPS,
    MAX_IMPROVEMENT,
    MAX_LORA_ALPHA,
    MAX_LORA_MODULES,
    MAX_LORA_RANK,
    MAX_STEP_TOKENS,
    MAX_STEPS,
    MODEL_NAME_PATTERN,
)
from llm_pb import common_pb2, pipeline_pb2


def check_training(spec: pipeline_pb2.TrainingSpec) -> Iterator[Violation]:
    """Yield the violations of the values in a TrainingSpec, whatever it lacks. Fields begin with "training."."""
    yield from _data("training", spec)
    if spec.model and MODEL_NAME_PATTERN.fullmatch(spec.model) is None:
        yield Violation("training.model", "must be a letter or digit, then up to 63 of A-Z a-z 0-9 . _ -")
    if spec.alias and ALIAS_PATTERN.fullmatch(spec.alias) is None:
        yield Violation("training.alias", "must be a letter, then up to 63 of A-Z a-z 0-9 . _ -")
    if not 0 <= spec.steps <= MAX_STEPS:
        yield Violation("training.steps", f"must be 1 to {MAX_STEPS}")
    if spec.HasField("checkpoint_every") and not 1 <= spec.checkpoint_every <= MAX_CHECKPOINT_STEPS:
        yield Violation("training.checkpoint_every", f"must be 1 to {MAX_CHECKPOINT_STEPS}")
    if spec.HasField("step_tokens") and not 2 <= spec.step_tokens <= MAX_STEP_TOKENS:
        yield Violation("training.step_tokens", f"must be 2 to {MAX_STEP_TOKENS}")
    if spec.HasField("learning_rate") and not 0 < spec.learning_rate <= 1:
        yield Violation("training.learning_rate", "must be above 0, to 1")
    if not 0 <= spec.min_improvement <= MAX_IMPROVEMENT:
        yield Violation("training.min_improvement", f"must be 0 to {MAX_IMPROVEMENT:g}")
    yield from _adapter(spec)


def _adapter(spec: pipeline_pb2.TrainingSpec) -> Iterator[Violation]:
    if not 0 <= spec.lora_rank <= MAX_LORA_RANK:
        yield Violation("training.lora_rank", f"must be 1 to {MAX_LORA_RANK}, or 0 to train all weights")
    if spec.HasField("lora_alpha") and not 0 < spec.lora_alpha <= MAX_LORA_ALPHA:
        yield Violation("training.lora_alpha", f"must be above 0, to {MAX_LORA_ALPHA:g}")
    if not 0 <= spec.lora_dropout < 1:
        yield Violation("training.lora_dropout", "must be 0 to below 1")
    if len(spec.lora_modules) > MAX_LORA_MODULES:
        yield Violation("training.lora_modules", f"must have at most {MAX_LORA_MODULES} names")
    for at, name in enumerate(spec.lora_modules[:MAX_LORA_MODULES]):
        if LORA_MODULE_PATTERN.fullmatch(name) is None:
            yield Violation(f"training.lora_modules[{at}]", "must be 1 to 128 of A-Z a-z 0-9 _ . , the first no dot")
    for field, given in (
        ("lora_alpha", spec.HasField("lora_alpha")),
        ("lora_dropout", bool(spec.lora_dropout)),
        ("lora_modules", bool(spec.lora_modules)),
    ):
        if given and not spec.lora_rank:
            yield Violation(f"training.{field}", "needs lora_rank")


def check_preprocess(spec: pipeline_pb2.PreprocessSpec) -> Iterator[Violation]:
    """Yield the violations of the values in a PreprocessSpec. Fields begin with "preprocess."."""
    yield from _data("preprocess", spec)


def check_complete_training(spec: pipeline_pb2.TrainingSpec) -> Iterator[Violation]:
    """Yield what a TrainingSpec lacks. Fields begin with "pipeline.training."."""
    yield from check_complete_preprocess(spec, "training")
    if not spec.model:
        yield Violation("pipeline.training.model", "must not be empty")
    if not spec.steps:
        yield Violation("pipeline.training.steps", f"must be 1 to {MAX_STEPS}")


def check_complete_preprocess(
    spec: pipeline_pb2.TrainingSpec | pipeline_pb2.PreprocessSpec, name: str = "preprocess"
) -> Iterator[Violation]:
    """Yield what a PreprocessSpec, or the same of a TrainingSpec, lacks. Fields begin with "pipeline." and the name."""
    if not spec.base_model:
        yield Violation(f"pipeline.{name}.base_model", "must not be empty")
    if not spec.HasField("dataset"):
        yield Violation(f"pipeline.{name}.dataset", "is required: the file with the data set")


def _data(name: str, spec: pipeline_pb2.TrainingSpec | pipeline_pb2.PreprocessSpec) -> Iterator[Violation]:
    yield from check_model(f"{name}.base_model", spec.base_model, required=False)
    if spec.HasField("dataset"):
        yield from _file(f"{name}.dataset", spec.dataset)
    if spec.HasField("held_out"):
        yield from _file(f"{name}.held_out", spec.held_out)


def _file(field: str, ref: common_pb2.FileRef) -> Iterator[Violation]:
    if ref.file_id.startswith(OUTPUT_ID_PREFIX):
        yield Violation(f"{field}.file_id", "is the output of a job; upload it as a file first")
    yield from check_file(field, ref)
