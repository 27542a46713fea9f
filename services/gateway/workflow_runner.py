"""Runs the workflows of a gateway so that no code ends it, no busy machine ends them and no query moves them."""

from collections.abc import Callable

from temporalio.bridge.proto.workflow_activation import WorkflowActivation
from temporalio.bridge.proto.workflow_completion import WorkflowActivationCompletion
from temporalio.worker import UnsandboxedWorkflowRunner, Worker, WorkflowInstance, WorkflowInstanceDetails

from jobs.pipelines import TASK_TIMEOUT

Activate = Callable[[WorkflowActivation], WorkflowActivationCompletion]


class ContainedRunner(UnsandboxedWorkflowRunner):
    """Fails the task of a workflow that calls sys.exit() in a task of its own, and not the process.

    What the code of a pipeline raises itself ends the pipeline: see pipelines.errors.contained().
    """

    def __init__(self) -> None:
        super().__init__()
        self.evict: Callable[[str], None] = lambda run_id: None
        """Removes the workflow of a run id from the worker's cache."""

    def create_instance(self, det: WorkflowInstanceDetails) -> WorkflowInstance:
        """Create the instance of a workflow."""
        instance = super().create_instance(det)
        activate = _InTurn(instance.activate, lambda: self.evict(det.info.run_id)).activate

        def contained(act: WorkflowActivation) -> WorkflowActivationCompletion:
            try:
                return activate(act)
            except (SystemExit, KeyboardInterrupt) as error:
                raise RuntimeError(f"a workflow has raised {type(error).__name__}") from error

        instance.activate = contained  # type: ignore[method-assign]
        return instance


class _InTurn:
    """Keeps events from a workflow for which no workflow task has started.

    Temporal sends a query to a worker without the workflow with all events until then. The SDK runs the workflow with
    them, and later, in their workflow task, with the others alone. A replay has the events of a workflow task at once,
    so it may make the same commands in another order, or find a patch elsewhere: it fails for good (TMPRL1100).
    """

    def __init__(self, activate: Activate, evict: Callable[[], None]) -> None:
        self._activate, self._evict = activate, evict
        self._last: tuple[int, int, int] | None = None
        """Length and size of the history and the time, as of the last activation."""
        self._is_behind = False
        """Whether events were kept from the workflow. It answers queries, and is then evicted."""

    def activate(self, act: WorkflowActivation) -> WorkflowActivationCompletion:
        """Run the workflow with the activation, unless it is out of turn."""
        kinds = {job.WhichOneof("variant") for job in act.jobs}
        if kinds == {"query_workflow"}:
            if self._is_behind:
                self._evict()
        elif kinds != {"remove_from_cache"}:
            if self._is_behind:
                raise RuntimeError("a workflow without some of its events is run again from its start")
            if self._is_out_of_turn(act):
                self._is_behind = True
                completion = WorkflowActivationCompletion()
                completion.successful.SetInParent()
                return completion
            self._last = _place(act)
        return self._activate(act)

    def _is_out_of_turn(self, act: WorkflowActivation) -> bool:
        """Tell whether there are new events, but not that of a started task: it would bring a size and a time."""
        if self._last is None:
            return False
        (length, *last), (new_length, *new) = self._last, _place(act)
        return new_length > length and new == last


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
