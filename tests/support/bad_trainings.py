"""TrainingSpec and PreprocessSpec that break a rule of pipeline.proto. See tests.support.bad_pipelines."""

from collections.abc import Iterator
from typing import Any, Final

NO_FILE: Final = {"file_id": f"file-{'0' * 64}"}
_SPEC: Final[dict[str, Any]] = {"base_model": "tiny", "model": "m", "dataset": NO_FILE, "steps": 1}
_BAD: Final[tuple[tuple[str, str, dict[str, Any]], ...]] = (
    ("no name", "model", {"model": ""}),
    ("a path as name", "model", {"model": "a/b"}),
    ("a version as name", "model", {"model": "a@1"}),
    ("a long name", "model", {"model": "a" * 65}),
    ("no steps", "steps", {"steps": 0}),
    ("too many steps", "steps", {"steps": 1_000_001}),
    ("no checkpoints", "checkpoint_every", {"checkpoint_every": 0}),
    ("few checkpoints", "checkpoint_every", {"checkpoint_every": 100_001}),
    ("worse models", "min_improvement", {"min_improvement": -0.1}),
    ("no improvement", "min_improvement", {"min_improvement": float("nan")}),
    ("a negative rank", "lora_rank", {"lora_rank": -1}),
    ("a high rank", "lora_rank", {"lora_rank": 513}),
    ("no alpha", "lora_alpha", {"lora_rank": 8, "lora_alpha": 0}),
    ("endless alpha", "lora_alpha", {"lora_rank": 8, "lora_alpha": float("inf")}),
    ("alpha without an adapter", "lora_alpha", {"lora_alpha": 8}),
    ("all inputs left out", "lora_dropout", {"lora_rank": 8, "lora_dropout": 1}),
    ("no dropout", "lora_dropout", {"lora_rank": 8, "lora_dropout": float("nan")}),
    ("dropout without an adapter", "lora_dropout", {"lora_dropout": 0.1}),
    ("a pattern as module", "lora_modules[1]", {"lora_rank": 8, "lora_modules": ["q_proj", ".*"]}),
    ("no module", "lora_modules[0]", {"lora_rank": 8, "lora_modules": [""]}),
    ("many modules", "lora_modules", {"lora_rank": 8, "lora_modules": ["a"] * 33}),
    ("modules without an adapter", "lora_modules", {"lora_modules": ["q_proj"]}),
    ("no rate", "learning_rate", {"learning_rate": 0}),
    ("a high rate", "learning_rate", {"learning_rate": 1.1}),
    ("one token", "step_tokens", {"step_tokens": 1}),
    ("many tokens", "step_tokens", {"step_tokens": 1_048_577}),
    ("a version as alias", "alias", {"alias": "1"}),
    ("a long alias", "alias", {"alias": "a" * 65}),
)
_BAD_DATA: Final[tuple[tuple[str, str, dict[str, Any]], ...]] = (
    ("no base model", "base_model", {"base_model": ""}),
    ("a bad base model", "base_model", {"base_model": "a b"}),
    ("no data set", "dataset", {"dataset": None}),
    *(
        (f"a bad {field}", f"{field}.{part}", {field: {**NO_FILE, part: value}})
        for field in ("dataset", "held_out")
        for part, value in (
            ("file_id", "../a"),
            ("file_id", f"output-{'0' * 64}"),
            ("sha256", b"a"),
            ("size_bytes", -1),
        )
    ),
)


def bad_trainings() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield what is wrong, the field of the pipeline that the error must name, and the field that holds the spec."""
    for what, field, values in (*_BAD, *_BAD_DATA):
        yield f"training of {what}", f"training.{field}", {"training": {**_SPEC, **values}}
    data = {name: _SPEC[name] for name in ("base_model", "dataset")}
    for what, field, values in _BAD_DATA:
        yield f"preprocess of {what}", f"preprocess.{field}", {"preprocess": {**data, **values}}
