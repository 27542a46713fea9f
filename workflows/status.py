"""The status of a job as its workflow begins."""

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from jobs import names
    from jobs.classes import class_of
    from jobs.ids import trace_id
    from jobs.memo import time_from_memo
    from llm_pb import llm_pb2


def first_status(job: llm_pb2.JobRequest) -> llm_pb2.JobStatus:
    """Return the status of a job that waits for a worker."""
    info = workflow.info()
    status = llm_pb2.JobStatus(
        workflow_id=info.workflow_id,
        run_id=info.run_id,
        state=llm_pb2.JOB_STATE_QUEUED,
        trace_id=trace_id(workflow.memo_value(names.MEMO_TRACEPARENT, "")),
        job_class=class_of(job),
    )
    accepted = time_from_memo(workflow.memo_value(names.MEMO_CREATE_TIME, None))
    if accepted is not None:
        status.create_time.CopyFrom(accepted)
    else:
        status.create_time.FromDatetime(info.workflow_start_time)
    return status
