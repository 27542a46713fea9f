"""Requests that break a rule of pipeline.proto: one row for each way. See tests.support.bad_requests."""

from collections.abc import Iterator
from typing import Any, Final

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration

from llm_pb import llm_pb2, pipeline_pb2
from tests.support.bad_files import BAD_PAGES
from tests.support.bad_requests import BAD_IDS, BAD_WORKFLOW_IDS, REQUESTS, Row
from tests.support.bad_trainings import bad_trainings

NO_PIPELINE: Final = "llmpipe-u-none"
_NAME: Final = "pipeline.custom.name"
"""What an error names as well: the stack has registered no pipeline."""
_OF_ID: Final = ("GetPipeline", "StreamPipeline", "CancelPipeline", "AnswerStep")
_BAD_PATHS: Final = ("/", "a//b", "a b", "é", "a\n", "a/" * 2000)
_BAD_REFINEMENTS: Final[tuple[tuple[str, str, dict[str, Any]], ...]] = (
    ("no topic", "topic", {"topic": ""}),
    ("a long topic", "topic", {"topic": "t" * 16_385}),
    ("no model of write", "models", {"models": {"edit": "structured"}}),
    ("a model of nothing", 'models["x"]', {"models": {"write": "structured", "x": "structured"}}),
    ("a critique without structure", 'models["critique"]', {"models": {"write": "structured", "critique": "idle"}}),
    ("no structure at all", 'models["write"]', {"models": {"write": "idle", "edit": "structured"}}),
    ("a time of nothing", 'step_timeouts["x"]', {"step_timeouts": {"x": Duration(seconds=9)}}),
    ("no time", 'step_timeouts["edit"]', {"step_timeouts": {"edit": Duration(seconds=-1)}}),
    ("a score above 10", "quality_threshold", {"quality_threshold": 10.1}),
    ("no score", "quality_threshold", {"quality_threshold": float("nan")}),
    *(
        (f"{value} {field}", field, {field: value})
        for field, values in {
            "max_rounds": (0, 101),
            "patience": (0, 101),
            "max_tokens": (-1, 0),
            "max_remarks": (0, 21),
            "max_remark_length": (-1, 4097),
        }.items()
        for value in values
    ),
)
"""What is wrong, the field that the error must name, and the values that make it so."""
_BAD_WORLDS: Final[tuple[tuple[str, str, dict[str, Any]], ...]] = (
    ("no theme", "theme", {"theme": ""}),
    ("a long theme", "theme", {"theme": "t" * 16_385}),
    ("no model of describe", "models", {"models": {"write": "structured"}}),
    ("a model of nothing", 'models["x"]', {"models": {"describe": "structured", "x": "structured"}}),
    ("posts without structure", 'models["write"]', {"models": {"describe": "structured", "write": "idle"}}),
    ("no structure at all", 'models["describe"]', {"models": {"describe": "idle"}}),
    ("a time of nothing", 'step_timeouts["x"]', {"step_timeouts": {"x": Duration(seconds=9)}}),
    ("no time", 'step_timeouts["image"]', {"step_timeouts": {"image": Duration(seconds=-1)}}),
    ("no image model", "image_model", {"image_model": "../x"}),
    ("no size", "image_size.width", {"image_size": {"height": 64}}),
    ("a long size", "image_size.height", {"image_size": {"width": 64, "height": 8193}}),
    *(
        (f"{value} {field}", field, {field: value})
        for field, values in {
            "characters": (-1, 0, 21),
            "posts": (-1, 101),
            "images": (-1, 11),
            "image_limit": (-1, 0, 101),
            "seed": (-1,),
            "max_tokens": (-1, 0),
        }.items()
        for value in values
    ),
)
"""Likewise."""


def pipeline(**changes: Any) -> pipeline_pb2.PipelineRequest:
    """Return a pipeline that breaks no rule of the proto, with these changes."""
    return pipeline_pb2.PipelineRequest(**{"user_id": "u", "request_id": "r", "custom": {"name": "none"}, **changes})


def valid_pipeline(rpc: str) -> Any:
    """Return a request of a method that breaks no rule of the proto, about a pipeline that does not exist."""
    request: Any = REQUESTS[rpc]()
    if rpc in _OF_ID:
        request.pipeline_id = NO_PIPELINE
    if rpc == "SubmitPipeline":
        request.pipeline.CopyFrom(pipeline())
    if rpc == "AnswerStep":
        request.path, request.answer_id, request.approved = "a", "a", True
    return request


def pipeline_rows() -> Iterator[Row]:
    """Yield the table."""
    yield Row("SubmitPipeline", "no pipeline", b"", frozenset({"pipeline"}))
    for what, changes, *fields in _pipelines():
        row = _row("SubmitPipeline", what, *(f"pipeline.{field}" for field in fields), pipeline=pipeline(**changes))
        yield row._replace(
            fields=row.fields
            if {"custom", "refine", "world", "training", "preprocess"} & changes.keys()
            else row.fields | {_NAME}
        )
    for rpc in _OF_ID:
        for what, value in BAD_WORKFLOW_IDS.items():
            yield _row(rpc, f"pipeline_id with {what}", "pipeline_id", pipeline_id=value)
    for path in _BAD_PATHS:
        for rpc in ("GetPipeline", "AnswerStep"):
            yield _row(rpc, f"path {path[:12]!r}", "path", path=path)
        yield _row("StreamPipeline", f"follow {path[:12]!r}", "follow[1]", follow=["a", path])
    yield _row("StreamPipeline", "17 paths", "follow", follow=["a"] * 17)
    for cursor in ("a b", "é", "a" * 8193, "a\n"):
        yield _row("StreamPipeline", f"cursor {cursor[:12]!r}", "cursor", cursor=cursor)
    for reason in ("a\nb", "\x1b[31m", "é" * 513):
        yield _row("CancelPipeline", f"reason {reason[:12]!r}", "reason", reason=reason)
    for what, value in {**BAD_IDS, "missing": ""}.items():
        yield _row("AnswerStep", f"answer_id with {what}", "answer_id", answer_id=value)
    yield _row("AnswerStep", "no path", "path", path="")
    nothing = valid_pipeline("AnswerStep")
    nothing.ClearField("approved")
    yield Row("AnswerStep", "no answer", nothing.SerializeToString(), frozenset({"approved"}))
    for field in ("user_id", "project_id"):
        for what, value in BAD_IDS.items():
            yield _row("ListPipelines", f"{field} with {what}", field, **{field: value})
    for what, (changes, field) in BAD_PAGES.items():
        yield _row("ListPipelines", what, field, **changes)


def _pipelines() -> Iterator[tuple[Any, ...]]:
    """Yield what is wrong, the changes that make it so, and the fields of the pipeline that the error must name."""
    for field in ("user_id", "request_id", "project_id"):
        for what, value in BAD_IDS.items():
            yield f"{field} with {what}", {field: value}, field
    yield "no key", {"user_id": "", "request_id": ""}, "user_id", "request_id"
    for job_class in (-1, 99):
        yield f"class {job_class}", {"job_class": job_class}, "job_class"
    yield "a negative budget", {"budget": {"output_tokens": -1}}, "budget.output_tokens"
    for what, timeout in (("no time", Duration()), ("ages", Duration(seconds=2**62))):
        yield f"{what} as total_timeout", {"total_timeout": timeout}, "total_timeout"
    yield "a bad target", {"notify": [llm_pb2.NotifyTarget()]}, "notify[0]"
    openai = llm_pb2.Webhook(url="http://127.0.0.1:1/", format=llm_pb2.WEBHOOK_FORMAT_OPENAI)
    yield "OpenAI's event", {"notify": [llm_pb2.NotifyTarget(webhook=openai)]}, "notify[0].webhook.format"
    yield "no spec", {"custom": None}, "spec"
    for name in ("", "a b", "../a", "a" * 300):
        yield f"name {name[:12]!r}", {"custom": {"name": name}}, "custom.name"
    large = {"name": "none", "input": AnyMessage(value=bytes(65 * 1024))}
    yield "a large input", {"custom": large}, "custom.name", "custom.input"
    for what, field, values in _BAD_REFINEMENTS:
        spec = {"topic": "t", "models": {"write": "structured"}, **values}
        yield f"refine of {what}", {"custom": None, "refine": spec}, f"refine.{field}"
    for what, field, values in _BAD_WORLDS:
        spec = {"theme": "t", "models": {"describe": "structured"}, **values}
        yield f"world of {what}", {"custom": None, "world": spec}, f"world.{field}"
    for what, field, values in bad_trainings():
        yield what, {"custom": None, **values}, field


def _row(rpc: str, what: str, *fields: str, **values: Any) -> Row:
    request = valid_pipeline(rpc)
    for name, value in values.items():
        request.ClearField(name)
        request.MergeFrom(type(request)(**{name: value}))
    return Row(rpc, what, request.SerializeToString(), frozenset(fields))
