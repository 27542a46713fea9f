"""Steps that are jobs."""

from collections.abc import Awaitable, Callable
from datetime import timedelta

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from jobs import names
    from jobs.costs import reserved_tokens
    from jobs.options import duration
    from jobs.start import job_start
    from jobs.usage import usage_of
    from llm_pb import llm_pb2

from pipelines.admission import ADMISSION
from pipelines.execution import Execution
from pipelines.step import Step
from workflows import activities
from workflows.ordered_activities import start_in_order


async def run_job(
    execution: Execution,
    step: Step,
    job: llm_pb2.JobRequest,
    timeout: timedelta | None,
    is_usable: Callable[[llm_pb2.JobResult], Awaitable[bool]] | None = None,
) -> llm_pb2.JobResult:
    """Run a job as the step: a child, which nobody is notified of. Raises what the child raises, StepFailed.

    A pipeline that goes on runs no job again that has succeeded, and whose result is usable, as any is by default.
    """
    if (made := await _recall(execution, step, is_usable)) is not None:
        return made
    pipeline, info = execution.pipeline, workflow.info()
    job.user_id, job.request_id, job.project_id = pipeline.user_id, pipeline.request_id, pipeline.project_id
    job.job_class = pipeline.job_class
    within = execution.within(step.path, timeout)
    # Otherwise the job ends as the time of the pipeline does, which then has timed out and not failed.
    closes_itself = within < execution.time_left()
    job.timeouts.total.CopyFrom(duration(within))
    if (left := execution.grant(step)) is not None:
        job.budget.CopyFrom(left)
    chosen = await execution.admission.options_of(job, within)
    if not execution.compensating:
        await execution.leases.take(step.path, reserved_tokens(job, chosen.default_max_tokens))
    start = job_start(
        job,
        chosen,
        id_=f"{execution.id}/{step.path}",
        priority=info.priority,
        traceparent=workflow.memo_value(names.MEMO_TRACEPARENT, ""),
        hash_=execution.hash_,
    )
    memo = {**start.memo, names.MEMO_CLOSES_ITSELF: True} if closes_itself else start.memo
    arguments = {
        "memo": {**memo, names.MEMO_RERUN: True} if execution.options.resumed else memo,
        "search_attributes": start.search_attributes,
        "priority": start.priority,
        "execution_timeout": start.execution_timeout,
    }
    result = await execution.run_child(step, names.JOB_WORKFLOW_TYPE, job, llm_pb2.JobResult, **arguments)
    _take(execution, step, result)
    return result


async def _recall(
    execution: Execution, step: Step, is_usable: Callable[[llm_pb2.JobResult], Awaitable[bool]] | None
) -> llm_pb2.JobResult | None:
    """Return what the step's job has made in an earlier run of the pipeline; None if it has to be run.

    Raises FailureError for a job that was deleted.
    """
    if not execution.options.resumed:
        return None
    id_ = f"{execution.id}/{step.path}"
    result = await start_in_order(
        activities.recall_step, id_, schedule_to_close_timeout=ADMISSION, start_to_close_timeout=ADMISSION
    )
    execution.room.add(result)
    if not result.HasField("metadata") or (is_usable is not None and not await is_usable(result)):
        return None
    execution.tree.change(step.path).workflow_id = id_
    _take(execution, step, result)
    execution.recalled_tokens += step.usage.output_tokens
    return result


def _take(execution: Execution, step: Step, result: llm_pb2.JobResult) -> None:
    """Note in the tree what the job of a step has made and used."""
    step.usage.CopyFrom(usage_of(result.metadata))
    if files := [*([result.output_file] if result.HasField("output_file") else ()), *result.images]:
        execution.tree.change(step.path).files.extend(files)
