"""What batches and pipelines have in common at their start: what they are found by, and what shows a repeat."""

import hashlib
from typing import Any, Final

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from jobs import names
from jobs.memo import to_memo
from jobs.search import Hash, hashed_values
from llm_pb import batch_pb2, common_pb2, llm_pb2, pipeline_pb2

_DEFAULT_CLASS: Final[dict[type, int]] = {
    batch_pb2.BatchRequest: common_pb2.JOB_CLASS_BACKGROUND,
    pipeline_pb2.PipelineRequest: common_pb2.JOB_CLASS_STANDARD,
}


def about(work: Any) -> llm_pb2.JobRequest:
    """Return what a job, batch or pipeline shares with jobs: the fields that search attributes are made of."""
    if isinstance(work, llm_pb2.JobRequest):
        return work
    return llm_pb2.JobRequest(user_id=work.user_id, request_id=work.request_id, project_id=work.project_id)


def digest(work: Message) -> str:
    """Return a digest that is equal for requests that mean the same, whether or not they set defaults."""
    normal: Any = type(work)()
    normal.CopyFrom(work)
    if normal.job_class == _DEFAULT_CLASS[type(work)]:
        normal.ClearField("job_class")
    # ByteSize includes the fields of newer versions.
    if normal.budget.ByteSize() == 0:
        normal.ClearField("budget")
    return hashlib.sha256(normal.SerializeToString(deterministic=True)).hexdigest()


def memo(
    work: Message, chosen: Message, create_time: Timestamp, traceparent: str, hash_: Hash | None, waiter: str
) -> dict[str, object]:
    """Return the memo of the workflow.

    `chosen` is its options; `hash_` is that of the tenant. `waiter` is the id of a workflow that gets the signal
    JobSettled at its end; empty: none does.
    """
    found: dict[str, object] = {
        names.MEMO_OPTIONS: to_memo(chosen),
        names.MEMO_DIGEST: digest(work),
        names.MEMO_CREATE_TIME: create_time.ToJsonString(),
    }
    if waiter:
        found[names.MEMO_WAITER] = waiter
    if traceparent:
        found[names.MEMO_TRACEPARENT] = traceparent
    if labels := dict(getattr(work, "labels", {})):
        found[names.MEMO_LABELS] = labels
    if hash_ is not None:
        found[names.MEMO_SEARCH_ATTRIBUTES] = hashed_values(about(work))
    return found
