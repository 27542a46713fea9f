"""The rules that llm.proto writes at the fields of a request, as code.

Pure functions from a message to its violations: the gateway refuses a request with all of them at once; workflow and
worker check again, because a workflow can be started past the gateway.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from google.protobuf.duration_pb2 import Duration

from jobs.errors import InvalidJob
from jobs.hosts import is_host
from jobs.ids import ID_PATTERN, WORKFLOW_ID_PATTERN
from jobs.regex_cost import check_regex
from jobs.regex_parts import TooCostly
from jobs.resume_token import ResumeToken
from jobs.schema_cost import check_schema
from llm_pb import llm_pb2

MAX_MESSAGES: Final = 1024
MAX_NOTIFY: Final = 4
MAX_SUBJECT_BYTES: Final = 128
MIN_PROGRESS_SECONDS: Final = 1
MAX_PROGRESS_SECONDS: Final = 3600
MAX_URL_BYTES: Final = 2048
MAX_STOP: Final = 16
MAX_STOP_BYTES: Final = 256
MAX_SCHEMA_BYTES: Final = 64 * 1024
MAX_REGEX_BYTES: Final = 4 * 1024
MAX_CHOICES: Final = 1000
MAX_CHOICE_BYTES: Final = 4 * 1024
MAX_CHOICES_BYTES: Final = 64 * 1024
"""All choices together: 64 KiB compile in a quarter of a second, 900 kB in 5 to 30 s, which hold up other jobs."""
MIN_TIMEOUT_MS: Final = 1
MAX_REASON_BYTES: Final = 1024
MAX_STATES: Final = 16
MAX_PAGE_SIZE: Final = 100

_ID_FORM: Final = "1 to 128 of A-Z a-z 0-9 . _ : @ = + ~ - and first a letter or digit"
MODEL_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@=+~-]{0,254}")
"""The form of a model's name: at most 255 characters, which is what a search attribute holds on PostgreSQL."""
SUBJECT_PATTERN: Final = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
TOPIC_PATTERN: Final = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Violation(NamedTuple):
    """A field that breaks a rule."""

    field: str
    """Path from the request, in proto names: job.params.stop[2]."""
    description: str
    """The rule and the fix."""


def too_large(size: int, most: int) -> str:
    """Return the rule that something of `size` bytes breaks."""
    return f"is {size} bytes; at most {most} fit"


def check_submit(request: llm_pb2.SubmitRequest) -> list[Violation]:
    """Return what is wrong with a SubmitRequest, apart from what only the operator's models and bounds can tell."""
    if not request.HasField("job"):
        return [Violation("job", "is required")]
    return check_job(request.job, "job.")


def check_job(job: llm_pb2.JobRequest, path: str = "", *, costs: bool = True) -> list[Violation]:
    """Return what is wrong with a JobRequest; `costs`: what its structured output would cost the engine included."""
    return list(_job(job, path, costs))


def require_valid(job: llm_pb2.JobRequest, *, costs: bool = True) -> None:
    """Raise InvalidJob, naming every violation, unless the job keeps the rules: it may have come past the gateway."""
    if violations := check_job(job, costs=costs):
        raise InvalidJob("; ".join(f"{field} {description}" for field, description in violations))


def check_workflow_id(request: llm_pb2.GetStatusRequest | llm_pb2.ListDeliveriesRequest) -> list[Violation]:
    """Return what is wrong with a request that only names a job."""
    return list(_workflow_id(request.workflow_id))


def check_stream(request: llm_pb2.StreamStatusRequest) -> list[Violation]:
    """Return what is wrong with a StreamStatusRequest."""
    violations = list(_workflow_id(request.workflow_id))
    if request.output_offset < 0:
        violations.append(Violation("output_offset", "must be 0 or more: send the last next_offset received"))
    if request.resume_token:
        token = ResumeToken.parse(request.resume_token)
        if token is None:
            violations.append(Violation("resume_token", "must be the last resume_token received, as it came"))
        elif request.output_offset not in (0, token.offset):
            violations.append(Violation("output_offset", "must be unset, or the next_offset beside the resume_token"))
    return violations


def check_cancel(request: llm_pb2.CancelRequest) -> list[Violation]:
    """Return what is wrong with a CancelRequest."""
    return [*_workflow_id(request.workflow_id), *_line("reason", request.reason, MAX_REASON_BYTES, required=False)]


def check_redeliver(request: llm_pb2.RedeliverRequest) -> list[Violation]:
    """Return what is wrong with a RedeliverRequest; which ids the job's deliveries have only Temporal can tell."""
    violations = list(_workflow_id(request.workflow_id))
    if len(request.delivery_ids) > MAX_NOTIFY:
        violations.append(Violation("delivery_ids", f"must hold at most {MAX_NOTIFY} ids"))
    return violations


def check_list(request: llm_pb2.ListRequest) -> list[Violation]:
    """Return what is wrong with a ListRequest; of page_token only the gateway that made it can tell."""
    violations = list(_id("user_id", request.user_id, required=False))
    violations += _id("project_id", request.project_id, required=False)
    violations += _model("model", request.model, required=False)
    if len(request.states) > MAX_STATES:
        violations.append(Violation("states", f"must hold at most {MAX_STATES} states, not {len(request.states)}"))
    for index, state in enumerate(request.states[:MAX_STATES]):
        violations += _enum(f"states[{index}]", state, llm_pb2.JobState)
    if not 0 <= request.page_size <= MAX_PAGE_SIZE:
        violations.append(Violation("page_size", f"must be 1 to {MAX_PAGE_SIZE}, or 0 for the default"))
    return violations


def _job(job: llm_pb2.JobRequest, path: str, costs: bool) -> Iterator[Violation]:
    yield from _id(f"{path}user_id", job.user_id, required=True)
    yield from _id(f"{path}request_id", job.request_id, required=True)
    yield from _id(f"{path}project_id", job.project_id, required=False)
    yield from _model(f"{path}model", job.model, required=True)
    if job.prompt and job.messages:
        yield Violation(f"{path}messages", "exactly one of prompt and messages must be set; remove one")
    elif not job.prompt and not job.messages:
        yield Violation(f"{path}prompt", "exactly one of prompt and messages must be set, and not empty")
    if len(job.messages) > MAX_MESSAGES:
        yield Violation(f"{path}messages", f"must hold at most {MAX_MESSAGES} messages, not {len(job.messages)}")
    for index, message in enumerate(job.messages[:MAX_MESSAGES]):
        yield from _enum(f"{path}messages[{index}].role", message.role, llm_pb2.Role)
        if not message.content:
            yield Violation(f"{path}messages[{index}].content", "must not be empty")
    yield from _params(job.params, f"{path}params.", costs)
    if not 0 <= job.priority <= 5:
        yield Violation(f"{path}priority", "must be 1 (first) to 5 (last), or 0 for the default")
    if len(job.notify) > MAX_NOTIFY:
        yield Violation(f"{path}notify", f"must hold at most {MAX_NOTIFY} targets, not {len(job.notify)}")
    for index, target in enumerate(job.notify[:MAX_NOTIFY]):
        yield from _target(f"{path}notify[{index}]", target)
    yield from _notify_options(job.notify_options, f"{path}notify_options.")
    for name in ("total", "queue", "run"):
        if job.timeouts.HasField(name):
            yield from _duration(f"{path}timeouts.{name}", getattr(job.timeouts, name))


def _target(path: str, target: llm_pb2.NotifyTarget) -> Iterator[Violation]:
    match target.WhichOneof("target"):
        case "webhook":
            yield from _url(f"{path}.webhook.url", target.webhook.url)
        case "nats":
            subject = target.nats.subject
            if len(subject) > MAX_SUBJECT_BYTES or SUBJECT_PATTERN.fullmatch(subject) is None:
                rule = f"must be 1 to {MAX_SUBJECT_BYTES} of A-Z a-z 0-9 _ - in tokens separated by dots"
                yield Violation(f"{path}.nats.subject", rule)
        case "kafka":
            if TOPIC_PATTERN.fullmatch(target.kafka.topic) is None:
                yield Violation(f"{path}.kafka.topic", "must be 1 to 249 of A-Z a-z 0-9 . _ -")
        case None:
            yield Violation(path, "must name a target: set webhook, nats or kafka")


def _notify_options(chosen: llm_pb2.NotifyOptions, path: str) -> Iterator[Violation]:
    if len(chosen.events) != len(set(chosen.events)):
        yield Violation(f"{path}events", "must name each event once")
    for index, event in enumerate(chosen.events[: len(llm_pb2.NotifyEvent.values())]):
        yield from _enum(f"{path}events[{index}]", event, llm_pb2.NotifyEvent)
    if chosen.HasField("progress_interval"):
        interval = chosen.progress_interval
        seconds = interval.seconds + interval.nanos / 1e9
        if not MIN_PROGRESS_SECONDS <= seconds <= MAX_PROGRESS_SECONDS or not 0 <= interval.nanos <= 999_999_999:
            rule = f"must be a duration of {MIN_PROGRESS_SECONDS} s to {MAX_PROGRESS_SECONDS} s"
            yield Violation(f"{path}progress_interval", rule)


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


def _params(params: llm_pb2.SamplingParams, path: str, costs: bool) -> Iterator[Violation]:
    for descriptor, value in params.ListFields():
        allowed = _PARAM_RANGES.get(descriptor.name)
        # NaN fails every comparison, infinities fail every range that has two ends.
        if allowed and not allowed.holds(value):
            yield Violation(path + descriptor.name, f"{allowed.rule}, not {value}")
    if params.HasField("min_tokens") and params.HasField("max_tokens") and params.min_tokens > params.max_tokens >= 1:
        yield Violation(f"{path}min_tokens", "must be at most max_tokens")
    if len(params.stop) > MAX_STOP:
        yield Violation(f"{path}stop", f"must hold at most {MAX_STOP} texts, not {len(params.stop)}")
    yield from _texts(f"{path}stop", params.stop[:MAX_STOP], MAX_STOP_BYTES)
    match params.WhichOneof("structured_output"):
        case "json_schema":
            yield from _schema(f"{path}json_schema", params.json_schema, costs)
        case "regex":
            yield from _regex(f"{path}regex", params.regex, costs)
        case "choice":
            if not 1 <= len(params.choice.options) <= MAX_CHOICES:
                yield Violation(f"{path}choice.options", f"must hold 1 to {MAX_CHOICES} texts")
            yield from _texts(f"{path}choice.options", params.choice.options[:MAX_CHOICES], MAX_CHOICE_BYTES)
            size = sum(len(option.encode()) for option in params.choice.options)
            if costs and size > MAX_CHOICES_BYTES:
                rule = f"must be at most {MAX_CHOICES_BYTES} bytes of UTF-8 together, not {size}"
                yield Violation(f"{path}choice.options", rule)


def _workflow_id(value: str) -> Iterator[Violation]:
    if WORKFLOW_ID_PATTERN.fullmatch(value) is None:
        yield Violation("workflow_id", "must be the workflow_id that Submit returned: llmjob-<user>-<request>")


def _id(field: str, value: str, *, required: bool) -> Iterator[Violation]:
    if not value:
        if required:
            yield Violation(field, f"is required: {_ID_FORM}")
    elif ID_PATTERN.fullmatch(value) is None:
        yield Violation(field, f"must be {_ID_FORM}")


def _model(field: str, value: str, *, required: bool) -> Iterator[Violation]:
    if not value:
        if required:
            yield Violation(field, "is required: a model name that ListModels returns")
    elif MODEL_PATTERN.fullmatch(value) is None:
        yield Violation(field, "must be a model name that ListModels returns")


def _line(field: str, value: str, max_bytes: int, *, required: bool) -> Iterator[Violation]:
    if required and not value:
        yield Violation(field, "is required")
    elif len(value.encode()) > max_bytes:
        yield Violation(field, f"must be at most {max_bytes} bytes of UTF-8")
    elif _CONTROL.search(value):
        yield Violation(field, "must not hold control characters")


def _size(field: str, value: str, max_bytes: int) -> Iterator[Violation]:
    if not value:
        yield Violation(field, "must not be empty")
    elif len(value.encode()) > max_bytes:
        yield Violation(field, f"must be at most {max_bytes} bytes of UTF-8")


def _texts(field: str, values: Iterable[str], max_bytes: int) -> Iterator[Violation]:
    for index, value in enumerate(values):
        yield from _size(f"{field}[{index}]", value, max_bytes)


def _regex(field: str, value: str, costs: bool) -> Iterator[Violation]:
    wrong_size = list(_size(field, value, MAX_REGEX_BYTES))
    yield from wrong_size
    if costs and not wrong_size:
        yield from _cost(field, check_regex, value)


def _cost(field: str, check: Callable[[Any], None], value: Any) -> Iterator[Violation]:
    try:
        check(value)
    except TooCostly as error:
        yield Violation(field, str(error))


def _schema(field: str, value: str, costs: bool) -> Iterator[Violation]:
    wrong_size = list(_size(field, value, MAX_SCHEMA_BYTES))
    if wrong_size:
        yield from wrong_size
        return
    try:
        schema = json.loads(value)
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict):
        yield Violation(field, "must be a JSON Schema: a JSON object, as text")
    elif costs:
        yield from _cost(field, check_schema, schema)


def _enum(field: str, value: int, enum: type) -> Iterator[Violation]:
    names = enum.keys()[1:]  # type: ignore[attr-defined]  # the wrapper's class has no public name
    if value not in enum.values()[1:]:  # type: ignore[attr-defined]
        yield Violation(field, f"must be one of {', '.join(names)}")


def _duration(field: str, value: Duration) -> Iterator[Violation]:
    # Temporal takes a limit that rounds to 0 as none at all.
    too_short = value.seconds == 0 and value.nanos < MIN_TIMEOUT_MS * 1_000_000
    if value.seconds < 0 or not 0 <= value.nanos <= 999_999_999 or too_short:
        yield Violation(field, f"must be a duration of at least {MIN_TIMEOUT_MS} ms")


def _url(field: str, value: str) -> Iterator[Violation]:
    if not value:
        yield Violation(field, "is required: an absolute http or https URL")
        return
    wrong = list(_line(field, value, MAX_URL_BYTES, required=True))
    if wrong:
        # A long text costs urlsplit seconds.
        yield from wrong
        return
    try:
        url = urlsplit(value)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        usable = False
    else:
        if url.username is not None or url.password is not None:
            yield Violation(field, "must not hold a user or password")
        # A name in another alphabet is turned into ASCII, and looked at, by what sends there.
        host = url.hostname or ""
        in_brackets = "[" in url.netloc
        if usable and host.isascii() and not (is_host(host) and in_brackets == (":" in host)):
            rule = "must name a host that can exist: a DNS name, an IPv4 address of four numbers or an IPv6 address"
            yield Violation(field, rule)
    if not usable or re.search(r"[\s\\]", value):
        yield Violation(field, "must be an absolute http or https URL")
