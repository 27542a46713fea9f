"""The names that several parts of the suite share."""

from typing import Final

from temporalio.common import SearchAttributeKey

from jobs.ids import MAX_TEMPORAL_ID

JOB_WORKFLOW_TYPE: Final = "LLMJobWorkflow"
QUERY_GET_STATUS: Final = "GetStatus"
SIGNAL_CANCEL: Final = "Cancel"
# Why a deletion cancels what it deletes.
REASON_DELETION: Final = "the job is being deleted"
# Somebody watches the job: see workflows.watch_lease.
SIGNAL_WATCHED: Final = "Watched"
QUERY_GET_DELIVERIES: Final = "GetDeliveries"

# Continues the deliveries of a job's outcome after the job has closed.
DELIVERY_WORKFLOW_TYPE: Final = "LLMDeliveryWorkflow"
SIGNAL_REDELIVER: Final = "Redeliver"
# Is open for as long as a job may not be sent again.
REDELIVERY_WORKFLOW_TYPE: Final = "LLMRedeliveryWorkflow"

# Counts the open jobs of a tenant that has a quota for them.
LEDGER_WORKFLOW_TYPE: Final = "LLMLedgerWorkflow"
UPDATE_RESERVE: Final = "Reserve"
UPDATE_LEASE: Final = "Lease"
UPDATE_COUNT_FILES: Final = "CountFiles"
SIGNAL_RELEASE: Final = "Release"
QUERY_GET_LEDGER: Final = "GetLedger"
QUERY_COUNT_SLOTS: Final = "CountSlots"
QUERY_GET_USAGE: Final = "GetUsage"
# Types of the error with which Reserve is refused when no job of it can get a slot: too many are in use; open jobs have
# reserved too many output tokens; too many were used today.
QUOTA_REACHED: Final = "QUOTA_REACHED"
TOKENS_RESERVED: Final = "TOKENS_RESERVED"
TOKENS_USED: Final = "TOKENS_USED"
# Deletes a job, many, and all that a user has.
DELETION_WORKFLOW_TYPE: Final = "LLMDeletionWorkflow"
BULK_DELETION_WORKFLOW_TYPE: Final = "LLMBulkDeletionWorkflow"
USER_DELETION_WORKFLOW_TYPE: Final = "LLMUserDeletionWorkflow"
QUERY_GET_DELETION: Final = "GetDeletion"
# Keeps the id of a deleted job, so that a late Submit does not run the job again. It holds nothing of the job.
TOMBSTONE_WORKFLOW_TYPE: Final = "LLMJobTombstone"

# The record of a file, open for as long as the file exists.
FILE_WORKFLOW_TYPE: Final = "LLMFileWorkflow"
UPDATE_COMMIT_SEGMENT: Final = "CommitSegment"
UPDATE_DELETE_FILE: Final = "DeleteFile"
QUERY_GET_RECORD: Final = "GetRecord"
# Types of the errors with which the updates of a file are refused.
WRONG_OFFSET: Final = "WRONG_OFFSET"
FILE_NOT_WRITABLE: Final = "FILE_NOT_WRITABLE"
TOO_MANY_SEGMENTS: Final = "TOO_MANY_SEGMENTS"

# Starts the job of a schedule whose time has come, and is open until the job has ended. Temporal's schedules start it.
SCHEDULED_WORKFLOW_TYPE: Final = "LLMScheduledWorkflow"
# A job tells the workflow that waits for it that its outcome is settled.
SIGNAL_JOB_SETTLED: Final = "JobSettled"
# A pipeline tells the one of which it is a step how many of its steps wait for an answer.
SIGNAL_QUESTIONS: Final = "Questions"
# Type of the error with which the run of a schedule ends that pauses then.
RUN_FAILED: Final = "RUN_FAILED"
# A batch, and what it does: see workflows.llm_batch.
BATCH_WORKFLOW_TYPE: Final = "LLMBatchWorkflow"
ACTIVITY_PLAN_BATCH: Final = "PlanBatch"
ACTIVITY_RUN_BATCH_CHUNK: Final = "RunBatchChunk"
ACTIVITY_COLLECT_CHUNKS: Final = "CollectChunks"
ACTIVITY_WRITE_MANIFEST: Final = "WriteManifest"
ACTIVITY_MERGE_BATCH: Final = "MergeBatch"
ACTIVITY_CLEAN_BATCH: Final = "CleanBatch"
# A pipeline, and what it does: see pipelines.workflow.
PIPELINE_WORKFLOW_TYPE: Final = "LLMPipelineWorkflow"
UPDATE_ANSWER_STEP: Final = "AnswerStep"
UPDATE_TELL: Final = "Tell"
TOLD: Final = "TOLD"
"""The type of the error by which a pipeline refuses the update Tell. Its details are what the pipeline tells."""
ACTIVITY_ADMIT_STEP: Final = "AdmitStep"
ACTIVITY_ADMIT_STEPS: Final = "AdmitSteps"
ACTIVITY_RECALL_STEP: Final = "RecallStep"
ACTIVITY_LEFT_USAGE: Final = "LeftUsage"
ACTIVITY_PUBLISH_PIPELINE: Final = "PublishPipeline"
ACTIVITY_ADMIT_BATCH: Final = "AdmitBatch"
ACTIVITY_READ_TEXT: Final = "ReadText"
ACTIVITY_WRITE_TEXT: Final = "WriteText"
# The steps of a training: see pipelines.training.
ACTIVITY_VALIDATE_DATASET: Final = "ValidateDataset"
ACTIVITY_TOKENIZE_DATASET: Final = "TokenizeDataset"
ACTIVITY_TRAIN_MODEL: Final = "TrainModel"
ACTIVITY_EVALUATE_MODEL: Final = "EvaluateModel"
ACTIVITY_REGISTER_MODEL: Final = "RegisterModel"
ACTIVITY_CLEAN_TRAINING: Final = "CleanTraining"
# The trained models of a tenant.
MODELS_WORKFLOW_TYPE: Final = "LLMModelsWorkflow"
UPDATE_REGISTER_MODEL: Final = "RegisterModel"
UPDATE_SET_MODEL_ALIAS: Final = "SetModelAlias"
UPDATE_DELETE_MODEL_VERSION: Final = "DeleteModelVersion"
# Type of the error with which a model beyond the maximum is refused.
TOO_MANY_MODELS: Final = "TOO_MANY_MODELS"
MODEL_NOT_FOUND: Final = "MODEL_NOT_FOUND"
MODEL_VERSION_IN_USE: Final = "MODEL_VERSION_IN_USE"
# Types of the errors with which an answer is refused.
STEP_NOT_FOUND: Final = "STEP_NOT_FOUND"
STEP_NOT_WAITING: Final = "STEP_NOT_WAITING"
STEP_ANSWERED: Final = "STEP_ANSWERED"

ACTIVITY_RUN: Final = "RunLLMOnGPU"
ACTIVITY_NOTIFY: Final = "NotifyUI"
# Notifies the targets of a running job of its progress, if the job asks for it.
ACTIVITY_NOTIFY_PROGRESS: Final = "NotifyProgress"
# Asks Temporal to cancel the workflow that runs it: see workflows.llm_job.
ACTIVITY_REQUEST_CANCEL: Final = "RequestCancel"
# Reads the output of the job that runs it back from the feed, if its last attempt could not report it.
ACTIVITY_RECOVER_OUTPUT: Final = "RecoverOutput"
# Removes the live feed of the job that runs it, whose outcome is durable by then, and releases its slot in the ledger.
ACTIVITY_FORGET_FEED: Final = "ForgetFeed"
# Finds the jobs of a ledger that no longer need their slots.
ACTIVITY_FIND_ENDED_JOBS: Final = "FindEndedJobs"
# Leases further output tokens of the tenant's day to a batch.
ACTIVITY_LEASE_TOKENS: Final = "LeaseTokens"
# The steps of a deletion: see workflows.llm_deletion.
ACTIVITY_STOP_JOB: Final = "StopJob"
ACTIVITY_INSPECT_JOB: Final = "InspectJob"
ACTIVITY_KEEP_JOB_ID: Final = "KeepJobId"
ACTIVITY_REMOVE_JOB: Final = "RemoveJob"
ACTIVITY_FIND_JOBS: Final = "FindJobs"
# Deletes what no workflow of its own deletes: see workflows.llm_user_deletion.
ACTIVITY_DELETE_SCHEDULES: Final = "DeleteSchedules"
ACTIVITY_DELETE_FILES: Final = "DeleteFiles"
# Removes the content of a file from the store.
ACTIVITY_REMOVE_FILE: Final = "RemoveFile"
# Checks and starts the job of a schedule, and says how it stands: see workflows.llm_scheduled.
ACTIVITY_START_SCHEDULED_JOB: Final = "StartScheduledJob"
ACTIVITY_CHECK_SCHEDULED_JOB: Final = "CheckScheduledJob"

WORKFLOW_QUEUE: Final = "gateway-workflows"
# Appended to the workflows' queue: the chunks of batches whose items are jobs of their own run for hours, and must not
# take the slots of other activities.
WATCHED_QUEUE_SUFFIX: Final = ".watched"
# Appended to the workflows' queue: the steps of batches that take a core for minutes, PlanBatch and MergeBatch.
BATCH_STEPS_QUEUE_SUFFIX: Final = ".batches"
MAX_WORKFLOW_QUEUE: Final = MAX_TEMPORAL_ID - max(len(WATCHED_QUEUE_SUFFIX), len(BATCH_STEPS_QUEUE_SUFFIX))
GPU_QUEUE: Final = "llm-gpu-activities"
TRAINING_QUEUE: Final = "training"
# TrainModel runs for hours, and must not take the slots of the other steps of trainings.
TRAINING_RUNS_QUEUE: Final = "training.runs"
NOTIFY_QUEUE: Final = "notifications-activities"
# Appended to the notifiers' queue: NotifyProgress runs as long as its job, and must not take the slots of NotifyUI.
PROGRESS_QUEUE_SUFFIX: Final = ".progress"
MAX_NOTIFY_QUEUE: Final = MAX_TEMPORAL_ID - len(PROGRESS_QUEUE_SUFFIX)

USER_ID: Final = SearchAttributeKey.for_keyword("UserID")
REQUEST_ID: Final = SearchAttributeKey.for_keyword("RequestID")
MODEL: Final = SearchAttributeKey.for_keyword("Model")
PROJECT_ID: Final = SearchAttributeKey.for_keyword("ProjectId")
LATENCY_MS: Final = SearchAttributeKey.for_int("LatencyMs")
# The final JobState by name: Temporal closes a job that ran out of time in an activity as Failed.
JOB_STATE: Final = SearchAttributeKey.for_keyword("JobState")
# Only jobs of a tenant have it, so that an installation without tenants does without it.
TENANT_ID: Final = SearchAttributeKey.for_keyword("TenantId")
# The JobClass by name. Only jobs of another class than JOB_CLASS_STANDARD have it, so that an installation without such
# jobs does without it.
JOB_CLASS: Final = SearchAttributeKey.for_keyword("JobClass")
# Temporal's own: the time of the schedule for which it has started a workflow, in whole seconds and without jitter.
SCHEDULED_TIME: Final = SearchAttributeKey.for_datetime("TemporalScheduledStartTime")
SEARCH_ATTRIBUTES: Final = (USER_ID, REQUEST_ID, MODEL, PROJECT_ID, LATENCY_MS, JOB_STATE, TENANT_ID, JOB_CLASS)

# Memo of a job's workflow. At its start it holds the JobOptions that the gateway chose, two digests of the JobRequest,
# which distinguish a repeated Submit from another job under the same key, and the W3C traceparent of the Submit. As it
# closes, the workflow adds the final JobStatus, so that a closed job is read without a query, for which a worker may
# have to replay it. It also adds the size of its JobResult in bytes, so that a gateway can reserve memory before it
# reads the result. Messages are JSON: see jobs.memo.
MEMO_OPTIONS: Final = "options"
# JobOptions.notify_operator: see jobs.options.memo_of.
MEMO_NOTIFY_OPERATOR: Final = "notify_operator"
# JobOptions.ledger, likewise. Only jobs that hold a slot have it.
MEMO_LEDGER: Final = "ledger"
MEMO_MAX_OUTPUT_BYTES: Final = "max_output_bytes"
# JobOptions.max_inline_bytes, likewise. Only steps of pipelines have it.
MEMO_MAX_INLINE_BYTES: Final = "max_inline_bytes"
# JobOptions.cache, likewise. Only jobs that use the cache of answers have it.
MEMO_CACHE: Final = "cache"
# JobOptions.price, likewise. Only jobs of a model with a price have it.
MEMO_PRICE: Final = "price"
# Digest of the job's bytes, the only one that older gateways write and compare.
MEMO_DIGEST: Final = "request_sha256"
# Digest of what the job asks for: see jobs.equality.
MEMO_SAME_JOB_DIGEST: Final = "job_sha256"
MEMO_TRACEPARENT: Final = "traceparent"
# The values, by name, of the search attributes that are hashed.
MEMO_SEARCH_ATTRIBUTES: Final = "search_attributes"
# When the gateway accepted the job, as RFC 3339. Temporal starts its workflow a little later, by another clock.
MEMO_CREATE_TIME: Final = "create_time"
# The job's labels, which List shows. Only jobs with labels have it.
MEMO_LABELS: Final = "labels"
# Seconds after which a job that nobody watches is cancelled. Only jobs that ask for it have it.
MEMO_CANCEL_IF_UNWATCHED: Final = "cancel_if_unwatched"
# Workflow id of the workflow that waits for the job, which ForgetFeed signals. Only jobs that one waits for have it.
MEMO_WAITER: Final = "waiter"
# Set for a job whose id may have had an earlier run, of the same step of a pipeline that had failed.
MEMO_RERUN: Final = "rerun"
# Set for a job that closes by itself once its total time is spent, and does not wait for Temporal to end it.
MEMO_CLOSES_ITSELF: Final = "closes_itself"
# Of a job that is an item of a batch: when the batch was accepted, which distinguishes the runs of a batch.
MEMO_BATCH_TIME: Final = "batch_time"
MEMO_STATUS: Final = "status"
MEMO_RESULT_BYTES: Final = "result_bytes"
# ResultMetadata.cost_micros, which List shows. Only jobs that have a cost have it.
MEMO_COST_MICROS: Final = "cost_micros"
# Usage of a child that was cancelled or timed out, as JSON: Temporal passes no result of it on to its parent.
MEMO_USAGE: Final = "usage"
# Of a pipeline's workflow at its end: the output tokens of its usage that an earlier run has used.
MEMO_RECALLED_TOKENS: Final = "recalled_tokens"
# Memo of a file's workflow: the File as it is now, as JSON, empty once the file is deleted; and the digest of what its
# upload says of it, which distinguishes a repeated upload from another file under the same key.
MEMO_FILE: Final = "file"
MEMO_FILE_DIGEST: Final = "description_sha256"

# Memo of an LLMScheduledWorkflow: its ScheduleRun.
MEMO_RUN: Final = "run"
# Memo of a batch's workflow at its end: the BatchProgress, by which its results are read, as JSON. Its status is under
# MEMO_STATUS.
MEMO_RECORD: Final = "record"

# Changes of workflow code, for workflow.patched: a workflow that began before a change continues without it.
# A workflow that was started by hand has search attributes from its start on, and must keep all current rules.
PATCH_BY_HAND: Final = "search attributes at start"
# The id of an LLMDeliveryWorkflow is shortened where it would be too long.
PATCH_SHORTENED_DELIVERY_IDS: Final = "shortens-delivery-ids"
# A job whose total time is the first to be spent ends with TOTAL_TIMEOUT, whichever of its limits Temporal reports.
PATCH_TOTAL_TIMEOUT: Final = "names-total-timeout"
# A deletion of many does not try again to delete a job whose deletion has failed.
PATCH_FAILED_DELETIONS: Final = "counts-failed-deletions"
# The changes of a pipeline's tree are paced by timers alone, not by the time.
PATCH_PACED: Final = "paces-by-timers"
# The timer that paces them starts with the activity that publishes one, and not at its end.
PATCH_PACED_AT_ONCE: Final = "paces-at-once"
# A pipeline asks what a step has used that was cancelled or ran out of time.
PATCH_LEFT_USAGE: Final = "asks-what-is-left"
# Only so many steps of a pipeline begin in one workflow task.
PATCH_STEP_TURNS: Final = "begins-steps-in-turns"
# A fan-out of a pipeline over more items than its limit has as many tasks as its limit. One over more than there may be
# steps fails before its first one.
PATCH_WIDE_MAPS: Final = "refuses-wide-maps"
# A pipeline tells the one of which it is a step how many of its steps wait for an answer.
PATCH_TELLS_QUESTIONS: Final = "tells-questions"
# The pipeline above notes it. In a history of an earlier version the signal may stand, too, and changes nothing there.
PATCH_NOTES_QUESTIONS: Final = "notes-questions"
# A cancel of a pipeline cancels each step once, although the first one that ends ends the fan-out of all of them.
PATCH_CANCELS_ONCE: Final = "cancels-steps-once"
# A cancel of a step whose child is just being started ends the step.
PATCH_KEEPS_CANCELS: Final = "keeps-cancels"
# A job of a pipeline that cannot be admitted at once is admitted outside of a workflow task.
PATCH_ADMITS_LATER: Final = "admits-later-elsewhere"
# The jobs of a pipeline's fan-out that begin at the same time are admitted by one activity.
PATCH_ADMITS_TOGETHER: Final = "admits-steps-together"
# A step of a pipeline fails whose output is JSON of another form than its schema.
PATCH_FORMS: Final = "refuses-other-forms"
# The times of a pipeline are those of Temporal's clock, also when it began and when it is stopped.
PATCH_ONE_CLOCK: Final = "has-one-clock"
# A pipeline that goes on takes JSON from the earlier run that is a file, as it does a smaller one.
PATCH_RECALLS_FILES: Final = "recalls-json-files"
# A task that the code of a pipeline has left running begins no step while compensations run.
PATCH_LEFT_TASKS: Final = "begins-no-steps-of-left-tasks"
# The chunks of a batch have leases of its budget.
PATCH_LEASES: Final = "leases-budgets"
# A ledger leases nothing to a batch that has released its slot.
PATCH_RELEASED_LEASES: Final = "released-batches-lease-nothing"
# It leases nothing either to one that has released its slot while the ledger checked the slots for the lease.
PATCH_CHECKED_LEASES: Final = "batches-released-in-a-check-lease-nothing"
# A check of a ledger that fails changes nothing.
PATCH_FAILED_CHECKS: Final = "failed-checks-change-nothing"
# A step whose use cannot be asked for ends as it has ended.
PATCH_FAILED_ASKING: Final = "failed-asking-changes-nothing"
# A ledger tells the reservations of a pipeline apart that is submitted again.
PATCH_RESERVATIONS: Final = "tells-reservations-apart"
# A batch of which nothing runs asks for all that its next line needs, and holds nothing until it has that.
PATCH_RETURNED_LEASES: Final = "returns-leases-while-it-waits"
# A ledger counts a file although one of its id is gone that seems later: the clocks of gateways differ.
PATCH_SKEWED_FILES: Final = "counts-files-of-skewed-clocks"
# A trained model is removed with its last version.
PATCH_REMOVED_MODELS: Final = "removes-models"
# No command of a pipeline, a ledger, a job or a run of a schedule follows from the end of a local activity where
# something else makes or changes commands at the same time. A query may delay that end to the next workflow task, and a
# replay gets it in the one before, so that other commands would come, or in another order.
PATCH_ORDERED: Final = "orders-commands"
# A pipeline publishes a change of its tree after all that its code does in the same workflow task.
PATCH_PUBLISHES_LAST: Final = "publishes-last"
# Before its last local activities a cancelled workflow decides whether it asks Temporal to cancel it.
PATCH_DECIDES_REQUEST: Final = "decides-on-its-cancel"
# A step of a pipeline fails that asks nothing.
PATCH_ASKS_SOMETHING: Final = "asks-something"
# A pipeline that is cancelled tells the batches and pipelines that are its steps why.
PATCH_TELLS_REASON: Final = "tells-reasons"
# A gateway that does not have a pipeline gives it up: nobody else has taken its first task in time.
PATCH_GIVES_UP: Final = "gives-up-unknown-pipelines"
