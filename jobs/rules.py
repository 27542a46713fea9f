"""The rules that llm.proto states for the fields of a request, as code.

They are pure functions from a message to its violations. The gateway refuses a request with all of them in one answer.
Workflow and worker check again, because a workflow can be started without the gateway.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from jobs.cache_rules import check_cache
from jobs.errors import InvalidJob
from jobs.events import takes_progress, wants
from jobs.field_rules import (
    Violation,
    check_bounded_duration,
    check_budget,
    check_duration,
    check_enum,
    check_id,
    check_image_size,
    check_labels,
    check_line,
    check_model,
    check_size,
    check_texts,
)
from jobs.file_rules import check_prompt_file
from jobs.ids import WORKFLOW_ID_PATTERN
from jobs.regex_cost import check_regex
from jobs.regex_parts import TooCostly
from jobs.resume_token import ResumeToken
from jobs.schema_cost import check_schema
from jobs.target_rules import check_target
from llm_pb import common_pb2, llm_pb2

MAX_MESSAGES: Final = 1024
MAX_NOTIFY: Final = 4
MIN_UNWATCHED_SECONDS: Final = 10
MAX_UNWATCHED_SECONDS: Final = 24 * 60 * 60
MIN_PROGRESS_SECONDS: Final = 1
MAX_PROGRESS_SECONDS: Final = 3600
MAX_STOP: Final = 16
MAX_STOP_BYTES: Final = 256
MAX_SCHEMA_BYTES: Final = 64 * 1024
MAX_REGEX_BYTES: Final = 4 * 1024
MAX_CHOICES: Final = 1000
MAX_CHOICE_BYTES: Final = 4 * 1024
MAX_CHOICES_BYTES: Final = 64 * 1024
"""Maximum size of all choices together. 64 KiB compile in a quarter of a second; 900 kB take 5 to 30 s and delay other
jobs."""
MAX_REASON_BYTES: Final = 1024
MAX_STATES: Final = 16
MAX_PAGE_SIZE: Final = 100


def check_submit(request: llm_pb2.SubmitRequest) -> list[Violation]:
    """Return the violations of a SubmitRequest, apart from those of the operator's models and limits."""
    if not request.HasField("job"):
        return [Violation("job", "is required")]
    return check_job(request.job, "job.")


def check_job(job: llm_pb2.JobRequest, path: str = "", *, strict: bool = True) -> list[Violation]:
    """Return the violations of a JobRequest.

    Without `strict`, rules that a later version added are skipped, so that jobs that were accepted before continue.
    """
    return list(_job(job, path, strict))


def require_valid(job: llm_pb2.JobRequest, *, strict: bool = True) -> None:
    """Raise InvalidJob, naming every violation, unless the job keeps the rules. No gateway may have checked it."""
    if violations := check_job(job, strict=strict):
        raise InvalidJob("; ".join(f"{field} {description}" for field, description in violations))


def check_workflow_id(
    request: llm_pb2.GetStatusRequest
    | llm_pb2.GetJobRequest
    | llm_pb2.ListDeliveriesRequest
    | llm_pb2.DeleteJobRequest,
) -> list[Violation]:
    """Return the violations of a request that only names a job."""
    return list(_workflow_id(request.workflow_id))


def check_stream(request: llm_pb2.StreamStatusRequest) -> list[Violation]:
    """Return the violations of a StreamStatusRequest."""
    violations = list(_workflow_id(request.workflow_id))
    if request.output_offset < 0:
        violations.append(Violation("output_offset", "must be 0 or more: send the last next_offset received"))
    if request.resume_token:
        token = ResumeToken.parse(request.resume_token)
        if token is None:
            violations.append(Violation("resume_token", "must be the last resume_token received, unchanged"))
        elif request.output_offset not in (0, token.offset):
            violations.append(
                Violation("output_offset", "must be unset, or the next_offset received with the resume_token")
            )
    return violations


def check_cancel(request: llm_pb2.CancelRequest) -> list[Violation]:
    """Return the violations of a CancelRequest."""
    return [*_workflow_id(request.workflow_id), *check_line("reason", request.reason, MAX_REASON_BYTES, required=False)]


def check_redeliver(request: llm_pb2.RedeliverRequest) -> list[Violation]:
    """Return the violations of a RedeliverRequest. Only Temporal knows the ids of the job's deliveries."""
    violations = list(_workflow_id(request.workflow_id))
    if len(request.delivery_ids) > MAX_NOTIFY:
        violations.append(Violation("delivery_ids", f"must hold at most {MAX_NOTIFY} ids"))
    return violations


def check_get_deletion(request: llm_pb2.GetDeletionRequest) -> list[Violation]:
    """Return the violations of a GetDeletionRequest."""
    if WORKFLOW_ID_PATTERN.fullmatch(request.deletion_id) is None:
        rule = "must be the deletion_id that DeleteJob, DeleteJobs or DeleteUser returned"
        return [Violation("deletion_id", rule)]
    return []


def check_delete_jobs(request: llm_pb2.DeleteJobsRequest) -> list[Violation]:
    """Return the violations of a DeleteJobsRequest."""
    return [*check_id("user_id", request.user_id, required=True), *check_list(filters_of(request))]


def check_delete_user(request: llm_pb2.DeleteUserRequest) -> list[Violation]:
    """Return the violations of a DeleteUserRequest."""
    return list(check_id("user_id", request.user_id, required=True))


def filters_of(request: llm_pb2.DeleteJobsRequest) -> llm_pb2.ListRequest:
    """Return the ListRequest with the same filters."""
    return llm_pb2.ListRequest(
        user_id=request.user_id, states=request.states, model=request.model, project_id=request.project_id
    )


def check_list(request: llm_pb2.ListRequest) -> list[Violation]:
    """Return the violations of a ListRequest. The gateway checks the page_token when it opens it."""
    violations = list(check_id("user_id", request.user_id, required=False))
    violations += check_id("project_id", request.project_id, required=False)
    violations += check_model("model", request.model, required=False)
    if len(request.states) > MAX_STATES:
        violations.append(Violation("states", f"must hold at most {MAX_STATES} states, not {len(request.states)}"))
    for index, state in enumerate(request.states[:MAX_STATES]):
        violations += check_enum(f"states[{index}]", state, llm_pb2.JobState)
    if len(request.classes) > MAX_STATES:
        violations.append(Violation("classes", f"must hold at most {MAX_STATES} classes, not {len(request.classes)}"))
    for index, job_class in enumerate(request.classes[:MAX_STATES]):
        violations += check_enum(f"classes[{index}]", job_class, common_pb2.JobClass)
    if not 0 <= request.page_size <= MAX_PAGE_SIZE:
        violations.append(Violation("page_size", f"must be 1 to {MAX_PAGE_SIZE}, or 0 for the default"))
    return violations


def check_list_workers(request: llm_pb2.ListWorkersRequest) -> list[Violation]:
    """Return the violations of a ListWorkersRequest."""
    return list(check_model("model", request.model, required=False))


def _job(job: llm_pb2.JobRequest, path: str, strict: bool) -> Iterator[Violation]:
    yield from check_id(f"{path}user_id", job.user_id, required=True)
    yield from check_id(f"{path}request_id", job.request_id, required=True)
    yield from check_id(f"{path}project_id", job.project_id, required=False)
    yield from check_model(f"{path}model", job.model, required=True, strict=strict)
    prompts = [name for name in ("prompt", "messages", "prompt_file") if _is_set(job, name)]
    if len(prompts) > 1:
        rule = "exactly one of prompt, messages and prompt_file must be set; remove one"
        yield Violation(f"{path}{prompts[-1]}", rule)
    elif not prompts:
        yield Violation(f"{path}prompt", "exactly one of prompt, messages and prompt_file must be set, and not empty")
    if job.HasField("prompt_file"):
        yield from check_prompt_file(f"{path}prompt_file", job.prompt_file)
    if len(job.messages) > MAX_MESSAGES:
        yield Violation(f"{path}messages", f"must hold at most {MAX_MESSAGES} messages, not {len(job.messages)}")
    for index, message in enumerate(job.messages[:MAX_MESSAGES]):
        yield from check_enum(f"{path}messages[{index}].role", message.role, llm_pb2.Role)
        if not message.content:
            yield Violation(f"{path}messages[{index}].content", "must not be empty")
    if job.HasField("image_size"):
        yield from check_image_size(f"{path}image_size", job.image_size)
    yield from _params(job.params, f"{path}params.", strict)
    if not 0 <= job.priority <= 5:
        yield Violation(f"{path}priority", "must be 1 (first) to 5 (last), or 0 for the default")
    if job.job_class:
        yield from check_enum(f"{path}job_class", job.job_class, common_pb2.JobClass)
    if len(job.notify) > MAX_NOTIFY:
        yield Violation(f"{path}notify", f"must hold at most {MAX_NOTIFY} targets, not {len(job.notify)}")
    for index, target in enumerate(job.notify[:MAX_NOTIFY]):
        yield from check_target(f"{path}notify[{index}]", target, strict)
        if not takes_progress(target) and not wants(job, llm_pb2.NOTIFY_EVENT_FINISHED):
            rule = "is of the outcome alone: add NOTIFY_EVENT_FINISHED to notify_options.events"
            yield Violation(f"{path}notify[{index}].webhook.format", rule)
    yield from _notify_options(job.notify_options, f"{path}notify_options.")
    yield from check_labels(f"{path}labels", job.labels)
    for name in ("total", "queue", "run"):
        if job.timeouts.HasField(name):
            yield from check_duration(f"{path}timeouts.{name}", getattr(job.timeouts, name))
    if job.HasField("cancel_if_unwatched"):
        yield from check_bounded_duration(
            f"{path}cancel_if_unwatched", job.cancel_if_unwatched, MIN_UNWATCHED_SECONDS, MAX_UNWATCHED_SECONDS
        )
    yield from check_budget(f"{path}budget", job.budget)
    yield from check_cache(job, path)


def _is_set(job: llm_pb2.JobRequest, name: str) -> bool:
    return job.HasField("prompt_file") if name == "prompt_file" else bool(getattr(job, name))


def _notify_options(chosen: llm_pb2.NotifyOptions, path: str) -> Iterator[Violation]:
    if len(chosen.events) != len(set(chosen.events)):
        yield Violation(f"{path}events", "must name each event once")
    for index, event in enumerate(chosen.events[: len(llm_pb2.NotifyEvent.values())]):
        yield from check_enum(f"{path}events[{index}]", event, llm_pb2.NotifyEvent)
    if chosen.HasField("progress_interval"):
        yield from check_bounded_duration(
            f"{path}progress_interval", chosen.progress_interval, MIN_PROGRESS_SECONDS, MAX_PROGRESS_SECONDS
        )


class _Range(NamedTuple):
    holds: Callable[[float], bool]
    rule: str


_PARAM_RANGES: Final = {
    "temperature": _Range(lambda v: 0 <= v <= 2, "must be 0 to 2"),
    "top_p": _Range(lambda v: 0 < v <= 1, "must be above 0 and at most 1"),
    "top_k": _Range(lambda v: 0 <= v <= 1_000_000, "must be 0 (off) to 1000000"),
    "min_p": _Range(lambda v: 0 <= v <= 1, "must be 0 to 1"),
    "max_tokens": _Range(lambda v: v >= 1, "must be at least 1"),
    "min_tokens": _Range(lambda v: v >= 0, "must be 0 or more"),
    "seed": _Range(lambda v: v >= 0, "must be 0 or more"),
    "presence_penalty": _Range(lambda v: -2 <= v <= 2, "must be -2 to 2"),
    "frequency_penalty": _Range(lambda v: -2 <= v <= 2, "must be -2 to 2"),
    "repetition_penalty": _Range(lambda v: 0 < v <= 2, "must be above 0 and at most 2"),
    "logprobs": _Range(lambda v: 0 <= v <= 20, "must be 0 to 20"),
}


def _params(params: llm_pb2.SamplingParams, path: str, strict: bool) -> Iterator[Violation]:
    for descriptor, value in params.ListFields():
        allowed = _PARAM_RANGES.get(descriptor.name)
        # NaN fails every comparison, infinities fail every range that has two ends.
        if allowed and not allowed.holds(value):
            yield Violation(path + descriptor.name, f"{allowed.rule}, not {value}")
    if params.HasField("min_tokens") and params.HasField("max_tokens") and params.min_tokens > params.max_tokens >= 1:
        yield Violation(f"{path}min_tokens", "must be at most max_tokens")
    if len(params.stop) > MAX_STOP:
        yield Violation(f"{path}stop", f"must hold at most {MAX_STOP} texts, not {len(params.stop)}")
    yield from check_texts(f"{path}stop", params.stop[:MAX_STOP], MAX_STOP_BYTES)
    match params.WhichOneof("structured_output"):
        case "json_schema":
            yield from _schema(f"{path}json_schema", params.json_schema, strict)
        case "regex":
            yield from _regex(f"{path}regex", params.regex, strict)
        case "choice":
            if not 1 <= len(params.choice.options) <= MAX_CHOICES:
                yield Violation(f"{path}choice.options", f"must hold 1 to {MAX_CHOICES} texts")
            yield from check_texts(f"{path}choice.options", params.choice.options[:MAX_CHOICES], MAX_CHOICE_BYTES)
            size = sum(len(option.encode()) for option in params.choice.options)
            if strict and size > MAX_CHOICES_BYTES:
                rule = f"must be at most {MAX_CHOICES_BYTES} bytes of UTF-8 together, not {size}"
                yield Violation(f"{path}choice.options", rule)


def _workflow_id(value: str) -> Iterator[Violation]:
    if WORKFLOW_ID_PATTERN.fullmatch(value) is None:
        yield Violation("workflow_id", "must be the workflow_id that Submit returned: llmjob-<user>-<request>")


def _regex(field: str, value: str, strict: bool) -> Iterator[Violation]:
    wrong_size = list(check_size(field, value, MAX_REGEX_BYTES))
    yield from wrong_size
    if strict and not wrong_size:
        yield from _cost(field, check_regex, value)


def _cost(field: str, check: Callable[[Any], None], value: Any) -> Iterator[Violation]:
    try:
        check(value)
    except TooCostly as error:
        yield Violation(field, str(error))


def _schema(field: str, value: str, strict: bool) -> Iterator[Violation]:
    wrong_size = list(check_size(field, value, MAX_SCHEMA_BYTES))
    if wrong_size:
        yield from wrong_size
        return
    try:
        schema = json.loads(value)
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict):
        yield Violation(field, "must be a JSON Schema: a JSON object, as text")
    elif strict:
        yield from _cost(field, check_schema, schema)
