"""A pipeline between its workflow and those who read it: paths, states, errors."""

import re
from datetime import timedelta
from typing import Final

from google.protobuf.message import Message
from google.rpc import code_pb2, status_pb2

from jobs.batches import WINDOW_OVER
from jobs.errors import error_info, make_status, message_from
from llm_pb import common_pb2, internal_pb2, llm_pb2, pipeline_pb2

MAX_PATH: Final = 100
"""Maximum length of a path in characters, so that the id of a step's job is that of a job."""
MAX_NODES: Final = 1000
"""Maximum number of nodes of a tree. Steps beyond it are counted alone."""
MAX_STEPS: Final = 2000
"""Maximum number of steps of a pipeline, so that its history stays within Temporal's bounds."""
MAX_HISTORY_BYTES: Final = 32 * 1024 * 1024
"""Size of what steps are called with and return, up to which steps begin. It is in the history, and Temporal terminates
a workflow beyond 50 MiB. So there is room for the rest, for what runs then, and for compensations."""
TASK_TIMEOUT: Final = timedelta(seconds=30)
"""Maximum time of a workflow task. One that begins with a replay takes about 4 ms of a core for each step so far. By
default Temporal gives a task up after 10 s, and the next one would begin the same replay again, for ever."""
MAX_SUMMARY_BYTES: Final = 256
MAX_QUESTION_BYTES: Final = 1024
MAX_TOLD_BYTES: Final = 128 * 1024
"""Maximum size of the nodes in one answer to Tell. A larger node is told alone. Temporal takes ten updates of a
workflow at once. Their answers and the commands of the same task are one message. Temporal terminates a workflow whose
message is larger than 4 MB."""
MAX_TEXT_BYTES: Final = 1024 * 1024
"""Maximum size of a text that the code of a pipeline reads from a file or writes to one."""
MAX_STEP_MESSAGE: Final = 256
"""Maximum length of the message of a step's error in characters."""
_MAX_REASON: Final = 128
RESERVED: Final = frozenset({"status", "stream", "cancel", "deliveries"})
"""Names that no step has, because they name something else behind the id of a job in an address."""

FINAL_STATES: Final = frozenset(
    {
        llm_pb2.JOB_STATE_SUCCEEDED,
        llm_pb2.JOB_STATE_FAILED,
        llm_pb2.JOB_STATE_CANCELLED,
        llm_pb2.JOB_STATE_TIMED_OUT,
    }
)
ENDED_STEPS: Final = frozenset(
    {pipeline_pb2.STEP_STATE_SUCCEEDED, pipeline_pb2.STEP_STATE_FAILED, pipeline_pb2.STEP_STATE_CANCELLED}
)
STEP_STATES: Final = {
    llm_pb2.JOB_STATE_SUCCEEDED: pipeline_pb2.STEP_STATE_SUCCEEDED,
    llm_pb2.JOB_STATE_FAILED: pipeline_pb2.STEP_STATE_FAILED,
    llm_pb2.JOB_STATE_TIMED_OUT: pipeline_pb2.STEP_STATE_FAILED,
    llm_pb2.JOB_STATE_CANCELLED: pipeline_pb2.STEP_STATE_CANCELLED,
}
"""The state of the root of a pipeline's tree, by that of the pipeline."""

BUDGET_SPENT: Final = "BUDGET_SPENT"
CANCELLED: Final = "CANCELLED"
FILE_IS_NO_TEXT: Final = "FILE_IS_NO_TEXT"
HISTORY_FULL: Final = "HISTORY_FULL"
INCOMPLETE: Final = "INCOMPLETE"
INVALID_OUTPUT: Final = "INVALID_OUTPUT"
OUTPUT_TOO_LARGE: Final = "OUTPUT_TOO_LARGE"
PROGRAM_ERROR: Final = "PROGRAM_ERROR"
TOO_MANY_STEPS: Final = "TOO_MANY_STEPS"
TOTAL_TIMEOUT: Final = "TOTAL_TIMEOUT"
OUT_OF_TIME: Final = frozenset({TOTAL_TIMEOUT, WINDOW_OVER})
"""Errors of steps that have had all the time of their pipeline. They come as that ends, before or after it."""
UNKNOWN_PIPELINE: Final = "UNKNOWN_PIPELINE"

_PART: Final = r"[a-z0-9][a-z0-9_-]{0,63}"
PATH_PATTERN: Final = re.compile(rf"{_PART}(?:/{_PART})*")
FOLLOW_PATTERN: Final = re.compile(rf"(?:{_PART}|\*{{1,2}})(?:/(?:{_PART}|\*{{1,2}}))*")
PATH_RULE: Final = (
    f"it must be at most {MAX_PATH} characters, of names with / between them; a name has 1 to 64 of a-z, 0-9, _ and -, "
    f"begins with a letter or digit, and is none of {', '.join(sorted(RESERVED))}"
)
NAME_PATTERN: Final = re.compile(_PART)
"""The form of a pipeline's name."""


def is_path(path: str) -> bool:
    """Return whether a step may have the path."""
    return (
        len(path) <= MAX_PATH
        and PATH_PATTERN.fullmatch(path) is not None
        and not RESERVED.intersection(path.split("/"))
    )


def is_repeat(node: internal_pb2.PipelineNode, request: pipeline_pb2.AnswerStepRequest) -> bool:
    """Return whether a step has got this answer already."""
    contradicts = node.HasField("approved") and node.approved != request.approved
    return node.answer_id == request.answer_id and not contradicts


def matches(path: str, pattern: str) -> bool:
    """Return whether a path matches a pattern of StreamPipelineRequest.follow."""
    names = path.split("/")
    # A bit for each number of names that the parts until now may stand for.
    whole = (1 << len(names) + 1) - 1
    named: dict[str, int] = {}
    for number, name in enumerate(names):
        named[name] = named.get(name, 0) | 1 << number
    places = 1
    for part in pattern.split("/"):
        if part == "**":
            # All from the lowest one on.
            places = -(places & -places) & whole
        else:
            places = (places if part == "*" else places & named.get(part, 0)) << 1 & whole
        if not places:
            return False
    return bool(places >> len(names))


def parents(path: str) -> list[str]:
    """Return the paths above one, from the root on, which is the empty one."""
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(len(parts))]


def name_of(pipeline: pipeline_pb2.PipelineRequest) -> str:
    """Return the name of the code that a pipeline runs; empty where it names none."""
    kind = pipeline.WhichOneof("spec") or ""
    return pipeline.custom.name if kind == "custom" else kind


def with_defaults(
    pipeline: pipeline_pb2.PipelineRequest, defaults: pipeline_pb2.PipelineRequest | None
) -> pipeline_pb2.PipelineRequest:
    """Return a pipeline with the operator's defaults of its spec. What the pipeline sets wins, in maps key by key."""
    whole = pipeline_pb2.PipelineRequest()
    kind = pipeline.WhichOneof("spec")
    if kind is not None and defaults is not None and kind == defaults.WhichOneof("spec"):
        whole.CopyFrom(defaults)
        for field, _ in getattr(pipeline, kind).ListFields():
            if field.message_type is None or not field.message_type.GetOptions().map_entry:
                # Otherwise a list would be appended to that of the defaults.
                getattr(whole, kind).ClearField(field.name)
    whole.MergeFrom(pipeline)
    return whole


def new_status(
    id_: str, pipeline: pipeline_pb2.PipelineRequest, options: internal_pb2.PipelineOptions
) -> pipeline_pb2.PipelineStatus:
    """Return the status of a pipeline as it begins."""
    status = pipeline_pb2.PipelineStatus(
        pipeline_id=id_,
        state=llm_pb2.JOB_STATE_RUNNING,
        root=pipeline_pb2.StepStatus(
            state=pipeline_pb2.STEP_STATE_RUNNING, kind=pipeline_pb2.STEP_KIND_PIPELINE, usage=common_pb2.Usage()
        ),
        left=pipeline.budget,
        user_id=pipeline.user_id,
        request_id=pipeline.request_id,
        project_id=pipeline.project_id,
        name=name_of(pipeline),
    )
    if options.HasField("create_time"):
        status.root.start_time.CopyFrom(options.create_time)
    if options.HasField("expire_time"):
        status.expire_time.CopyFrom(options.expire_time)
    return status


def failure(reason: str, message: str, code: int = code_pb2.FAILED_PRECONDITION) -> status_pb2.Status:
    """Return the error of a step or a pipeline. The message may quote what a model has written.

    A reason is cut: that of an operator's activity is the type of its error, which may have any length.
    """
    return make_status(code, message_from(message), error_info(reason[:_MAX_REASON]))


def shown_error(error: status_pb2.Status) -> status_pb2.Status:
    """Return an error as a step shows it: with a short message."""
    shown = status_pb2.Status()
    shown.CopyFrom(error)
    if len(shown.message) > MAX_STEP_MESSAGE:
        shown.message = f"{shown.message[: MAX_STEP_MESSAGE - 1]}…"
    return shown


def packed(value: Message) -> pipeline_pb2.PipelineResult:
    """Return what a pipeline has made, from the message that its code returns."""
    result = pipeline_pb2.PipelineResult()
    result.value.Pack(value)
    return result
