"""The rules that pipeline.proto states for its requests, as code. The inputs of pipelines have their own."""

import re
from collections.abc import Iterator
from typing import Final

from jobs.field_rules import (
    Violation,
    check_bounded_duration,
    check_budget,
    check_duration,
    check_enum,
    check_id,
    check_line,
    check_model,
    check_size,
    map_path,
    too_large,
)
from jobs.ids import WORKFLOW_ID_PATTERN
from jobs.pipelines import FOLLOW_PATTERN, MAX_PATH, NAME_PATTERN, PATH_PATTERN
from jobs.rules import check_job
from llm_pb import common_pb2, llm_pb2, pipeline_pb2

MAX_PAGE_SIZE: Final = 100
MAX_REASON_BYTES: Final = 1024
MAX_FOLLOWED: Final = 16
MAX_INPUT_BYTES: Final = 64 * 1024
MAX_TOPIC_BYTES: Final = 16 * 1024
MAX_SCORE: Final = 10
MAX_ROUNDS: Final = 100
REFINE_STEPS: Final = ("write", "critique", "check", "edit")
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
        case "refine":
            yield from _refine(pipeline.refine)


def _refine(spec: pipeline_pb2.RefineSpec) -> Iterator[Violation]:
    yield from check_size("refine.topic", spec.topic, MAX_TOPIC_BYTES)
    names = ", ".join(REFINE_STEPS)
    if "write" not in spec.models:
        yield Violation("refine.models", "must have the model of write")
    for field, values in (("refine.models", spec.models), ("refine.step_timeouts", spec.step_timeouts)):
        for name in values:
            if name not in REFINE_STEPS:
                yield Violation(map_path(field, name), f"must be of a step: {names}")
    for name in REFINE_STEPS:
        if name in spec.models:
            yield from check_model(map_path("refine.models", name), spec.models[name], required=True)
        if name in spec.step_timeouts:
            yield from check_duration(map_path("refine.step_timeouts", name), spec.step_timeouts[name])
    if not 0 <= spec.quality_threshold <= MAX_SCORE:
        yield Violation("refine.quality_threshold", f"must be 0 to {MAX_SCORE}")
    if spec.HasField("max_rounds") and not 1 <= spec.max_rounds <= MAX_ROUNDS:
        yield Violation("refine.max_rounds", f"must be 1 to {MAX_ROUNDS}")
    if spec.HasField("patience") and not 1 <= spec.patience <= MAX_ROUNDS:
        yield Violation("refine.patience", f"must be 1 to {MAX_ROUNDS}")


def _path(path: str, *, required: bool) -> Iterator[Violation]:
    if (path or required) and (len(path) > MAX_PATH or PATH_PATTERN.fullmatch(path) is None):
        yield Violation("path", "must be the path of a step")
