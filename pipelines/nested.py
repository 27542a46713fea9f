"""Steps that are workflows of their own: batches, and pipelines within pipelines."""

import asyncio
import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final, TypeVar

from temporalio import workflow
from temporalio.common import TypedSearchAttributes
from temporalio.exceptions import ApplicationError

with workflow.unsafe.imports_passed_through():
    from google.protobuf.message import Message

    from jobs import names, work_start
    from jobs.ids import tenant_of
    from jobs.options import duration
    from jobs.pipelines import TASK_TIMEOUT
    from jobs.search import attributes_of
    from llm_pb import batch_pb2, internal_pb2, llm_pb2, pipeline_pb2

from pipelines.admission import ADMISSION
from pipelines.execution import Execution
from pipelines.step import Step
from workflows import activities

_SHORTEST_WINDOW: Final = timedelta(seconds=1)
"""Minimum of BatchRequest.window. A pipeline that has less time left ends in that of its batch."""
_KINDS: Final = (pipeline_pb2.STEP_KIND_BATCH, pipeline_pb2.STEP_KIND_PIPELINE)
_C = TypeVar("_C", batch_pb2.BatchStatus, pipeline_pb2.PipelineResult)


async def run_batch(
    execution: Execution, step: Step, batch: batch_pb2.BatchRequest, timeout: timedelta | None
) -> batch_pb2.BatchStatus:
    """Run a batch as the step, and return how it ended. Raises what the child raises, StepFailed."""
    pipeline = execution.pipeline
    batch.user_id, batch.request_id, batch.project_id = pipeline.user_id, pipeline.request_id, pipeline.project_id
    batch.job_class = pipeline.job_class
    within = execution.within(step.path, timeout)
    batch.window.CopyFrom(duration(max(within, _SHORTEST_WINDOW)))
    if (left := execution.grant(step)) is not None:
        batch.budget.CopyFrom(left)
    # Gateways that are all away for some minutes delay the step.
    chosen = await workflow.execute_activity(
        activities.admit_batch, batch, schedule_to_close_timeout=within, start_to_close_timeout=ADMISSION
    )
    run = internal_pb2.BatchRun(batch=batch, options=chosen)
    memo = work_start.memo(batch, chosen, chosen.create_time, _traceparent(), execution.hash_, "")
    status = await _child(execution, step, names.BATCH_WORKFLOW_TYPE, run, batch_pb2.BatchStatus, memo)
    for name in ("output", "errors"):
        if status.HasField(name):
            execution.tree.change(step.path).files.append(getattr(status, name))
    return status


async def run_pipeline(
    execution: Execution, step: Step, request: pipeline_pb2.PipelineRequest, timeout: timedelta | None
) -> pipeline_pb2.PipelineResult:
    """Run a pipeline as the step, and return its result. Raises what the child raises, StepFailed."""
    pipeline, options = execution.pipeline, execution.options
    request.user_id, request.request_id, request.project_id = (
        pipeline.user_id,
        pipeline.request_id,
        pipeline.project_id,
    )
    request.job_class = pipeline.job_class
    within = execution.within(step.path, timeout)
    if (left := execution.grant(step)) is not None:
        request.budget.CopyFrom(left)
    chosen = internal_pb2.PipelineOptions(
        max_job_timeout=options.max_job_timeout,
        hashes=options.hashes,
        resumed=options.resumed,
        defaults=next((one for one in options.defaults_within if _is_of(one, request)), None),
        defaults_within=options.defaults_within,
    )
    chosen.create_time.FromDatetime(workflow.now())
    chosen.expire_time.FromDatetime(workflow.now() + within)
    run = internal_pb2.PipelineRun(pipeline=request, options=chosen)
    memo = work_start.memo(request, chosen, chosen.create_time, _traceparent(), execution.hash_, "")
    return await _child(
        execution,
        step,
        names.PIPELINE_WORKFLOW_TYPE,
        run,
        pipeline_pb2.PipelineResult,
        memo,
        task_timeout=TASK_TIMEOUT,
    )


async def tell_questions(execution: Execution, has_ended: Callable[[], bool]) -> None:
    """Tell the pipeline of which this one is a step how many of its steps wait for an answer, whenever that changes.

    Returns once this one has ended, or if it is no step.
    """
    parent, told = workflow.info().parent, 0
    if parent is None or not execution.id.startswith(f"{parent.workflow_id}/"):
        return

    def changed() -> bool:
        return has_ended() or execution.status.root.counts.needs_answer != told

    while True:
        await workflow.wait_condition(changed)
        # A pipeline without a question sends nothing, and its history has no marker of the change.
        if has_ended() or not workflow.patched(names.PATCH_TELLS_QUESTIONS):
            return
        told = execution.status.root.counts.needs_answer
        above = workflow.get_external_workflow_handle(parent.workflow_id, run_id=parent.run_id)
        # One that has ended meanwhile counts no questions any more.
        with contextlib.suppress(ApplicationError):
            await above.signal(
                names.SIGNAL_QUESTIONS, internal_pb2.PipelineQuestions(pipeline_id=execution.id, needs_answer=told)
            )


async def tell_reason(execution: Execution, reason: str) -> None:
    """Tell the open steps that are batches or pipelines why they are about to be cancelled.

    Temporal's cancel of a child could bring the reason, too, but would store it in clear.
    """
    nodes = (execution.tree.node(path) for path in execution.open)
    below = [node.step.workflow_id for node in nodes if node is not None and node.step.kind in _KINDS]
    told = [workflow.get_external_workflow_handle(id_) for id_ in below if id_]
    if told and workflow.patched(names.PATCH_TELLS_REASON):
        cancel = llm_pb2.CancelRequest(reason=reason)
        # One that has ended meanwhile needs no reason.
        await asyncio.gather(*(one.signal(names.SIGNAL_CANCEL, cancel) for one in told), return_exceptions=True)


async def _child(
    execution: Execution,
    step: Step,
    workflow_type: str,
    run: Message,
    result_type: type[_C],
    memo: dict[str, Any],
    **start: Any,
) -> _C:
    """Run a child, and count what it has used, however it ends. `start` are arguments of start_child_workflow()."""
    about = work_start.about(execution.pipeline)
    result = await execution.run_child(
        step,
        workflow_type,
        run,
        result_type,
        memo={**memo, names.MEMO_RERUN: True} if execution.options.resumed else memo,
        search_attributes=TypedSearchAttributes(attributes_of(about, tenant_of(execution.id), execution.hash_)),
        priority=workflow.info().priority,
        **start,
    )
    execution.count(step, result)
    return result


def _is_of(defaults: pipeline_pb2.PipelineRequest, request: pipeline_pb2.PipelineRequest) -> bool:
    return defaults.WhichOneof("spec") == request.WhichOneof("spec")


def _traceparent() -> str:
    return str(workflow.memo_value(names.MEMO_TRACEPARENT, ""))
