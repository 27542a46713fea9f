"""Runs the workflows of a gateway so that no code ends it, no busy machine ends them and no query moves them."""

from collections import Counter
from collections.abc import Callable
from typing import Final

from temporalio.bridge.proto.workflow_activation import WorkflowActivation
from temporalio.bridge.proto.workflow_completion import WorkflowActivationCompletion
from temporalio.worker import UnsandboxedWorkflowRunner, Worker, WorkflowInstance, WorkflowInstanceDetails

from jobs import names
from jobs.pipelines import TASK_TIMEOUT
from runtime.queries import EARLY

_MAX_REFUSALS: Final = 3
"""Number of queries that are refused for the same early events. An open workflow has had them by then."""
_MAX_REFUSED: Final = 1000
"""Number of workflows whose refusals are counted."""


class ContainedRunner(UnsandboxedWorkflowRunner):
    """Fails the task of a workflow that calls sys.exit() in a task of its own, and not the process.

    What the code of a pipeline raises itself ends the pipeline: see pipelines.errors.contained(). Its queries that come
    with early events are refused: see _InTurn. The code of other workflows makes its commands one after the other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.evict: Callable[[str], None] = lambda run_id: None
        """Removes the workflow of a run id from the worker's cache."""
        self._refusals: Counter[tuple[str, int]] = Counter()

    def create_instance(self, det: WorkflowInstanceDetails) -> WorkflowInstance:
        """Create the instance of a workflow."""
        instance = super().create_instance(det)
        activate = instance.activate
        if det.info.workflow_type == names.PIPELINE_WORKFLOW_TYPE:
            activate = _InTurn(activate, self._refuses, self.evict).activate

        def contained(act: WorkflowActivation) -> WorkflowActivationCompletion:
            try:
                return activate(act)
            except (SystemExit, KeyboardInterrupt) as error:
                raise RuntimeError(f"a workflow has raised {type(error).__name__}") from error

        instance.activate = contained  # type: ignore[method-assign]
        return instance

    def _refuses(self, act: WorkflowActivation) -> bool:
        """Tell whether the query is to be refused that came with an activation, and count it."""
        if len(self._refusals) >= _MAX_REFUSED:
            self._refusals.clear()
        self._refusals[act.run_id, act.history_length] += 1
        return self._refusals[act.run_id, act.history_length] <= _MAX_REFUSALS


class _InTurn:
    """Keeps events from a workflow for which no workflow task has started.

    Temporal sends a query to a worker that does not hold the workflow with all events until then. The SDK (1.35) hands
    these to the workflow, and later, with their workflow task, the others alone. A replay hands out the events of a
    workflow task at once, so the code may make the same commands in another order there, or look for a patch in another
    task: the workflow fails for good (TMPRL1100).

    So such a query is refused, after which the SDK evicts the workflow. The client asks again: see runtime.queries.
    Only a closed workflow never has a task for them. It answers without these events, and is evicted then.
    """

    def __init__(
        self,
        activate: Callable[[WorkflowActivation], WorkflowActivationCompletion],
        refuses: Callable[[WorkflowActivation], bool],
        evict: Callable[[str], None],
    ) -> None:
        self._activate, self._refuses, self._evict = activate, refuses, evict
        self._last: tuple[int, int, int] | None = None
        """Length, size and time of the history that the workflow has had."""
        self._is_behind = False
        """Whether the workflow lacks early events."""

    def activate(self, act: WorkflowActivation) -> WorkflowActivationCompletion:
        """Run the workflow with the activation, unless it has early events."""
        kinds = {job.WhichOneof("variant") for job in act.jobs}
        if kinds == {"query_workflow"}:
            if self._is_behind:
                self._evict(act.run_id)
        elif kinds != {"remove_from_cache"}:
            if self._is_behind:
                raise RuntimeError("a workflow that lacks events is run again from its start")
            if self._is_early(act):
                return self._kept(act)
            self._last = _place(act)
        return self._activate(act)

    def _is_early(self, act: WorkflowActivation) -> bool:
        """Tell whether there are new events, but not that of a started task: it would bring a size and a time."""
        if self._last is None:
            return False
        (length, *last), (new_length, *new) = self._last, _place(act)
        return new_length > length and new == last

    def _kept(self, act: WorkflowActivation) -> WorkflowActivationCompletion:
        completion = WorkflowActivationCompletion()
        if self._refuses(act):
            completion.failed.failure.message = EARLY
        else:
            self._is_behind = True
            completion.successful.SetInParent()
        return completion


def _place(act: WorkflowActivation) -> tuple[int, int, int]:
    return act.history_length, act.history_size_bytes, act.timestamp.ToNanoseconds()


def prepared(worker: Worker, runner: ContainedRunner) -> Worker:
    """Let the runner evict workflows of the worker, and each workflow task have the time of one of a pipeline.

    The SDK takes a task that needs 2 s for a deadlock, as any may on a busy machine, and interrupts it in the middle of
    asyncio's code. Then tasks of the workflow may never end, so that it cannot be evicted, and it is stuck until the
    gateway starts again. The SDK has no argument for the time, and no public way to evict.
    """
    workflows = worker._workflow_worker
    if workflows is not None:
        runner.evict = lambda run_id: workflows._bridge_worker().request_workflow_eviction(run_id)
        if workflows._deadlock_timeout_seconds is not None:
            workflows._deadlock_timeout_seconds = TASK_TIMEOUT.seconds
    return worker
