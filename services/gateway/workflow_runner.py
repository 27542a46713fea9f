"""Runs the workflows of a gateway so that no code in them ends it, and no busy machine ends them."""

from temporalio.bridge.proto.workflow_activation import WorkflowActivation
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
        activate = instance.activate

        def contained(act: WorkflowActivation) -> WorkflowActivationCompletion:
            try:
                return activate(act)
            except (SystemExit, KeyboardInterrupt) as error:
                raise RuntimeError(f"a workflow has raised {type(error).__name__}") from error

        instance.activate = contained  # type: ignore[method-assign]
        return instance


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
