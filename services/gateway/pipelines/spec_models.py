"""The models that the input of a pipeline names, checked before it starts and not step by step."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from jobs.field_rules import MODEL_PATTERN, Violation, map_path
from llm_pb import pipeline_pb2
from services.gateway.models.settings import Model

_STRUCTURED: Final[Mapping[str, Sequence[Sequence[str]]]] = {
    "refine": [("critique", "write")],
    "world": [("describe",), ("write", "describe")],
}
"""By pipeline, for each step whose output has a schema: the keys of `models`, of which the first one that is set names
the model of the step."""


def check_models(pipeline: pipeline_pb2.PipelineRequest, models: Iterable[Model]) -> list[Violation]:
    """Return the violations of models that are not served, make the wrong thing, or have no price for a budget."""
    served = {model.name: model for model in models}
    structured = set(_structured(pipeline))
    violations = []
    for field, name in _named(pipeline):
        if MODEL_PATTERN.fullmatch(name) is None:
            # The rules have refused it already.
            continue
        images = field.endswith(".image_model")
        if (model := served.get(name)) is None:
            fitting = [other.name for other in served.values() if bool(other.image_sizes) == images]
            none = f"no model here makes {'images' if images else 'texts'}"
            choice = f"choose one of: {', '.join(fitting)}" if fitting else none
            violations.append(Violation(field, f"is not served here; {choice}"))
        elif images != bool(model.image_sizes):
            violations.append(Violation(field, f"the model {name} makes {'' if model.image_sizes else 'no '}images"))
        elif field in structured and not model.structured_output:
            violations.append(
                Violation(field, f"the model {name} does not support structured output, which the step needs")
            )
        elif pipeline.budget.cost_micros and model.price is None:
            violations.append(Violation("pipeline.budget.cost_micros", f"the model {name} has no price"))
    return violations


def _structured(pipeline: pipeline_pb2.PipelineRequest) -> Iterator[str]:
    """Yield the fields that name the models of steps whose output has a schema."""
    kind = pipeline.WhichOneof("spec") or ""
    for keys in _STRUCTURED.get(kind, []):
        spec: Any = getattr(pipeline, kind)
        if (key := next((key for key in keys if key in spec.models), None)) is not None:
            yield map_path(f"pipeline.{kind}.models", key)


def _named(pipeline: pipeline_pb2.PipelineRequest) -> Iterator[tuple[str, str]]:
    """Yield each field that names a model, with the name. What a custom pipeline calls is not known."""
    kind = pipeline.WhichOneof("spec")
    if kind is None or kind == "custom":
        return
    spec: Any = getattr(pipeline, kind)
    fields = spec.DESCRIPTOR.fields_by_name
    if "models" in fields:
        for step, name in sorted(spec.models.items()):
            yield map_path(f"pipeline.{kind}.models", step), name
    if "image_model" in fields and spec.image_model:
        yield f"pipeline.{kind}.image_model", spec.image_model
