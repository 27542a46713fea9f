"""The workflow that test_payload_converter runs in the sandbox. It is a separate module because the sandbox imports it.

The sandbox passes no module through on purpose: the converter must handle classes that are copies of its own.
"""

from datetime import timedelta

from google.protobuf import empty_pb2
from temporalio import activity, workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ApplicationError

from llm_pb import llm_pb2

TASK_QUEUE = "payload-converter"


@activity.defn(name="Generate")
async def generate(job: llm_pb2.JobRequest) -> llm_pb2.JobResult:
    """Fail once after a heartbeat, then return the progress that the heartbeat carried."""
    if not activity.info().heartbeat_details:
        activity.heartbeat(llm_pb2.JobProgress(output_tokens=7, stage="decode"))
        raise ApplicationError("the first attempt fails")
    progress: llm_pb2.JobProgress = activity.info().heartbeat_details[0]
    metadata = llm_pb2.ResultMetadata(output_tokens=progress.output_tokens, model=job.model)
    return llm_pb2.JobResult(output=f"{job.prompt}, {progress.stage}", metadata=metadata)


@workflow.defn(name="Convert")
class Convert:
    """Workflow that sends messages through every kind of payload, then ends as the job requests."""

    def __init__(self) -> None:
        self.cancel = llm_pb2.CancelRequest()

    @workflow.run
    async def run(self, job: llm_pb2.JobRequest) -> llm_pb2.JobResult:
        """Return the activity's result, or fail with it as a detail if a signal gave a reason."""
        result: llm_pb2.JobResult = await workflow.execute_activity(
            "Generate",
            job,
            result_type=llm_pb2.JobResult,
            start_to_close_timeout=timedelta(seconds=20),
            retry_policy=RetryPolicy(initial_interval=timedelta(milliseconds=1), maximum_attempts=2),
        )
        await workflow.wait_condition(lambda: self.cancel.reason != "" or job.priority == 1)
        if self.cancel.reason:
            raise ApplicationError(self.cancel.reason, result, type="REFUSED")
        return result

    @workflow.signal(name="Cancel")
    def on_cancel(self, request: llm_pb2.CancelRequest) -> None:
        """Store the reason."""
        self.cancel = request

    @workflow.query(name="GetStatus")
    def get_status(self) -> llm_pb2.JobStatus:
        """Return the contents of the memo and of the header of the start."""
        progress = workflow.memo_value("progress", type_hint=llm_pb2.JobProgress)
        header = workflow.payload_converter().from_payload(workflow.info().headers["owner"], llm_pb2.JobSummary)
        return llm_pb2.JobStatus(workflow_id=header.user_id, progress=progress)

    @workflow.query(name="Nothing")
    def nothing(self, _empty: empty_pb2.Empty | None) -> None:
        """Accept an optional message and return None."""
