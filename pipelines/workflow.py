"""LLMPipelineWorkflow: one pipeline from its acceptance to its end.

    run its code ──▶ its compensations, if it did not succeed ──▶ remove feed, release slot (ForgetFeed)
        │                                                              └▶ notify of the outcome (NotifyUI) ──▶ close
        │ AdmitStep, then a child LLMJobWorkflow for each job; any activity for other steps
        └ PublishPipeline when the tree has changed, at most four times a second; once, if it has 1,000 nodes

It closes as a job does: SUCCEEDED is Completed with the PipelineResult, CANCELLED is Canceled, FAILED and TIMED_OUT are
Failed with the reason as the type. Its memo then holds the PipelineStatus. The tree is read by the update Tell while it
is open, and by a query later.
"""

import asyncio
from datetime import UTC, timedelta
from typing import Any, Final

from temporalio import workflow
from temporalio.common import RetryPolicy, VersioningBehavior
from temporalio.exceptions import ApplicationError, CancelledError

with workflow.unsafe.imports_passed_through():
    from google.rpc import code_pb2, status_pb2

    from jobs import errors, names
    from jobs.events import notification, pipeline_event, targets_of
    from jobs.ids import trace_id
    from jobs.inputs import one_input
    from jobs.limits import MAX_RESULT_BYTES
    from jobs.memo import to_memo
    from jobs.pipelines import (
        CANCELLED,
        OUT_OF_TIME,
        PROGRAM_ERROR,
        STEP_STATES,
        TOTAL_TIMEOUT,
        failure,
    )
    from llm_pb import internal_pb2, llm_pb2, pipeline_pb2
    from pipelines.errors import StepFailed, contained, described, places, quietly, status_of

from pipelines.code import Outcome, give_up, has_code, run_code
from pipelines.execution import Execution
from pipelines.metrics import record_end
from pipelines.nested import tell_questions, tell_reason
from pipelines.publishing import publish_tree
from workflows import activities
from workflows.cancellation import Cancellation
from workflows.deliveries import DeliveryLoops, deliver_outcome

_LOCAL: Final = timedelta(seconds=10)
_ONCE: Final = RetryPolicy(maximum_attempts=1)


# No recorded history replays the code of an operator's pipelines, so a pipeline stays with the code that started it.
@workflow.defn(name=names.PIPELINE_WORKFLOW_TYPE, versioning_behavior=VersioningBehavior.PINNED)
class LLMPipelineWorkflow:
    """Runs one PipelineRequest and returns its PipelineResult."""

    @workflow.init
    @one_input
    def __init__(self, run: internal_pb2.PipelineRun | None = None) -> None:
        self._run = internal_pb2.PipelineRun()
        if run is not None:
            self._run.CopyFrom(run)
        info, chosen = workflow.info(), self._run.options
        if not chosen.HasField("create_time"):
            chosen.create_time.FromDatetime(info.workflow_start_time)
        if not chosen.HasField("expire_time"):
            chosen.expire_time.FromDatetime(chosen.create_time.ToDatetime(UTC) + timedelta(days=1))
        if not chosen.HasField("max_job_timeout"):
            chosen.max_job_timeout.FromTimedelta(timedelta(days=1))
        # A gateway has set both times by its clock. All others are Temporal's.
        by_gateway = info.parent is None and workflow.patched(names.PATCH_ONE_CLOCK)
        if by_gateway:
            lasts = chosen.expire_time.ToDatetime(UTC) - chosen.create_time.ToDatetime(UTC)
            chosen.expire_time.FromDatetime(info.workflow_start_time + lasts)
        self._execution = Execution(self._run)
        self._status = self._execution.status
        if by_gateway:
            # The time in the options stays, because it is that of the reservation.
            self._status.root.start_time.FromDatetime(info.workflow_start_time)
        self._status.trace_id = trace_id(workflow.memo_value(names.MEMO_TRACEPARENT, ""))
        self._cancellation = Cancellation()
        self._has_code = True
        """Whether the code runs. False: no gateway has it."""
        self._result: pipeline_pb2.PipelineResult | None = None
        self._error: status_pb2.Status | None = None
        self._out_of_time = False
        self._ended = False
        self._settling = False
        """Whether a local activity of the close runs."""
        self._deliveries = DeliveryLoops(internal_pb2.DeliveryState())

    @workflow.run
    @one_input
    async def run(self, run: internal_pb2.PipelineRun | None = None) -> pipeline_pb2.PipelineResult:
        """Return the result of a pipeline that succeeded. Otherwise close as the module's docstring says."""
        self._has_code = has_code(self._run, self._cancellation)
        publishing = asyncio.create_task(publish_tree(self._execution.tree, self._status, lambda: self._ended))
        window = asyncio.create_task(self._wait_for_end())
        telling = asyncio.create_task(tell_questions(self._execution, lambda: self._ended))
        final = await self._run_program()
        window.cancel()
        if final != llm_pb2.JOB_STATE_SUCCEEDED:
            await self._compensate()
        self._ended = True
        await self._finish(asyncio.gather(publishing, telling))
        return await self._close(final)

    @workflow.signal(name=names.SIGNAL_CANCEL)
    @one_input
    def cancel(self, request: llm_pb2.CancelRequest | None = None) -> None:
        """Ask the pipeline to stop. This changes nothing once its code has ended."""
        self._cancellation.note(request.reason if request else "")
        self._note_cancel()

    @workflow.signal(name=names.SIGNAL_QUESTIONS)
    @one_input
    def note_questions(self, told: internal_pb2.PipelineQuestions | None = None) -> None:
        """Note how many steps of a pipeline within this one wait for an answer."""
        if told is not None and workflow.patched(names.PATCH_NOTES_QUESTIONS):
            self._execution.tree.questions(told.pipeline_id.removeprefix(f"{self._execution.id}/"), told.needs_answer)

    @workflow.update(name=names.UPDATE_ANSWER_STEP)
    def answer(self, request: pipeline_pb2.AnswerStepRequest) -> pipeline_pb2.StepStatus:
        """Take the answer to a step. Refused with a type of the errors of jobs.names."""
        return self._execution.answer(request)

    @answer.validator
    def check_answer(self, request: pipeline_pb2.AnswerStepRequest) -> None:
        """Refuse an answer that changes nothing before it is in the history."""
        if self._settling:
            # In a replay it may come after the end of the local activity, and after commands that follow from that.
            raise ApplicationError("the pipeline ends")
        self._execution.check_answer(request)

    @workflow.query(name=names.QUERY_GET_RECORD)
    def get_record(self) -> internal_pb2.PipelineRecord:
        """Return the tree and, at the end, the result, if one answer has room for both: it closes with the result."""
        record = self._execution.record()
        record.status.cancel_requested = self._cancellation.error is not None
        if self._result is not None and record.ByteSize() + self._result.ByteSize() <= MAX_RESULT_BYTES:
            record.result.CopyFrom(self._result)
        return record

    @workflow.query(name=names.QUERY_GET_DELIVERIES)
    def get_deliveries(self) -> internal_pb2.DeliveryState:
        """Return the state of the deliveries, as of the pipeline's close if it has closed."""
        return self._deliveries.state

    @workflow.update(name=names.UPDATE_TELL)
    @one_input
    def tell(self, request: internal_pb2.TellRequest | None = None) -> None:
        """Never run: tell_by_refusal() refuses it."""

    @tell.validator
    @one_input
    def tell_by_refusal(self, request: internal_pb2.TellRequest | None = None) -> None:
        """Tell a part of the PipelineRecord, without the result, and with the first part the DeliveryState.

        The history has no event of an update that is refused. Unlike a query, it never brings a cold worker events for
        which no workflow task has started: see docs/architecture.md.
        """
        first = request.first_node if request is not None else 0
        record = self._execution.part(first)
        record.status.cancel_requested = self._cancellation.error is not None
        deliveries = internal_pb2.DeliveryState() if first else self.get_deliveries()
        raise ApplicationError("told", record, deliveries, type=names.TOLD)

    def _note_cancel(self) -> None:
        if self._cancellation.error is not None and not self._status.cancel_requested:
            self._status.cancel_requested = True
            self._execution.tree.touch()

    async def _wait_for_end(self) -> None:
        await workflow.sleep(max(self._run.options.expire_time.ToDatetime(UTC) - workflow.now(), timedelta(0)))
        self._out_of_time = True

    async def _run_program(self) -> "llm_pb2.JobState.ValueType":
        """Run the code to its end, or stop it; return the final state. Result and error are left in their fields."""
        work = run_code(self._execution, self._run) if self._has_code else give_up(self._execution, self._run)
        program = asyncio.create_task(contained(work))
        await self._cancellation.wait(
            lambda: program.done() or self._out_of_time or self._cancellation.error is not None
        )
        stopped, out_of_time = not program.done(), self._cancellation.error is None
        self._execution.closed = True
        if stopped:
            self._note_cancel()
            self._execution.cancels_once = workflow.patched(names.PATCH_CANCELS_ONCE)
            if not out_of_time:
                # Here, where no local activity has just ended.
                self._cancellation.decide()
                reason = str(self._cancellation.error)
                await self._finish(asyncio.create_task(tell_reason(self._execution, reason)))
            program.cancel()
        await self._cancellation.wait(program.done)
        await self._end_open_steps()
        self._take_outcome(program, stopped=stopped)
        late = self._execution.is_over() and self._error is not None and errors.reason_of(self._error) in OUT_OF_TIME
        if not stopped and not late:
            return llm_pb2.JOB_STATE_SUCCEEDED if self._error is None else llm_pb2.JOB_STATE_FAILED
        self._result = self._error = None
        if not out_of_time:
            self._error = failure(CANCELLED, str(self._cancellation.error), code_pb2.CANCELLED)
            return llm_pb2.JOB_STATE_CANCELLED
        self._error = failure(TOTAL_TIMEOUT, "the pipeline's time was over", code_pb2.DEADLINE_EXCEEDED)
        return llm_pb2.JOB_STATE_TIMED_OUT

    async def _end_open_steps(self) -> None:
        """Cancel the steps that run although the code has ended, and wait for them."""
        open_ = self._execution.open
        for task in open_.values():
            if task is not None:
                task.cancel()
        await self._cancellation.wait(lambda: not open_)

    def _take_outcome(self, program: "asyncio.Task[Outcome]", *, stopped: bool) -> None:
        """Keep the result or the error of the code, which has ended. Code that was `stopped` may end as cancelled."""
        if program.cancelled():
            error: BaseException | None = self._execution.refusal or asyncio.CancelledError("raised by the code itself")
        else:
            error = program.exception()
        if error is None:
            self._result, self._error = program.result()
        elif isinstance(error, StepFailed):
            self._error = error.status
        else:
            if not (stopped and isinstance(error, asyncio.CancelledError)):
                # Its message may quote what users write, and is in the status.
                kind = type(error).__name__
                workflow.logger.error("the code of a pipeline has failed: %s at %s", kind, places(error))
            self._error = failure(PROGRAM_ERROR, described(error), code_pb2.INTERNAL)

    async def _compensate(self) -> None:
        """Undo what was done, the last first."""
        self._execution.compensating = True
        for undo in reversed(self._execution.compensations):
            undoing = asyncio.create_task(quietly(undo))
            await self._cancellation.wait(undoing.done)

    async def _close(self, final: "llm_pb2.JobState.ValueType") -> pipeline_pb2.PipelineResult:
        """Publish the outcome, and close with it."""
        options, status = self._run.options, pipeline_pb2.PipelineStatus()
        status.CopyFrom(self._status)
        self._settling = True
        used = status.root.usage.output_tokens - self._execution.recalled_tokens
        forgetting = workflow.execute_local_activity(
            activities.forget_feed,
            args=("", options.ledger, used, workflow.memo_value(names.MEMO_WAITER, ""), self._execution.reservation),
            start_to_close_timeout=_LOCAL,
            retry_policy=_ONCE,
        )
        await self._finish(asyncio.create_task(quietly(lambda: forgetting)))
        self._settling = False
        status.state = final
        status.root.state = STEP_STATES[final]
        status.root.end_time.FromDatetime(workflow.now())
        if self._error is not None:
            status.root.error.CopyFrom(self._error)
        await self._notify(status)
        if final == llm_pb2.JOB_STATE_CANCELLED:
            self._settling = True
            await self._cancellation.request()
        # A cancel that came meanwhile has changed nothing else.
        status.cancel_requested = self._cancellation.error is not None
        # Temporal alone makes the state final: until here the workflow's own is not.
        self._status.CopyFrom(status)
        self._execution.tree.touch()
        workflow.upsert_search_attributes([names.JOB_STATE.value_set(llm_pb2.JobState.Name(final))])
        memo = {names.MEMO_STATUS: to_memo(status), names.MEMO_RECALLED_TOKENS: self._execution.recalled_tokens}
        workflow.upsert_memo(memo)
        record_end(self._run.pipeline, final)
        result = self._result if self._result is not None else pipeline_pb2.PipelineResult()
        result.usage.CopyFrom(status.root.usage)
        if status.root.HasField("counts"):
            result.counts.CopyFrom(status.root.counts)
        if final == llm_pb2.JOB_STATE_SUCCEEDED:
            return result
        error = self._error if self._error is not None else status_of(RuntimeError("no result"))
        # A pipeline of which this one is a step counts what it has used.
        if final == llm_pb2.JOB_STATE_CANCELLED:
            raise CancelledError(error.message, result)
        raise ApplicationError(error.message, result, type=errors.reason_of(error), non_retryable=True)

    async def _notify(self, outcome: pipeline_pb2.PipelineStatus) -> None:
        """Notify the receivers of the outcome, and add how their deliveries stand. A step has no receivers."""
        options, pipeline = self._run.options.delivery, self._run.pipeline
        if not self._run.options.HasField("delivery"):
            return
        event = pipeline_event(pipeline, outcome, workflow.info().run_id)
        await deliver_outcome(event, targets_of(pipeline, options), options, self._cancellation, self._take_deliveries)
        outcome.notifications.extend(map(notification, self._deliveries.state.deliveries))

    def _take_deliveries(self, deliveries: DeliveryLoops) -> None:
        self._deliveries = deliveries

    async def _finish(self, task: "asyncio.Future[Any]") -> None:
        """Wait for a task. A cancel meanwhile is noted, and does not reach it."""
        await self._cancellation.wait(task.done)
        task.result()
