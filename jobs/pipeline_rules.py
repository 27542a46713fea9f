"""The rules that pipeline.proto states for its requests, as code. The inputs of pipelines have their own."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from jobs.field_rules import (
    Violation,
    check_bounded_duration,
    check_budget,
    check_duration,
    check_enum,
    check_id,
    check_image_size,
    check_line,
    check_model,
    check_size,
    map_path,
    too_large,
)
from jobs.ids import WORKFLOW_ID_PATTERN
from jobs.pipelines import FOLLOW_PATTERN, MAX_PATH, NAME_PATTERN, PATH_PATTERN
from jobs.rules import check_job
from jobs.training_rules import (
    check_complete_preprocess,
    check_complete_training,
    check_preprocess,
    check_training,
)
from llm_pb import common_pb2, llm_pb2, pipeline_pb2

MAX_PAGE_SIZE: Final = 100
MAX_REASON_BYTES: Final = 1024
MAX_FOLLOWED: Final = 16
MAX_INPUT_BYTES: Final = 64 * 1024
MAX_TOPIC_BYTES: Final = 16 * 1024
MAX_SCORE: Final = 10
MAX_ROUNDS: Final = 100
REFINE_STEPS: Final = ("write", "critique", "check", "edit")
WORLD_MODELS: Final = ("describe", "write")
WORLD_STEPS: Final = (*WORLD_MODELS, "image")
REFINE_NUMBERS: Final = {
    "max_rounds": (1, MAX_ROUNDS),
    "patience": (1, MAX_ROUNDS),
    "max_tokens": (1, 2**31 - 1),
    "max_remarks": (1, 20),
    "max_remark_length": (0, 4096),
}
"""The least and the greatest value of each field."""
FIRST_STEPS: Final = {"refine": "write", "world": "describe"}
"""The step whose model the steps without one have."""
WORLD_NUMBERS: Final = {
    "characters": (1, 20),
    "posts": (0, 100),
    "images": (0, 10),
    "image_limit": (1, 100),
    "seed": (0, 2**63 - 1),
    "max_tokens": (1, 2**31 - 1),
}
"""Likewise."""
MAX_TIMEOUT_SECONDS: Final = 365 * 24 * 60 * 60
"""Maximum of any operator's bound: a timer of a year."""
CURSOR_PATTERN: Final = re.compile(r"[A-Za-z0-9._-]{1,8192}")


def check_submit(request: pipeline_pb2.SubmitPipelineRequest) -> list[Violation]:
    """Return the violations of a SubmitPipelineRequest, apart from those of what the operator has registered."""
    if not request.HasField("pipeline"):
        return [Violation("pipeline", "is required")]
    return [Violation(f"pipeline.{field}", description) for field, description in _pipeline(request.pipeline)]


def check_pipeline_id(
    request: pipeline_pb2.GetPipelineRequest
    | pipeline_pb2.StreamPipelineRequest
    | pipeline_pb2.CancelPipelineRequest
    | pipeline_pb2.AnswerStepRequest,
) -> list[Violation]:
    """Return the violations of the pipeline_id of a request."""
    if WORKFLOW_ID_PATTERN.fullmatch(request.pipeline_id) is None:
        return [Violation("pipeline_id", "must be the pipeline_id that SubmitPipeline returned")]
    return []


def check_get(request: pipeline_pb2.GetPipelineRequest) -> list[Violation]:
    """Return the violations of a GetPipelineRequest."""
    return [*check_pipeline_id(request), *_path(request.path, required=False)]


def check_stream(request: pipeline_pb2.StreamPipelineRequest) -> list[Violation]:
    """Return the violations of a StreamPipelineRequest. Whether the cursor is of the pipeline is not known here."""
    violations = check_pipeline_id(request)
    if request.cursor and CURSOR_PATTERN.fullmatch(request.cursor) is None:
        violations.append(Violation("cursor", "must be the cursor of the last message that was received"))
    if len(request.follow) > MAX_FOLLOWED:
        violations.append(Violation("follow", f"must hold at most {MAX_FOLLOWED} paths, not {len(request.follow)}"))
    for index, pattern in enumerate(request.follow[:MAX_FOLLOWED]):
        if len(pattern) > MAX_PATH or FOLLOW_PATTERN.fullmatch(pattern) is None:
            rule = f"must be a path of at most {MAX_PATH} characters, with * for a name and ** for any number of names"
            violations.append(Violation(f"follow[{index}]", rule))
    return violations


def check_cancel(request: pipeline_pb2.CancelPipelineRequest) -> list[Violation]:
    """Return the violations of a CancelPipelineRequest."""
    return [*check_pipeline_id(request), *check_line("reason", request.reason, MAX_REASON_BYTES, required=False)]


def check_answer(request: pipeline_pb2.AnswerStepRequest) -> list[Violation]:
    """Return the violations of an AnswerStepRequest."""
    violations = [*check_pipeline_id(request), *_path(request.path, required=True)]
    violations += check_id("answer_id", request.answer_id, required=True)
    if request.WhichOneof("answer") is None:
        violations.append(Violation("approved", "is required: the answer"))
    return violations


def check_list(request: pipeline_pb2.ListPipelinesRequest) -> list[Violation]:
    """Return the violations of a ListPipelinesRequest. The gateway checks the page_token when it opens it."""
    violations = [*check_id("user_id", request.user_id, required=False)]
    violations += check_id("project_id", request.project_id, required=False)
    if not 0 <= request.page_size <= MAX_PAGE_SIZE:
        violations.append(Violation("page_size", f"must be 1 to {MAX_PAGE_SIZE}, or 0 for the default"))
    return violations


def _pipeline(pipeline: pipeline_pb2.PipelineRequest) -> Iterator[Violation]:
    yield from check_id("user_id", pipeline.user_id, required=True)
    yield from check_id("request_id", pipeline.request_id, required=True)
    yield from check_id("project_id", pipeline.project_id, required=False)
    if pipeline.job_class:
        yield from check_enum("job_class", pipeline.job_class, common_pb2.JobClass)
    yield from check_budget("budget", pipeline.budget)
    if pipeline.HasField("total_timeout"):
        yield from check_bounded_duration("total_timeout", pipeline.total_timeout, 1, MAX_TIMEOUT_SECONDS)
    # The targets have the rules of a job's.
    job = llm_pb2.JobRequest(user_id="u", request_id="r", model="m", prompt="p", notify=pipeline.notify)
    yield from check_job(job)
    for index, target in enumerate(pipeline.notify):
        if target.webhook.format == llm_pb2.WEBHOOK_FORMAT_OPENAI:
            yield Violation(f"notify[{index}].webhook.format", "OpenAI has no event of a pipeline: leave it unset")
    match pipeline.WhichOneof("spec"):
        case None:
            yield Violation("spec", "is required: set one of its fields")
        case "custom":
            if NAME_PATTERN.fullmatch(pipeline.custom.name) is None:
                yield Violation("custom.name", "must be the name of a pipeline that the operator has registered")
            if (size := pipeline.custom.ByteSize()) > MAX_INPUT_BYTES:
                yield Violation("custom.input", too_large(size, MAX_INPUT_BYTES))
        case _:
            yield from check_values(pipeline)


def check_values(pipeline: pipeline_pb2.PipelineRequest) -> list[Violation]:
    """Return the violations of the values in the spec of a pipeline that comes along, whatever it lacks."""
    match pipeline.WhichOneof("spec"):
        case "refine":
            return list(_refine(pipeline.refine))
        case "world":
            return list(_world(pipeline.world))
        case "training":
            return list(check_training(pipeline.training))
        case "preprocess":
            return list(check_preprocess(pipeline.preprocess))
    return []


def check_complete(pipeline: pipeline_pb2.PipelineRequest) -> list[Violation]:
    """Return what the spec of a pipeline that comes along lacks, the operator's defaults included."""
    match pipeline.WhichOneof("spec"):
        case "refine":
            given, models = {"topic": pipeline.refine.topic}, pipeline.refine.models
        case "world":
            given, models = {"theme": pipeline.world.theme}, pipeline.world.models
        case "training":
            return list(check_complete_training(pipeline.training))
        case "preprocess":
            return list(check_complete_preprocess(pipeline.preprocess))
        case _:
            return []
    kind, first = pipeline.WhichOneof("spec"), FIRST_STEPS[pipeline.WhichOneof("spec") or ""]
    lacks = [Violation(f"pipeline.{kind}.{field}", "must not be empty") for field, text in given.items() if not text]
    if first not in models:
        lacks.append(Violation(f"pipeline.{kind}.models", f"must have the model of {first}"))
    return lacks


def _refine(spec: pipeline_pb2.RefineSpec) -> Iterator[Violation]:
    yield from _text("refine.topic", spec.topic)
    yield from _of_steps("refine", spec, REFINE_STEPS, REFINE_STEPS)
    if not 0 <= spec.quality_threshold <= MAX_SCORE:
        yield Violation("refine.quality_threshold", f"must be 0 to {MAX_SCORE}")
    yield from _numbers("refine", spec, REFINE_NUMBERS)


def _world(spec: pipeline_pb2.WorldSpec) -> Iterator[Violation]:
    yield from _text("world.theme", spec.theme)
    yield from _of_steps("world", spec, WORLD_MODELS, WORLD_STEPS)
    if spec.image_model:
        yield from check_model("world.image_model", spec.image_model, required=False)
    if spec.HasField("image_size"):
        yield from check_image_size("world.image_size", spec.image_size)
    yield from _numbers("world", spec, WORLD_NUMBERS)


def _text(field: str, text: str) -> Iterator[Violation]:
    if text:
        yield from check_size(field, text, MAX_TOPIC_BYTES)


def _of_steps(kind: str, spec: Any, with_models: Sequence[str], with_times: Sequence[str]) -> Iterator[Violation]:
    """Check the maps of a spec whose keys are names of steps."""
    for field, values, known in (
        (f"{kind}.models", spec.models, with_models),
        (f"{kind}.step_timeouts", spec.step_timeouts, with_times),
    ):
        for name in values:
            if name not in known:
                yield Violation(map_path(field, name), f"must be of a step: {', '.join(known)}")
    for name in with_models:
        if name in spec.models:
            yield from check_model(map_path(f"{kind}.models", name), spec.models[name], required=True)
    for name in with_times:
        if name in spec.step_timeouts:
            yield from check_duration(map_path(f"{kind}.step_timeouts", name), spec.step_timeouts[name])


def _numbers(kind: str, spec: Any, bounds: Mapping[str, tuple[int, int]]) -> Iterator[Violation]:
    for name, (least, most) in bounds.items():
        if spec.HasField(name) and not least <= getattr(spec, name) <= most:
            yield Violation(f"{kind}.{name}", f"must be {least} to {most}")


def _path(path: str, *, required: bool) -> Iterator[Violation]:
    if (path or required) and (len(path) > MAX_PATH or PATH_PATTERN.fullmatch(path) is None):
        yield Violation("path", "must be the path of a step")
