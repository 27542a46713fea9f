"""One run of a pipeline: its tree, what it may still use, and how its steps are carried out."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, timedelta
from typing import Any, Final, TypeVar

from google.protobuf.message import Message
from google.rpc import code_pb2
from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ApplicationError, ChildWorkflowError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from jobs import names
    from jobs.ids import MAX_JOB_ID
    from jobs.pipelines import (
        BUDGET_SPENT,
        MAX_PATH,
        MAX_QUESTION_BYTES,
        TOTAL_TIMEOUT,
        failure,
        is_repeat,
        new_status,
    )
    from jobs.search import Hash
    from jobs.usage import left_of, spent_field
    from llm_pb import batch_pb2, common_pb2, internal_pb2, pipeline_pb2
    from pipelines.compensation import is_undoing
    from pipelines.errors import StepFailed, cancels, failing_as, is_timeout, status_of

from pipelines.admission import Admission
from pipelines.children import start_child
from pipelines.history import HistoryRoom
from pipelines.left import left_by
from pipelines.metrics import record_step
from pipelines.step import Step
from pipelines.token_leases import TokenLeases
from pipelines.tree import Tree

_M = TypeVar("_M", bound=Message)
_SHORTEST: Final = timedelta(milliseconds=1)
_STEP_RETRIES: Final = RetryPolicy(
    initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=60), maximum_attempts=3
)
"""Retries of a step that is no job."""
_STEP_TIMEOUT: Final = timedelta(minutes=10)
"""Maximum time of one try of a step that is no job, unless the code names one or has it beat. Nothing else tells
Temporal that its worker is gone."""
_TIMES_OF_A_TRY: Final = {"start_to_close_timeout", "heartbeat_timeout"}


class Execution:
    """The run of one pipeline."""

    def __init__(self, run: internal_pb2.PipelineRun) -> None:
        info = workflow.info()
        self.id = info.workflow_id
        self.pipeline = run.pipeline
        self.options = run.options
        self.reservation = run.options.create_time.ToNanoseconds()
        """As in ReserveRequest.reservations."""
        hashes = run.options.hashes
        self.hash_: Hash | None = (lambda name, _: hashes.get(name, "")) if hashes else None
        """The hash of search attributes, where they are hashed."""
        self.status = new_status(self.id, run.pipeline, run.options)
        # What has the longest id among the workflows below has this one's and the path.
        self.tree = Tree(self.status.root, min(MAX_PATH, MAX_JOB_ID - len(self.id) - 1))
        self._answers: dict[str, bool] = {}
        self.room = HistoryRoom()
        self.admission = Admission()
        self.recalled_tokens = 0
        """Output tokens that an earlier run has used, and that have counted for quotas when it ended."""
        self.leases = TokenLeases(
            self.id, run.options, lambda: self.status.root.usage.output_tokens - self.recalled_tokens
        )
        self.compensations: list[Callable[[], Awaitable[object]]] = []
        """What is to be done if the pipeline fails, the last one first."""
        self.compensating = False
        """Whether the pipeline has stopped and its compensations run, for which no limit of the pipeline counts."""
        self.cancels_once = False
        """Whether a cancel of the pipeline has reached all steps, and no fan-out cancels its own once more."""
        self.closed = False
        """Whether no step begins any more, except those of compensations."""
        self.refusal: StepFailed | None = None
        """Why none may begin, where it is no cancel and not the end of the code."""
        self.open: dict[str, asyncio.Task[Any] | None] = {}
        """The tasks in which steps run, by path."""

    def is_over(self) -> bool:
        """Return whether the time of the whole is over, or so little of it is left that no step begins."""
        return self.options.expire_time.ToDatetime(UTC) - workflow.now() < _SHORTEST

    def time_left(self) -> timedelta:
        """Return the time that is left of the whole."""
        longest = self.options.max_job_timeout.ToTimedelta()
        if self.compensating:
            return longest
        return min(self.options.expire_time.ToDatetime(UTC) - workflow.now(), longest)

    @asynccontextmanager
    async def step(
        self, path: str, kind: "pipeline_pb2.StepKind.ValueType" = pipeline_pb2.STEP_KIND_ACTIVITY
    ) -> AsyncIterator[Step]:
        """Show a step in the tree while the context is open.

        Raises StepFailed for whatever the body raises, CancelledError if the body was cancelled by the pipeline itself.
        """
        await self.room.turn()
        self._begin(path, kind)
        step = Step(path)
        async with failing_as(path, lambda: step.cancelled):
            before = cancels()
            try:
                yield step
            except (Exception, asyncio.CancelledError) as error:
                # Temporal ends a try by its timeout whose worker has died, also after a cancel.
                late = cancels() > before and is_timeout(error)
                shown = asyncio.CancelledError() if late else error
                cancelled = is_cancelled_exception(shown)
                state = pipeline_pb2.STEP_STATE_CANCELLED if cancelled else pipeline_pb2.STEP_STATE_FAILED
                self._end(step, state, status_of(shown))
                raise
            self._end(step, pipeline_pb2.STEP_STATE_SUCCEEDED)

    def _begin(self, path: str, kind: "pipeline_pb2.StepKind.ValueType") -> None:
        """Add a step. Raises CancelledError when none may begin any more, what Tree.begin() raises."""
        if self.closed and not (self.compensating and is_undoing()):
            raise asyncio.CancelledError
        try:
            if not self.compensating:
                self.room.require(path)
            self.tree.begin(path, workflow.now(), kind, bounded=not self.compensating)
        except StepFailed as error:
            self._refuse(error)
            raise
        self.open[path] = asyncio.current_task()

    def _refuse(self, error: StepFailed) -> None:
        """Begin no step after this one. Code that goes on nevertheless, as in a loop, is stopped by CancelledError."""
        if not self.compensating:
            self.closed, self.refusal = True, error

    def _end(self, step: Step, state: "pipeline_pb2.StepState.ValueType", error: Any = None) -> None:
        del self.open[step.path]
        self.tree.end(step.path, state, workflow.now(), step.usage, error)
        record_step(self.pipeline, state)
        self.leases.release(step.path)
        self.status.left.CopyFrom(left_of(self.pipeline.budget, self.status.root.usage))

    def grant(self, step: Step) -> common_pb2.Budget | None:
        """Return what a step may use: what is left of the budget; None without one. Raises StepFailed for nothing."""
        if self.compensating or not self.pipeline.HasField("budget"):
            return None
        left = left_of(self.pipeline.budget, self.status.root.usage)
        if field := spent_field(left):
            message = f"budget.{field} of the pipeline is spent"
            raise StepFailed(step.path, failure(BUDGET_SPENT, message, code_pb2.RESOURCE_EXHAUSTED))
        return left

    async def run_child(
        self, step: Step, workflow_type: str, argument: Message, result_type: type[_M], **start: Any
    ) -> _M:
        """Run a child workflow as the step, and return its result; count what it has used if it has none.

        Raises what the child raises.
        """
        await self.room.take(argument)
        id_, resumed = f"{self.id}/{step.path}", self.options.resumed
        child = await start_child(step, workflow_type, argument, id_, result_type, resumed=resumed, **start)
        self.tree.change(step.path).workflow_id = child.id
        try:
            result: _M = await child
        except ChildWorkflowError as error:
            self.count(step, await left_by(child.id, error))
            raise
        self.room.add(result)
        return result

    def count(self, step: Step, result: batch_pb2.BatchStatus | pipeline_pb2.PipelineResult) -> None:
        """Count what a step has used, and show the counts of what it has run."""
        step.usage.CopyFrom(result.usage)
        if result.HasField("counts"):
            self.tree.change(step.path).counts.CopyFrom(result.counts)

    async def run_activity(
        self, step: Step, activity: Any, argument: Any, timeout: timedelta | None, settings: Mapping[str, Any]
    ) -> Any:
        """Run an activity as the step. Raises what the activity raises, StepFailed."""
        await self.room.take(argument)
        within = self.within(step.path, timeout)
        arguments = {
            "retry_policy": _STEP_RETRIES,
            # An activity that has ended its work when the cancel comes keeps it.
            "cancellation_type": workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
            **({} if _TIMES_OF_A_TRY & settings.keys() else {"start_to_close_timeout": _STEP_TIMEOUT}),
            **settings,
            "schedule_to_close_timeout": min(settings.get("schedule_to_close_timeout", within), within),
        }
        result = await workflow.execute_activity(activity, argument, **arguments)
        self.room.add(result)
        return result

    async def ask(self, step: Step, question: str, timeout: timedelta | None) -> bool:
        """Wait for an answer to the step. Raises StepFailed when none comes in time."""
        if len(question.encode()) > MAX_QUESTION_BYTES:
            raise ValueError(f"a question has at most {MAX_QUESTION_BYTES} bytes")
        if not question.strip() and workflow.patched(names.PATCH_ASKS_SOMETHING):
            raise ValueError("a question must not be empty")
        self.tree.ask(step.path, question)
        try:
            await workflow.wait_condition(lambda: step.path in self._answers, timeout=self.within(step.path, timeout))
        except TimeoutError:
            error = failure(TOTAL_TIMEOUT, "nobody has answered in time", code_pb2.DEADLINE_EXCEEDED)
            raise StepFailed(step.path, error) from None
        return self._answers[step.path]

    def check_answer(self, request: pipeline_pb2.AnswerStepRequest) -> None:
        """Raise ApplicationError unless the answer can be taken, or was taken before."""
        node = self.tree.node(request.path)
        if node is None:
            raise ApplicationError(f"there is no step {request.path!r}", type=names.STEP_NOT_FOUND)
        if node.answer_id:
            if not is_repeat(node, request):
                raise ApplicationError(f"{request.path} has got another answer", type=names.STEP_ANSWERED)
        elif node.step.state != pipeline_pb2.STEP_STATE_NEEDS_ANSWER:
            raise ApplicationError(f"{request.path} waits for no answer", type=names.STEP_NOT_WAITING)

    def answer(self, request: pipeline_pb2.AnswerStepRequest) -> pipeline_pb2.StepStatus:
        """Take an answer that check_answer() let pass, and return the step. Earlier versions let more answers pass."""
        node = self.tree.node(request.path)
        if node is None:
            raise ApplicationError(f"there is no step {request.path!r}", type=names.STEP_NOT_FOUND)
        if not node.answer_id:
            node.answer_id, node.approved = request.answer_id, request.approved
            self._answers[request.path] = request.approved
            self.tree.answered(request.path)
            step = self.tree.change(request.path)
            step.approved = request.approved
            # Clients of earlier versions find the answer here.
            step.summary_json = f'{{"approved": {str(request.approved).lower()}}}'
        return node.step

    def record(self) -> internal_pb2.PipelineRecord:
        """Return what is known, for a query."""
        return internal_pb2.PipelineRecord(status=self.status, nodes=self.tree.nodes, version=self.tree.version)

    def part(self, first: int) -> internal_pb2.PipelineRecord:
        """Return the record with the nodes from the number `first` on that MAX_TOLD_BYTES have room for."""
        tree = self.tree
        return internal_pb2.PipelineRecord(
            status=self.status, nodes=tree.part(first), version=tree.version, node_count=len(tree.nodes)
        )

    def within(self, path: str, timeout: timedelta | None) -> timedelta:
        """Return the time that a step gets. Raises StepFailed when the pipeline has none left."""
        left = self.time_left()
        if left < _SHORTEST:
            error = failure(TOTAL_TIMEOUT, "the pipeline's time was over", code_pb2.DEADLINE_EXCEEDED)
            self._refuse(refusal := StepFailed(path, error))
            raise refusal
        return left if timeout is None else max(min(timeout, left), _SHORTEST)
