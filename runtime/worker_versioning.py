"""Worker Versioning: which code runs which workflow, by a Worker Deployment of Temporal.

Workflows move to the current version of the deployment with their next task, which recorded histories make safe. Those
that are declared PINNED stay with the code that started them. Off unless TEMPORAL_DEPLOYMENT_NAME and
TEMPORAL_WORKER_BUILD_ID are set.
"""

import dataclasses
from typing import Any, Final

from temporalio import workflow
from temporalio.client import Interceptor, OutboundInterceptor, StartWorkflowInput, WorkflowHandle
from temporalio.common import VersioningBehavior, WorkerDeploymentVersion
from temporalio.plugin import SimplePlugin
from temporalio.worker import WorkerConfig, WorkerDeploymentConfig

_NAME: Final = "llm.WorkerVersioning"


class WorkerVersioning(SimplePlugin):
    """Makes all workers of a client those of one version, and has the client start no workflow eagerly.

    Without a version it makes their workflows those of workers without one.
    """

    def __init__(self, version: WorkerDeploymentVersion | None) -> None:
        super().__init__(_NAME, interceptors=[_NoEagerStarts()] if version is not None else None)
        self._version = version

    def configure_worker(self, config: WorkerConfig) -> WorkerConfig:
        """Add the version; see Plugin."""
        configured = super().configure_worker(config)
        if self._version is not None:
            configured["deployment_config"] = WorkerDeploymentConfig(
                version=self._version,
                use_worker_versioning=True,
                default_versioning_behavior=VersioningBehavior.AUTO_UPGRADE,
            )
        else:
            for kind in configured.get("workflows", ()):
                _forget_behavior(kind)
        return configured


def _forget_behavior(kind: type) -> None:
    """Remove the versioning behavior that a workflow declares.

    Temporal refuses the tasks of a workflow with one from a worker without a version. The SDK has no way to declare it
    for workers with a version only.
    """
    definition = workflow._Definition.must_from_class(kind)
    setattr(kind, "__temporal_workflow_definition", dataclasses.replace(definition, versioning_behavior=None))


class _NoEagerStarts(Interceptor):
    """Starts workflows by their queue alone.

    An eager start runs the first task here. If this build is not the current one, the next task is replayed by other
    code.
    """

    def intercept_client(self, next: OutboundInterceptor) -> OutboundInterceptor:  # noqa: A002  the SDK's
        return _QueuedStarts(next)


class _QueuedStarts(OutboundInterceptor):
    async def start_workflow(self, input: StartWorkflowInput) -> WorkflowHandle[Any, Any]:  # noqa: A002  the SDK's
        input.request_eager_start = False
        return await super().start_workflow(input)
