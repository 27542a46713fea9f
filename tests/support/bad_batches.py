"""Requests that break a rule of batch.proto: one row for each way. See tests.support.bad_requests."""

from collections.abc import Iterator
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration

from llm_pb import batch_pb2, common_pb2, llm_pb2
from tests.support.bad_files import BAD_FILE_IDS, BAD_PAGES, BAD_REFS, NO_FILE
from tests.support.bad_requests import BAD_IDS, BAD_WORKFLOW_IDS, REQUESTS, Row

_BAD_DEFAULTS: Final[dict[str, Any]] = {
    "user_id": "u",
    "request_id": "r",
    "prompt": "Hi.",
    "messages": [llm_pb2.ChatMessage(role=llm_pb2.ROLE_USER, content="Hi.")],
    "prompt_file": common_pb2.FileRef(file_id=NO_FILE),
    "job_class": common_pb2.JOB_CLASS_STANDARD,
}
_BAD_WINDOWS: Final = {
    "too short": Duration(nanos=999_999_999),
    "negative": Duration(seconds=-60),
    "over the operator's bound": Duration(seconds=364 * 24 * 3600),
    "too long": Duration(seconds=2**62),
    "of bad nanos": Duration(seconds=60, nanos=-1),
}


def batch(**changes: Any) -> batch_pb2.BatchRequest:
    """Return a batch that breaks no rule, of a file that does not exist, with these changes."""
    values = {"user_id": "u", "request_id": "r", "input": {"file_id": NO_FILE}, **changes}
    return batch_pb2.BatchRequest(**values)


def batch_rows() -> Iterator[Row]:
    """Yield the table."""
    yield Row("CreateBatch", "no batch", b"", frozenset({"batch"}))
    for what, changes, *fields in _batches():
        yield _row("CreateBatch", what, *(f"batch.{field}" for field in fields), batch=batch(**changes))
    for rpc in ("GetBatch", "StreamBatch", "StreamBatchResults", "CancelBatch"):
        for what, value in BAD_WORKFLOW_IDS.items():
            yield _row(rpc, f"batch_id with {what}", "batch_id", batch_id=value)
    for cursor in ("a b", "é", "a" * 4097, "a\n"):
        yield _row("StreamBatchResults", f"cursor {cursor[:12]!r}", "cursor", batch_id="llmbatch-u-r", cursor=cursor)
    for reason in ("a\nb", "\x1b[31m", "é" * 513):
        yield _row("CancelBatch", f"reason {reason[:12]!r}", "reason", batch_id="llmbatch-u-r", reason=reason)
    for field in ("user_id", "project_id"):
        for what, value in BAD_IDS.items():
            yield _row("ListBatches", f"{field} with {what}", field, **{field: value})
    for what, (changes, field) in BAD_PAGES.items():
        yield _row("ListBatches", what, field, **changes)
    for state in (0, 99, -1):
        states = [batch_pb2.BATCH_STATE_FAILED, state]
        yield _row("ListBatches", f"state {state}", "states[1]", states=states)
    yield _row("ListBatches", "17 states", "states", states=[batch_pb2.BATCH_STATE_FAILED] * 17)


def _batches() -> Iterator[tuple[Any, ...]]:
    """Yield what is wrong, the changes that make it so, and the fields of the batch that the error must name."""
    yield "nothing", {"user_id": "", "request_id": "", "input": None}, "user_id", "request_id", "input.file_id"
    for field in ("user_id", "request_id", "project_id"):
        for what, value in BAD_IDS.items():
            yield f"{field} with {what}", {field: value}, field
    for what, value in BAD_FILE_IDS.items():
        yield f"an input by an id with {what}", {"input": {"file_id": value}}, "input.file_id"
    for what, (ref, field) in BAD_REFS.items():
        yield f"an input of {what}", {"input": {"file_id": NO_FILE, **ref}}, f"input.{field}"
    for name, value in _BAD_DEFAULTS.items():
        yield f"defaults with {name}", {"defaults": {name: value}}, f"defaults.{name}"
    for what, window in _BAD_WINDOWS.items():
        yield f"a window {what}", {"window": window}, "window"
    for job_class in (-1, 99):
        yield f"class {job_class}", {"job_class": job_class}, "job_class"
    for limit in ("output_tokens", "prompt_tokens", "cost_micros"):
        yield f"budget.{limit} negative", {"budget": {limit: -1}}, f"budget.{limit}"
    yield "a budget of no time", {"budget": {"engine_time": Duration()}}, "budget.engine_time"
    for count in (-1, -(2**31)):
        yield f"max_concurrent {count}", {"max_concurrent": count}, "max_concurrent"
    for rate in (-0.1, 1.1, float("nan"), float("inf")):
        yield f"max_failure_rate {rate}", {"max_failure_rate": rate}, "max_failure_rate"
    webhook = llm_pb2.NotifyTarget(webhook=llm_pb2.Webhook(url="http://example.com/"))
    yield "five targets", {"notify": [webhook] * 5}, "notify"
    yield "a bad target", {"notify": [webhook, llm_pb2.NotifyTarget()]}, "notify[1]"
    yield "17 labels", {"labels": {f"key-{number}": "" for number in range(17)}}, "labels"
    yield "a label without a key", {"labels": {"": "x"}}, 'labels[""]'
    yield "a label with a long value", {"labels": {"long": "\u00e9" * 513}}, 'labels["long"]'


def _row(rpc: str, what: str, *fields: str, **values: Any) -> Row:
    return Row(rpc, what, REQUESTS[rpc](**values).SerializeToString(), frozenset(fields))
