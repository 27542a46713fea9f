"""Runs the workflows of a gateway so that no code ends it, no busy machine ends them and no query moves them."""

from collections.abc import Callable

from temporalio.bridge.proto.workflow_activation import WorkflowActivation, WorkflowActivationJob
from temporalio.bridge.proto.workflow_completion import WorkflowActivationCompletion
from temporalio.worker import UnsandboxedWorkflowRunner, Worker, WorkflowInstance, WorkflowInstanceDetails

from jobs.pipelines import TASK_TIMEOUT


class ContainedRunner(UnsandboxedWorkflowRunner):
    """Fails the task of a workflow that calls sys.exit() in a task of its own, and not the process.

    What the code of a pipeline raises itself ends the pipeline: see pipelines.errors.contained().
    """

    def create_instance(self, det: WorkflowInstanceDetails) -> WorkflowInstance:
        """Create the instance of a workflow."""
        instance = super().create_instance(det)
        activate = _InTurn(instance.activate).activate

        def contained(act: WorkflowActivation) -> WorkflowActivationCompletion:
            try:
                return activate(act)
            except (SystemExit, KeyboardInterrupt) as error:
                raise RuntimeError(f"a workflow has raised {type(error).__name__}") from error

        instance.activate = contained  # type: ignore[method-assign]
        return instance


class _InTurn:
    """Keeps events from a workflow until their workflow task has started.

    Temporal sends a query to a worker that does not hold the workflow with all events until then. The SDK (1.35) hands
    these to the workflow, and later, with their workflow task, the others alone. A replay hands out the events of a
    workflow task at once, so the code may make the same commands in another order there, or look for a patch in another
    task: the workflow fails for good (TMPRL1100).
    """

    def __init__(self, activate: Callable[[WorkflowActivation], WorkflowActivationCompletion]) -> None:
        self._activate = activate
        self._last: tuple[int, int, int] | None = None
        """Length, size and time of the history that the workflow has had."""
        self._early: list[WorkflowActivationJob] = []

    def activate(self, act: WorkflowActivation) -> WorkflowActivationCompletion:
        """Run the workflow with the activation and what was kept for it, unless it is to be kept itself."""
        kinds = {job.WhichOneof("variant") for job in act.jobs}
        if kinds in ({"query_workflow"}, {"remove_from_cache"}):
            return self._activate(act)
        if self._is_early(act):
            self._early += act.jobs
            completion = WorkflowActivationCompletion()
            completion.successful.SetInParent()
            return completion
        self._last = _place(act)
        if self._early:
            jobs = sorted([*self._early, *act.jobs], key=_is_local_activity)
            self._early = []
            del act.jobs[:]
            act.jobs.extend(jobs)
        return self._activate(act)

    def _is_early(self, act: WorkflowActivation) -> bool:
        """Tell whether there are new events, but not that of a started task: it would bring a size and a time."""
        if self._last is None:
            return False
        (length, *last), (new_length, *new) = self._last, _place(act)
        return new_length > length and new == last


def _place(act: WorkflowActivation) -> tuple[int, int, int]:
    return act.history_length, act.history_size_bytes, act.timestamp.ToNanoseconds()


def _is_local_activity(job: WorkflowActivationJob) -> bool:
    """Tell whether a job belongs behind the others, where the SDK puts it."""
    return job.WhichOneof("variant") == "resolve_activity" and job.resolve_activity.is_local


def patient(worker: Worker) -> Worker:
    """Let each workflow task have the time that Temporal gives one of a pipeline, and return the worker.

    The SDK takes one that needs 2 s for a deadlock, as any may on a busy machine, and interrupts it in the middle of
    asyncio's code. Then tasks of the workflow may never end, so that it cannot be evicted, and it is stuck until the
    gateway starts again. The SDK has no argument for the time.
    """
    workflows = worker._workflow_worker
    if workflows is not None and workflows._deadlock_timeout_seconds is not None:
        workflows._deadlock_timeout_seconds = TASK_TIMEOUT.seconds
    return worker
