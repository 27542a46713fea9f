"""Every name that two sides of the suite share, once."""

from typing import Final

from temporalio.common import SearchAttributeKey

from jobs.limits import MAX_TEMPORAL_ID

JOB_WORKFLOW_TYPE: Final = "LLMJobWorkflow"
QUERY_GET_STATUS: Final = "GetStatus"
SIGNAL_CANCEL: Final = "Cancel"
QUERY_GET_DELIVERIES: Final = "GetDeliveries"

# Goes on with the deliveries of a job's outcome once the job has closed.
DELIVERY_WORKFLOW_TYPE: Final = "LLMDeliveryWorkflow"
SIGNAL_REDELIVER: Final = "Redeliver"

ACTIVITY_RUN: Final = "RunLLMOnGPU"
ACTIVITY_NOTIFY: Final = "NotifyUI"
# Tells the targets of a running job that asked for it how it gets on.
ACTIVITY_NOTIFY_PROGRESS: Final = "NotifyProgress"
# Asks Temporal to cancel the workflow that runs it: see workflows.llm_job.
ACTIVITY_REQUEST_CANCEL: Final = "RequestCancel"
# Reads back from the feed what the job that runs it had made, when its last attempt could not say so.
ACTIVITY_RECOVER_OUTPUT: Final = "RecoverOutput"
# Forgets the live feed of the job that runs it, whose outcome is durable by then.
ACTIVITY_FORGET_FEED: Final = "ForgetFeed"

WORKFLOW_QUEUE: Final = "gateway-workflows"
GPU_QUEUE: Final = "llm-gpu-activities"
NOTIFY_QUEUE: Final = "notifications-activities"
# Appended to the notifiers' queue: NotifyProgress lasts as long as its job, and must not take the room of NotifyUI.
PROGRESS_QUEUE_SUFFIX: Final = ".progress"
MAX_NOTIFY_QUEUE: Final = MAX_TEMPORAL_ID - len(PROGRESS_QUEUE_SUFFIX)

USER_ID: Final = SearchAttributeKey.for_keyword("UserID")
REQUEST_ID: Final = SearchAttributeKey.for_keyword("RequestID")
MODEL: Final = SearchAttributeKey.for_keyword("Model")
PROJECT_ID: Final = SearchAttributeKey.for_keyword("ProjectId")
LATENCY_MS: Final = SearchAttributeKey.for_int("LatencyMs")
# The final JobState by name: Temporal closes a job that ran out of time in an activity as Failed.
JOB_STATE: Final = SearchAttributeKey.for_keyword("JobState")
SEARCH_ATTRIBUTES: Final = (USER_ID, REQUEST_ID, MODEL, PROJECT_ID, LATENCY_MS, JOB_STATE)

# Memo of a job's workflow: the JobOptions its gateway chose, two digests of the JobRequest that tell a repeated Submit
# from another job under the same key, and the W3C traceparent of the Submit that started it. As it closes the workflow
# adds the final JobStatus, so that a closed job is read without a query, for which a worker may have to replay it, and
# the size of its JobResult in bytes, so that a gateway has room for it before it reads it. Messages are JSON there: see
# jobs.memo.
MEMO_OPTIONS: Final = "options"
# Of the job's bytes: the only one that older gateways write, and compare.
MEMO_DIGEST: Final = "request_sha256"
# Of what the job asks for: see jobs.equality.
MEMO_SAME_JOB_DIGEST: Final = "job_sha256"
MEMO_TRACEPARENT: Final = "traceparent"
MEMO_STATUS: Final = "status"
MEMO_RESULT_BYTES: Final = "result_bytes"

# Changes of workflow code, for workflow.patched: a workflow that began before one goes on without it.
# A workflow that was started by hand has its search attributes from its start on, and is judged by all rules of today.
PATCH_BY_HAND: Final = "search attributes at start"
# The id of an LLMDeliveryWorkflow is shortened where it would be too long.
PATCH_SHORTENED_DELIVERY_IDS: Final = "shortens-delivery-ids"

ERROR_DOMAIN: Final = "llm.v1"
