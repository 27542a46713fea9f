"""The rules that batch.proto states for a BatchRequest, as code. The lines of its input have their own."""

import re
from collections.abc import Iterator
from typing import Final

from batches.defaults import check_defaults
from jobs.field_rules import (
    Violation,
    check_bounded_duration,
    check_budget,
    check_enum,
    check_id,
    check_labels,
    check_line,
)
from jobs.file_rules import check_file
from jobs.ids import WORKFLOW_ID_PATTERN
from jobs.rules import check_job
from llm_pb import batch_pb2, common_pb2, llm_pb2

MAX_PAGE_SIZE: Final = 100
MAX_STATES: Final = 16
MAX_REASON_BYTES: Final = 1024
CURSOR_PATTERN: Final = re.compile(r"[A-Za-z0-9._-]{1,4096}")
MIN_WINDOW_SECONDS: Final = 1
MAX_WINDOW_SECONDS: Final = 365 * 24 * 60 * 60
"""Maximum of any operator's bound: a timer of a year."""


def check_create(request: batch_pb2.CreateBatchRequest) -> list[Violation]:
    """Return the violations of a CreateBatchRequest, apart from those of the operator's bounds and of the file."""
    if not request.HasField("batch"):
        return [Violation("batch", "is required")]
    return [Violation(f"batch.{field}", description) for field, description in _batch(request.batch)]


def check_batch_id(
    request: batch_pb2.GetBatchRequest
    | batch_pb2.StreamBatchRequest
    | batch_pb2.StreamBatchResultsRequest
    | batch_pb2.CancelBatchRequest,
) -> list[Violation]:
    """Return the violations of a request that only names a batch."""
    if WORKFLOW_ID_PATTERN.fullmatch(request.batch_id) is None:
        return [Violation("batch_id", "must be the batch_id that CreateBatch returned")]
    return []


def check_stream_results(request: batch_pb2.StreamBatchResultsRequest) -> list[Violation]:
    """Return the violations of a StreamBatchResultsRequest. Whether the cursor is of the batch is not known here."""
    violations = check_batch_id(request)
    if request.cursor and CURSOR_PATTERN.fullmatch(request.cursor) is None:
        violations.append(Violation("cursor", "must be the cursor of the last message that was received"))
    return violations


def check_cancel_batch(request: batch_pb2.CancelBatchRequest) -> list[Violation]:
    """Return the violations of a CancelBatchRequest."""
    return [*check_batch_id(request), *check_line("reason", request.reason, MAX_REASON_BYTES, required=False)]


def check_list_batches(request: batch_pb2.ListBatchesRequest) -> list[Violation]:
    """Return the violations of a ListBatchesRequest. The gateway checks the page_token when it opens it."""
    violations = [*check_id("user_id", request.user_id, required=False)]
    violations += check_id("project_id", request.project_id, required=False)
    if not 0 <= request.page_size <= MAX_PAGE_SIZE:
        violations.append(Violation("page_size", f"must be 1 to {MAX_PAGE_SIZE}, or 0 for the default"))
    if len(request.states) > MAX_STATES:
        violations.append(Violation("states", f"must be at most {MAX_STATES}"))
    for index, state in enumerate(request.states[:MAX_STATES]):
        violations += check_enum(f"states[{index}]", state, batch_pb2.BatchState)
    return violations


def _batch(batch: batch_pb2.BatchRequest) -> Iterator[Violation]:
    yield from check_id("user_id", batch.user_id, required=True)
    yield from check_id("request_id", batch.request_id, required=True)
    yield from check_id("project_id", batch.project_id, required=False)
    yield from check_file("input", batch.input)
    yield from check_defaults(batch.defaults)
    if batch.HasField("window"):
        yield from check_bounded_duration("window", batch.window, MIN_WINDOW_SECONDS, MAX_WINDOW_SECONDS)
    if batch.job_class:
        yield from check_enum("job_class", batch.job_class, common_pb2.JobClass)
    yield from check_budget("budget", batch.budget)
    if batch.max_concurrent < 0:
        yield Violation("max_concurrent", "must be 0 or more; 0 is no limit")
    if not 0 <= batch.max_failure_rate <= 1:
        yield Violation("max_failure_rate", "must be 0 to 1; 0 is no limit")
    # The targets have the rules of a job's.
    job = llm_pb2.JobRequest(user_id="u", request_id="r", model="m", prompt="p", notify=batch.notify)
    yield from check_job(job)
    yield from check_labels("labels", batch.labels)
