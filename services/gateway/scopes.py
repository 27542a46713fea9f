"""What a caller may do: the scope of each method, and the scopes that a request needs as well.

A method that has no row here is refused, and the gateway does not start with one.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from google.protobuf.descriptor import ServiceDescriptor

from jobs.ids import tenant_of
from jobs.options import DEFAULT_PRIORITY
from jobs.schedules import as_submitted
from llm_pb import batch_pb2, common_pb2, file_pb2, llm_pb2, pipeline_pb2, schedule_pb2
from runtime.auth import Caller, Code, Refusal, scope_missing
from runtime.scopes import (
    CANCEL,
    DELETE,
    DELETE_FILES,
    NOTIFY,
    PRIORITY,
    READ,
    READ_FILES,
    READ_MODELS,
    READ_SCHEDULES,
    REDELIVER,
    SCOPES,
    STRUCTURED,
    SUBMIT,
    TRAIN,
    WORKERS,
    WRITE_FILES,
    WRITE_SCHEDULES,
)

OF_METHOD: Final[Mapping[str, str]] = {
    "/llm.v1.LlmService/Submit": SUBMIT,
    "/llm.v1.LlmService/GetStatus": READ,
    "/llm.v1.LlmService/GetJob": READ,
    "/llm.v1.LlmService/StreamStatus": READ,
    "/llm.v1.LlmService/Cancel": CANCEL,
    "/llm.v1.LlmService/List": READ,
    "/llm.v1.LlmService/ListModels": READ_MODELS,
    "/llm.v1.LlmService/SetModelAlias": TRAIN,
    "/llm.v1.LlmService/DeleteModelVersion": TRAIN,
    "/llm.v1.LlmService/ListWorkers": WORKERS,
    "/llm.v1.LlmService/ListDeliveries": READ,
    "/llm.v1.LlmService/Redeliver": REDELIVER,
    "/llm.v1.LlmService/GetQuota": READ,
    "/llm.v1.LlmService/DeleteJob": DELETE,
    "/llm.v1.LlmService/DeleteJobs": DELETE,
    "/llm.v1.LlmService/DeleteUser": DELETE,
    "/llm.v1.LlmService/GetDeletion": DELETE,
    "/llm.v1.FileService/UploadFile": WRITE_FILES,
    "/llm.v1.FileService/DownloadFile": READ_FILES,
    "/llm.v1.FileService/GetFile": READ_FILES,
    "/llm.v1.FileService/ListFiles": READ_FILES,
    "/llm.v1.FileService/DeleteFile": DELETE_FILES,
    "/llm.v1.BatchService/CreateBatch": SUBMIT,
    "/llm.v1.BatchService/GetBatch": READ,
    "/llm.v1.BatchService/StreamBatch": READ,
    "/llm.v1.BatchService/StreamBatchResults": READ,
    "/llm.v1.BatchService/CancelBatch": CANCEL,
    "/llm.v1.BatchService/ListBatches": READ,
    "/llm.v1.PipelineService/SubmitPipeline": SUBMIT,
    "/llm.v1.PipelineService/GetPipeline": READ,
    "/llm.v1.PipelineService/StreamPipeline": READ,
    "/llm.v1.PipelineService/CancelPipeline": CANCEL,
    "/llm.v1.PipelineService/AnswerStep": SUBMIT,
    "/llm.v1.PipelineService/ListPipelines": READ,
    "/llm.v1.ScheduleService/CreateSchedule": WRITE_SCHEDULES,
    "/llm.v1.ScheduleService/GetSchedule": READ_SCHEDULES,
    "/llm.v1.ScheduleService/ListSchedules": READ_SCHEDULES,
    "/llm.v1.ScheduleService/UpdateSchedule": WRITE_SCHEDULES,
    "/llm.v1.ScheduleService/PauseSchedule": WRITE_SCHEDULES,
    "/llm.v1.ScheduleService/UnpauseSchedule": WRITE_SCHEDULES,
    "/llm.v1.ScheduleService/TriggerSchedule": WRITE_SCHEDULES,
    "/llm.v1.ScheduleService/BackfillSchedule": WRITE_SCHEDULES,
    "/llm.v1.ScheduleService/DeleteSchedule": WRITE_SCHEDULES,
}
"""The scope of each method."""


def gateway_for(workflow_id: str) -> Caller:
    """Return the gateway itself, for what it does about a job for all callers who may see the job."""
    return Caller(tenant_of(workflow_id), "gateway", SCOPES)


def require_all_methods(services: Iterable[ServiceDescriptor], of_method: Mapping[str, str] = OF_METHOD) -> None:
    """Raise RuntimeError for a method without a row."""
    methods = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    if without := sorted(methods - of_method.keys()):
        raise RuntimeError(f"no scope is named for {', '.join(without)}: see services.gateway.scopes")


def check_submit(caller: Caller, request: llm_pb2.SubmitRequest) -> None:
    """Raise Refusal for a job that is not the caller's to submit."""
    job = request.job
    needed = {
        NOTIFY: bool(job.notify),
        STRUCTURED: job.params.WhichOneof("structured_output") is not None,
        PRIORITY: 1 <= job.priority < DEFAULT_PRIORITY or job.job_class == common_pb2.JOB_CLASS_HIGH,
        READ_FILES: job.HasField("prompt_file"),
    }
    if missing := [scope for scope, needs in needed.items() if needs and not caller.may(scope)]:
        raise scope_missing(*missing, user_id=caller.user_id)
    _require_user(caller, job.user_id)


def check_schedule(
    caller: Caller, request: schedule_pb2.CreateScheduleRequest | schedule_pb2.UpdateScheduleRequest
) -> None:
    """Raise Refusal for a schedule that starts what is not the caller's to start."""
    started = as_submitted(request.schedule)
    if isinstance(started, batch_pb2.CreateBatchRequest):
        check_create_batch(caller, started)
    elif isinstance(started, pipeline_pb2.SubmitPipelineRequest):
        check_submit_pipeline(caller, started)
    else:
        check_submit(caller, started)


def check_list(
    caller: Caller,
    request: llm_pb2.ListRequest
    | schedule_pb2.ListSchedulesRequest
    | file_pb2.ListFilesRequest
    | batch_pb2.ListBatchesRequest
    | pipeline_pb2.ListPipelinesRequest,
) -> None:
    """Raise Refusal for what is of others; a caller who is bound to a user, and names none, means that user."""
    if caller.user_id and not request.user_id:
        request.user_id = caller.user_id
    _require_user(caller, request.user_id)


def check_delete_jobs(caller: Caller, request: llm_pb2.DeleteJobsRequest) -> None:
    """Raise Refusal for jobs of others."""
    if request.user_id:
        _require_user(caller, request.user_id)


def check_delete_user(caller: Caller, request: llm_pb2.DeleteUserRequest) -> None:
    """Raise Refusal for another user, and without the scopes for what is no job."""
    if missing := [scope for scope in (DELETE_FILES, WRITE_SCHEDULES) if not caller.may(scope)]:
        raise scope_missing(*missing, user_id=caller.user_id)
    if request.user_id:
        _require_user(caller, request.user_id)


def check_upload(caller: Caller, request: file_pb2.UploadFileRequest) -> None:
    """Raise Refusal for a file of another user. Only the first message names the user."""
    if request.HasField("file"):
        _require_user(caller, request.file.user_id)


def check_create_batch(caller: Caller, request: batch_pb2.CreateBatchRequest) -> None:
    """Raise Refusal for a batch that is not the caller's to create. Its lines are checked when they are read."""
    batch = request.batch
    needed = {READ_FILES: True, NOTIFY: bool(batch.notify), PRIORITY: batch.job_class == common_pb2.JOB_CLASS_HIGH}
    if missing := [scope for scope, needs in needed.items() if needs and not caller.may(scope)]:
        raise scope_missing(*missing, user_id=caller.user_id)
    _require_user(caller, batch.user_id)


def check_submit_pipeline(caller: Caller, request: pipeline_pb2.SubmitPipelineRequest) -> None:
    """Raise Refusal for a pipeline that is not the caller's to submit."""
    pipeline = request.pipeline
    trains = pipeline.WhichOneof("spec") in ("training", "preprocess")
    needed = {
        NOTIFY: bool(pipeline.notify),
        PRIORITY: pipeline.job_class == common_pb2.JOB_CLASS_HIGH,
        TRAIN: trains,
        READ_FILES: trains,
    }
    if missing := [scope for scope, needs in needed.items() if needs and not caller.may(scope)]:
        raise scope_missing(*missing, user_id=caller.user_id)
    _require_user(caller, pipeline.user_id)


CHECKS: Final[Mapping[str, Callable[[Caller, Any], None]]] = {
    "Submit": check_submit,
    "List": check_list,
    "DeleteJobs": check_delete_jobs,
    "DeleteUser": check_delete_user,
    "UploadFile": check_upload,
    "ListFiles": check_list,
    "CreateSchedule": check_schedule,
    "UpdateSchedule": check_schedule,
    "ListSchedules": check_list,
    "CreateBatch": check_create_batch,
    "ListBatches": check_list,
    "SubmitPipeline": check_submit_pipeline,
    "ListPipelines": check_list,
}
"""What the request of a method must not ask for, by the method's name. JobReader says whose an existing job is."""


def _require_user(caller: Caller, user_id: str) -> None:
    if not caller.may_see(user_id):
        raise user_not_allowed(caller.user_id)


def user_not_allowed(bound_to: str) -> Refusal:
    """PERMISSION_DENIED: the credential is bound to a user, whose jobs these are not."""
    message = f"the credential is for the jobs of the user {bound_to!r} alone"
    return Refusal(Code.PERMISSION_DENIED, "USER_NOT_ALLOWED", message, {"user_id": bound_to})
