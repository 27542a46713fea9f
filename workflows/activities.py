"""Typed stubs of the activities that workflows call: the name, input and result of each. They run elsewhere."""

from temporalio import activity

from jobs import names
from llm_pb import batch_pb2, common_pb2, internal_pb2, llm_pb2, pipeline_pb2


@activity.defn(name=names.ACTIVITY_RUN)
async def run_llm_on_gpu(request: internal_pb2.RunRequest) -> llm_pb2.JobResult:
    """See services.gpu_worker.activity."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_NOTIFY)
async def notify_ui(request: internal_pb2.NotifyRequest) -> internal_pb2.NotifyResponse:
    """See services.notifier.activity."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_NOTIFY_PROGRESS)
async def notify_progress(request: internal_pb2.NotifyProgressRequest) -> internal_pb2.NotifyProgressResponse:
    """See services.notifier.progress."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_REQUEST_CANCEL)
async def request_cancel() -> None:
    """Ask Temporal to cancel the workflow. It and the two below are in services.gateway.workflow_worker."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_RECOVER_OUTPUT)
async def recover_output(feed_key: str = "", max_output_bytes: int = 0, max_inline_bytes: int = 0) -> llm_pb2.JobResult:
    """Read the job's output back from its live feed, and close the feed to attempts that still write.

    The arguments are those of the RunRequest.
    """
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_FORGET_FEED)
async def forget_feed(
    feed_key: str = "", ledger: str = "", output_tokens: int = 0, waiter: str = "", reservation: int = 0
) -> None:
    """Notify the job's watchers that it is about to end, then remove its feed; release the job's slot in the ledger;
    signal the workflow that waits for the job.

    `output_tokens` is what the job has used, `reservation` as in ReserveRequest.reservations.

    `feed_key` is that of the RunRequest.
    """
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_FIND_ENDED_JOBS)
async def find_ended_jobs(request: internal_pb2.FindEndedJobsRequest) -> internal_pb2.FindEndedJobsResponse:
    """Describe each of the jobs. See services.gateway.quotas.ended_jobs."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_LEASE_TOKENS)
async def lease_tokens(request: internal_pb2.LeaseRequest) -> internal_pb2.LeaseResponse:
    """Ask the ledger of the batch's tenant for output tokens. See services.gateway.quotas.ledgers."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_STOP_JOB)
async def stop_job(request: internal_pb2.StopJobRequest) -> internal_pb2.StopJobResponse:
    """Ask an open job to stop, end the deliveries of a closed one. All steps are in services.gateway.deletion.steps."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_INSPECT_JOB)
async def inspect_job(workflow_id: str) -> internal_pb2.JobRemains:
    """Find out what there is of a closed job, and where copies of it are."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_KEEP_JOB_ID)
async def keep_job_id(workflow_id: str) -> bool:
    """Start the LLMJobTombstone under the id of a closed job; return False for a job that is open."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_REMOVE_JOB)
async def remove_job(remains: internal_pb2.JobRemains) -> internal_pb2.RemovedParts:
    """Remove what there is of a closed job."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_FIND_JOBS)
async def find_jobs(request: internal_pb2.FindJobsRequest) -> internal_pb2.FindJobsResponse:
    """Find jobs to delete."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_DELETE_SCHEDULES)
async def delete_schedules(request: internal_pb2.DeleteOwnedRequest) -> internal_pb2.DeleteOwnedResponse:
    """Delete some schedules of a user, with their runs. See services.gateway.deletion.owned."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_DELETE_FILES)
async def delete_files(request: internal_pb2.DeleteOwnedRequest) -> internal_pb2.DeleteOwnedResponse:
    """Delete some files of a user, with their records. See services.gateway.deletion.owned."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_REMOVE_FILE)
async def remove_file(request: internal_pb2.RemoveFileRequest) -> None:
    """Remove the content of a file from the store. See services.gateway.files."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_START_SCHEDULED_JOB)
async def start_scheduled_job(request: internal_pb2.StartScheduledJobRequest) -> internal_pb2.ScheduledJob:
    """Check and start the job of a schedule whose time has come. See services.gateway.schedules.jobs."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_CHECK_SCHEDULED_JOB)
async def check_scheduled_job(request: internal_pb2.CheckScheduledJobRequest) -> internal_pb2.ScheduledJob:
    """Say how the job of a schedule stands, and cancel it if the request says so."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_PLAN_BATCH)
async def plan_batch(request: internal_pb2.PlanRequest) -> internal_pb2.BatchPlan:
    """Read and check the lines of a batch. Raises INPUT_GONE for a file that is gone."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_RUN_BATCH_CHUNK)
async def run_batch_chunk(request: internal_pb2.ChunkRequest) -> internal_pb2.ChunkResult:
    """Run some items of a batch. See services.gpu_worker."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_COLLECT_CHUNKS)
async def collect_chunks(request: internal_pb2.CollectRequest) -> internal_pb2.ChunkManifest:
    """Read what the last heartbeats of the batch's chunks hold. It and those below are in services.gateway.batches."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_WRITE_MANIFEST)
async def write_manifest(request: internal_pb2.ManifestRequest) -> common_pb2.FileRef:
    """Write a manifest of ended chunks to the store."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_MERGE_BATCH)
async def merge_batch(request: internal_pb2.MergeRequest) -> internal_pb2.MergeResult:
    """Write the output and the errors of a batch."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_CLEAN_BATCH)
async def clean_batch(request: internal_pb2.CleanRequest) -> None:
    """Remove what nobody needs after the end of a batch, and release its slot in the ledger."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_ADMIT_STEP)
async def admit_step(job: llm_pb2.JobRequest) -> internal_pb2.JobOptions:
    """Check the job of a pipeline's step and choose its options. It and those below are in services.gateway.pipelines.

    Raises the reason of the refusal.
    """
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_ADMIT_STEPS)
async def admit_steps(request: internal_pb2.AdmitStepsRequest) -> internal_pb2.AdmitStepsResponse:
    """Do the same with the jobs of several steps. Those that are refused, or cannot be checked now, get no options."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_RECALL_STEP)
async def recall_step(job_id: str) -> llm_pb2.JobResult:
    """Return the result of a step's job, of an earlier run of its pipeline; an empty one unless it has succeeded."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_LEFT_USAGE)
async def left_usage(workflow_id: str) -> pipeline_pb2.PipelineResult:
    """Return usage and counts of a job, batch or pipeline that has ended without a result; empty if it tells none."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_PUBLISH_PIPELINE)
async def publish_pipeline(change: internal_pb2.PipelineChange) -> None:
    """Append a change of the pipeline's tree to its feed."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_ADMIT_BATCH)
async def admit_batch(batch: batch_pb2.BatchRequest) -> internal_pb2.BatchOptions:
    """Check the batch of a pipeline's step and choose its options. Raises the reason of the refusal."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_READ_TEXT)
async def read_text(request: internal_pb2.ReadTextRequest) -> str:
    """Read a file of text. Raises FILE_NOT_FOUND, FILE_IS_NO_TEXT."""
    raise NotImplementedError


@activity.defn(name=names.ACTIVITY_WRITE_TEXT)
async def write_text(request: internal_pb2.WriteTextRequest) -> common_pb2.FileRef:
    """Write a file of text. Raises QUOTA_EXCEEDED."""
    raise NotImplementedError
