"""The methods of the gateway's own services: the rules of their requests, and the sizes of requests and answers."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from batches import rules as batch_rules
from jobs import file_rules, model_rules, pipeline_rules, rules, schedule_rules
from jobs.field_rules import Violation
from llm_pb import batch_pb2, file_pb2, llm_pb2, pipeline_pb2, schedule_pb2
from runtime.grpc_parsing import MAX_REQUEST_BYTES

SERVICES: Final = {
    service.full_name: service
    for file in (llm_pb2, file_pb2, schedule_pb2, batch_pb2, pipeline_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
}
"""The gateway's own services by their full names. No two of their methods have the same name."""

VALIDATORS: Final[Mapping[str, Callable[[Any], Sequence[Violation]]]] = {
    "Submit": rules.check_submit,
    "GetStatus": rules.check_workflow_id,
    "GetJob": rules.check_workflow_id,
    "StreamStatus": rules.check_stream,
    "Cancel": rules.check_cancel,
    "List": rules.check_list,
    "ListModels": lambda _: (),
    "SetModelAlias": model_rules.check_set_alias,
    "DeleteModelVersion": model_rules.check_delete_version,
    "ListWorkers": rules.check_list_workers,
    "ListDeliveries": rules.check_workflow_id,
    "Redeliver": rules.check_redeliver,
    "GetQuota": lambda _: (),
    "DeleteJob": rules.check_workflow_id,
    "DeleteJobs": rules.check_delete_jobs,
    "DeleteUser": rules.check_delete_user,
    "GetDeletion": rules.check_get_deletion,
    "UploadFile": file_rules.check_upload,
    "DownloadFile": file_rules.check_download,
    "GetFile": file_rules.check_file_id,
    "ListFiles": file_rules.check_list_files,
    "DeleteFile": file_rules.check_file_id,
    "CreateSchedule": partial(schedule_rules.check_create, batch_rules=batch_rules.check_create),
    "GetSchedule": schedule_rules.check_schedule_id,
    "ListSchedules": schedule_rules.check_list,
    "UpdateSchedule": partial(schedule_rules.check_update, batch_rules=batch_rules.check_create),
    "PauseSchedule": schedule_rules.check_pause,
    "UnpauseSchedule": schedule_rules.check_pause,
    "TriggerSchedule": schedule_rules.check_trigger,
    "BackfillSchedule": schedule_rules.check_backfill,
    "DeleteSchedule": schedule_rules.check_schedule_id,
    "CreateBatch": batch_rules.check_create,
    "GetBatch": batch_rules.check_batch_id,
    "StreamBatch": batch_rules.check_batch_id,
    "StreamBatchResults": batch_rules.check_stream_results,
    "CancelBatch": batch_rules.check_cancel_batch,
    "ListBatches": batch_rules.check_list_batches,
    "SubmitPipeline": pipeline_rules.check_submit,
    "GetPipeline": pipeline_rules.check_get,
    "StreamPipeline": pipeline_rules.check_stream,
    "CancelPipeline": pipeline_rules.check_cancel,
    "AnswerStep": pipeline_rules.check_answer,
    "ListPipelines": pipeline_rules.check_list,
}
"""The rules of the protos for the request of each method."""

LARGE_ANSWERS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("List", "ListDeliveries", "Redeliver", "ListFiles", "ListBatches", "ListPipelines"), 128 * 1024),
    **dict.fromkeys(("CreateBatch", "GetBatch", "CancelBatch", "GetPipeline"), 64 * 1024),
    **dict.fromkeys(("DeleteJob", "DeleteJobs", "DeleteUser", "GetDeletion"), 64 * 1024),
    # 20 versions, each of half a KiB or so.
    **dict.fromkeys(("SetModelAlias", "DeleteModelVersion"), 16 * 1024),
    # Ten runs, each with an error of at most 4 KiB or so.
    **dict.fromkeys(("CreateSchedule", "UpdateSchedule", "ListSchedules"), 64 * 1024),
    "GetSchedule": 64 * 1024 + schedule_rules.MAX_SCHEDULE_BYTES,
}
"""Maximum size, in bytes, of the answers of some methods. The servicer itself reserves the room of GetStatus and
GetJob, whose answers may be larger. The answers of the other methods are small."""

LARGE_REQUESTS: Final[Mapping[str, int]] = {
    "UploadFile": MAX_REQUEST_BYTES + file_rules.MAX_DATA_BYTES,
    "SubmitPipeline": MAX_REQUEST_BYTES + pipeline_rules.MAX_INPUT_BYTES,
    # The rest is for the schedule's id.
    **dict.fromkeys(("CreateSchedule", "UpdateSchedule"), schedule_rules.MAX_SCHEDULE_BYTES + 512),
}
"""Maximum size, in bytes, of the requests of some methods. Those of Submit are bounded by their job."""
