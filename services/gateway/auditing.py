"""What the gateway's audit log records of a request, and where it is."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from google.protobuf.message import Message
from opentelemetry.metrics import Counter

from jobs.ids import (
    FILE_ID_PATTERN,
    ID_PATTERN,
    WORKFLOW_ID_PATTERN,
    batch_workflow_id,
    pipeline_workflow_id,
    workflow_id,
)
from llm_pb import batch_pb2, llm_pb2, pipeline_pb2, schedule_pb2
from runtime import audit
from runtime.audit import AuditLog, AuditStore
from runtime.audit_file import AuditFile
from runtime.audit_nats import AuditStream
from runtime.grpc_auth import current_caller
from runtime.health import Readiness
from services.gateway.settings import GatewaySettings

WRITES: Final = frozenset(
    {
        *("Submit", "Cancel", "Redeliver", "DeleteJob", "DeleteJobs", "DeleteUser"),
        *("UploadFile", "DeleteFile"),
        *("CreateSchedule", "UpdateSchedule", "PauseSchedule", "UnpauseSchedule"),
        *("TriggerSchedule", "BackfillSchedule", "DeleteSchedule"),
        *("SetModelAlias", "DeleteModelVersion"),
        *("CreateBatch", "CancelBatch", "SubmitPipeline", "CancelPipeline", "AnswerStep"),
    }
)
"""Methods that are recorded before they have an effect: their implementations call audit.allow()."""
_ID_FIELDS: Final = ("workflow_id", "batch_id", "pipeline_id")
_SUBMITTED: Final[Mapping[type[Message], Callable[[str, str, str], str]]] = {
    llm_pb2.SubmitRequest: workflow_id,
    batch_pb2.CreateBatchRequest: batch_workflow_id,
    pipeline_pb2.SubmitPipelineRequest: pipeline_workflow_id,
}
"""The id that each request gives to what it submits, by user, request and tenant."""
_ROLE: Final = "gateway"
"""The process's role in the configuration of the broker: see deploy/nats."""


def open_audit(settings: GatewaySettings, lost: Counter, readiness: Readiness) -> AuditLog | None:
    """Return the log that the settings name; None where they name none. Raises WrongSetting or
    OSError when it cannot be used.

    `lost` counts the records that it cannot store. `readiness` names its files while they cannot be used.
    """
    if settings.audit is None:
        return None
    if settings.audit_stream:
        store: AuditStore = AuditStream(settings, _ROLE, settings.audit_stream, readiness)
    else:
        store = AuditFile(Path(settings.audit.get_secret_value()), "GATEWAY_AUDIT")
    return AuditLog(store, lost)


def describe_request(request: Message) -> None:
    """Add the ids of a request, which may break every rule, to the record of its call."""
    if not audit.recording():
        return
    about: Message = request
    if isinstance(request, llm_pb2.SubmitRequest):
        about = request.job
    elif isinstance(request, schedule_pb2.CreateScheduleRequest | schedule_pb2.UpdateScheduleRequest):
        about = request.schedule
    elif isinstance(request, batch_pb2.CreateBatchRequest):
        about = request.batch
    elif isinstance(request, pipeline_pb2.SubmitPipelineRequest):
        about = request.pipeline
    user_id = _id(about, "user_id")
    job = next((id_ for name in _ID_FIELDS if (id_ := getattr(request, name, ""))), "")
    for kind, id_of in _SUBMITTED.items():
        if isinstance(request, kind) and user_id and (request_id := _id(about, "request_id")):
            job = id_of(user_id, request_id, current_caller().tenant)
    deletion, schedule = getattr(request, "deletion_id", ""), getattr(request, "schedule_id", "")
    file = getattr(request, "file_id", "")
    audit.describe(
        user_id=user_id,
        job=job if WORKFLOW_ID_PATTERN.fullmatch(job) else "",
        file=file if FILE_ID_PATTERN.fullmatch(file) else "",
        deletion=deletion if WORKFLOW_ID_PATTERN.fullmatch(deletion) else "",
        schedule=schedule if WORKFLOW_ID_PATTERN.fullmatch(schedule) else "",
    )


def _id(message: Message, field: str) -> str:
    value: str = getattr(message, field, "")
    return value if ID_PATTERN.fullmatch(value) else ""
