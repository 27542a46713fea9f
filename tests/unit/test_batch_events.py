"""The events of the end of a batch."""

import pytest

from jobs.events import batch_event
from llm_pb import batch_pb2
from services.notifier.event import to_event
from services.notifier.openai_event import to_openai_event


@pytest.mark.parametrize(
    ("state", "type_", "of_openai"),
    [
        (batch_pb2.BATCH_STATE_SUCCEEDED, "llm.v1.batch.succeeded", "batch.completed"),
        (batch_pb2.BATCH_STATE_FAILED, "llm.v1.batch.failed", "batch.failed"),
        (batch_pb2.BATCH_STATE_CANCELLED, "llm.v1.batch.cancelled", "batch.cancelled"),
        (batch_pb2.BATCH_STATE_EXPIRED, "llm.v1.batch.expired", "batch.expired"),
    ],
)
def test_each_outcome_has_its_type(state: "batch_pb2.BatchState.ValueType", type_: str, of_openai: str) -> None:
    batch = batch_pb2.BatchRequest(user_id="u", request_id="r", project_id="p")
    outcome = batch_pb2.BatchStatus(batch_id="llmbatch-u-r", state=state)
    outcome.end_time.FromSeconds(7)
    request = batch_event(batch, outcome, "run")
    request.notification_id = "run-finished-0"
    event = to_event(request, "/source", "https://jobs/{workflow_id}")
    data = {
        "status": {"batchId": "llmbatch-u-r", "state": batch_pb2.BatchState.Name(state), "endTime": event["time"]},
        "userId": "u",
        "requestId": "r",
        "projectId": "p",
    }
    assert (event["type"], event["subject"], event["data"]) == (type_, "llmbatch-u-r", data)
    assert to_openai_event(event) == {
        "id": "evt_run-finished-0",
        "object": "event",
        "type": of_openai,
        "created_at": 7,
        "data": {"id": "llmbatch-u-r"},
    }
