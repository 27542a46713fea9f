"""An event of a job, batch or pipeline as a CloudEvent (CloudEvents 1.0.2, JSON event format)."""

from typing import Any
from urllib.parse import quote

from google.protobuf import json_format

from jobs.events import event_type
from llm_pb import internal_pb2, llm_pb2

CloudEvent = dict[str, Any]


def to_event(request: internal_pb2.NotifyRequest, source: str, job_url: str = "") -> CloudEvent:
    """Return the event: type `llm.v1.job.<what>`, subject the workflow id, data the job in proto3 JSON.

    For a batch or pipeline the type is `llm.v1.batch.<state>` or `llm.v1.pipeline.<state>`, and the subject its id.

    The event's id is the delivery's, so that it is the same in every attempt and a receiver can drop repeats.
    `job_url` is the link to a job, in which {workflow_id} is replaced by the percent-encoded id. An empty one gives no
    link.
    """
    status = request.status
    about = internal_pb2.NotifyRequest()
    about.CopyFrom(request)
    for field in ("notification_id", "target", "target_index", "event"):
        about.ClearField(field)
    data = json_format.MessageToDict(about)
    other = next((kind for kind in ("batch", "pipeline") if request.HasField(kind)), None)
    if other is not None:
        data["status"] = data.pop(other)
    elif job_url:
        data["links"] = {"job": job_url.replace("{workflow_id}", quote(status.workflow_id, safe=""))}
    match request.event:
        case llm_pb2.NOTIFY_EVENT_STARTED:
            time = status.start_time
        case llm_pb2.NOTIFY_EVENT_PROGRESS:
            time = status.progress.updated_at
        case _ if other == "batch":
            time = request.batch.end_time
        case _ if other == "pipeline":
            time = request.pipeline.root.end_time
        case _:
            time = status.end_time
    return {
        "specversion": "1.0",
        "id": request.notification_id,
        "source": source,
        "type": event_type(request),
        "subject": status.workflow_id,
        "time": time.ToJsonString(),
        "datacontenttype": "application/json",
        "data": data,
    }
