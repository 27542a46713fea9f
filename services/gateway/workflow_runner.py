"""Runs the workflows of a gateway so that no code in them ends it."""

from temporalio.bridge.proto.workflow_activation import WorkflowActivation
from temporalio.bridge.proto.workflow_completion import WorkflowActivationCompletion
from temporalio.worker import UnsandboxedWorkflowRunner, WorkflowInstance, WorkflowInstanceDetails


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
