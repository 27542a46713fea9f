"""The output and the errors of a batch: one line for each line of the input, in its form and in its order."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from http import HTTPStatus
from typing import Any, Final, NamedTuple

from google.protobuf import json_format
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2, error_details_pb2, status_pb2

from batches.lines import Line, cut
from jobs.errors import InvalidJob, QueueTimeout, RunTimeout, TotalTimeout, error_info, make_status, reason_of
from jobs.field_rules import Violation
from llm_pb import batch_pb2, llm_pb2
from openai_api.endpoints import answer_object
from openai_api.errors import error_object
from openai_api.outcome import Ending, failed_completion

_OF_THE_ITEM: Final = {error.reason for error in (QueueTimeout, RunTimeout, TotalTimeout)}
"""Time limits of items themselves. Any other one is the window of the batch."""


_MAX_MESSAGE: Final = 2000
"""Maximum length of a message that names bad fields, in characters."""


class LostItem(Exception):
    """A result is of no line of the input. Output and errors would lack it."""


class OutputLine(NamedTuple):
    """A line of the output or of the errors."""

    succeeded: bool
    """Whether it belongs to the output."""
    data: bytes
    """The line, with its end."""


def joined(
    lines: Iterable[Line], items: Iterable[batch_pb2.BatchItem], never_begun: batch_pb2.BatchItem
) -> Iterator[tuple[Line, batch_pb2.BatchItem]]:
    """Yield each line with its item, in the order of the lines. Both are ordered by index, as merge() has the items.

    A bad line gets the item of its problems. A good line without a result gets state and error of `never_begun`.
    Raises LostItem for an item that has no line.
    """
    results = iter(items)
    following = next(results, None)
    for line in lines:
        item = None
        if following is not None and following.index == line.index:
            # The line may be bad by the rules of a later version than the one that has run it.
            item, following = following, next(results, None)
        elif following is not None and following.index < line.index:
            break
        elif line.job is None:
            item = bad_item(line)
        else:
            item = batch_pb2.BatchItem(index=line.index, custom_id=line.custom_id)
            item.MergeFrom(never_begun)
        yield line, item
    if following is not None:
        raise LostItem(f"the result of line {following.index} has no line in the input")


def bad_item(line: Line) -> batch_pb2.BatchItem:
    """Return the item of a bad line."""
    error = invalid_input(line.problems, InvalidJob.reason)
    return batch_pb2.BatchItem(index=line.index, custom_id=line.custom_id, state=llm_pb2.JOB_STATE_FAILED, error=error)


def invalid_input(violations: Sequence[Violation], reason: str = "INVALID_INPUT") -> status_pb2.Status:
    """Return the error that names bad fields: of a line, or those of an input that BatchInput has collected."""
    bad = error_details_pb2.BadRequest()
    for field, description in violations:
        bad.field_violations.add(field=field, description=description)
    return make_status(code_pb2.INVALID_ARGUMENT, _words(violations), error_info(reason), bad)


def to_line(line: Line, item: batch_pb2.BatchItem, batch_id: str, create_time: Timestamp) -> OutputLine:
    """Return the line of an item in the form of its input. `create_time` is the batch's."""
    succeeded = item.state == llm_pb2.JOB_STATE_SUCCEEDED
    # Without an endpoint there is no answer to write a result into.
    if line.openai and (line.endpoint or not item.HasField("result")):
        value = _openai_line(line, item, batch_id, create_time)
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    else:
        text = json_format.MessageToJson(item, indent=None, ensure_ascii=False)
    return OutputLine(succeeded, text.encode() + b"\n")


def _openai_line(line: Line, item: batch_pb2.BatchItem, batch_id: str, create_time: Timestamp) -> dict[str, Any]:
    id_ = item.workflow_id or f"{batch_id}/{item.index}"
    number = hashlib.sha256(id_.encode()).hexdigest()[:32]
    value: dict[str, Any] = {
        "id": f"batch_req_{number}",
        "custom_id": item.custom_id or None,
        "response": None,
        "error": None,
    }
    job = line.job or llm_pb2.JobRequest()
    if line.job is None and not item.HasField("result"):
        param = line.problems[0].field or None
        body = error_object(_words(line.problems), HTTPStatus.BAD_REQUEST, "invalid_value", param)
        return {**value, "response": _response(HTTPStatus.BAD_REQUEST, number, body)}
    status = llm_pb2.JobStatus(workflow_id=id_, state=item.state, create_time=create_time)
    if item.HasField("end_time"):
        status.end_time.CopyFrom(item.end_time)
    if item.HasField("error"):
        status.error.CopyFrom(item.error)
    ending = Ending(status, item.result)
    if (failure := failed_completion(ending)) is None:
        answer = answer_object(line.endpoint, job, ending)
        return {**value, "response": _response(HTTPStatus.OK, number, answer)}
    if item.result.output:
        value["durable_llm"] = {"partial": answer_object(line.endpoint, job, ending)}
    expired = item.state == llm_pb2.JOB_STATE_TIMED_OUT and reason_of(item.error) not in _OF_THE_ITEM
    if expired or item.state == llm_pb2.JOB_STATE_CANCELLED:
        code = "batch_expired" if expired else "batch_cancelled"
        return {**value, "error": {"code": code, "message": item.error.message}}
    return {**value, "response": _response(failure[0], number, failure[1])}


def _response(status: HTTPStatus, number: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"status_code": int(status), "request_id": f"req_{number}", "body": body}


def _words(violations: Sequence[Violation]) -> str:
    return cut("; ".join(f"{field} {description}".strip() for field, description in violations), _MAX_MESSAGE)
