"""The changes that calls of the API make. Each is recorded in the audit log first."""

from collections.abc import Awaitable, Callable
from typing import Any

from temporalio.client import Client, Schedule, ScheduleHandle, WorkflowHandle

from runtime import audit
from runtime.temporal import RPC_TIMEOUT
from services.gateway.schedule_client import client_for
from services.gateway.updates import execute_update


class Effects:
    """Starts, signals and updates workflows, creates and changes schedules. Nothing else in the services of the API
    does."""

    def __init__(self, client: Client, workflow_queue: str) -> None:
        """`workflow_queue` is the task queue of the workflows that are started."""
        self._client = client
        self._workflow_queue = workflow_queue

    async def start(
        self,
        workflow_type: str,
        *arguments: Any,
        id_: str,
        last_check: Callable[[], None] | None = None,
        **options: Any,
    ) -> WorkflowHandle[Any, Any]:
        """Start a workflow. `options` are further arguments of Client.start_workflow.

        `last_check` is called when the start is recorded, and may raise an error instead of it. Raises
        AuditUnavailable, RPCError and WorkflowAlreadyStartedError.
        """
        await audit.allow()
        if last_check is not None:
            last_check()
        return await self._client.start_workflow(
            workflow_type,
            args=arguments,
            id=id_,
            task_queue=self._workflow_queue,
            rpc_timeout=RPC_TIMEOUT,
            **options,
        )

    async def update(
        self,
        workflow_id: str,
        name: str,
        *arguments: Any,
        first_run_id: str | None = None,
        update_id: str | None = None,
        result_type: type | None = None,
    ) -> Any:
        """Update a workflow and return the update's result.

        `first_run_id` is that of the workflow's first run: one that was started later under the same id is not
        updated. A repeat with the same `update_id` gets the result of the first one, as long as the run is the same.
        Raises AuditUnavailable; RPCError: NOT_FOUND for a workflow that has ended, too, DEADLINE_EXCEEDED for one that
        does not answer in time; WorkflowUpdateFailedError.
        """
        await audit.allow()
        handle = self._client.get_workflow_handle(workflow_id, first_execution_run_id=first_run_id)
        return await execute_update(handle, name, *arguments, update_id=update_id, result_type=result_type)

    async def signal(self, workflow_id: str, name: str, argument: Any) -> None:
        """Signal a workflow. Raises AuditUnavailable and RPCError: NOT_FOUND for a workflow that has ended, too."""
        await audit.allow()
        await self._client.get_workflow_handle(workflow_id).signal(name, argument, rpc_timeout=RPC_TIMEOUT)

    async def cancel(self, workflow_id: str, reason: str) -> None:
        """Ask Temporal to cancel a workflow. Raises AuditUnavailable and RPCError: as signal()."""
        await audit.allow()
        await self._client.get_workflow_handle(workflow_id).cancel(reason=reason, rpc_timeout=RPC_TIMEOUT)

    async def create_schedule(self, id_: str, schedule: Schedule, **options: Any) -> None:
        """Create a schedule. `options` are further arguments of Client.create_schedule.

        Raises AuditUnavailable, KeysUnavailable, RPCError and ScheduleAlreadyRunningError.
        """
        await audit.allow()
        await client_for(self._client, id_).create_schedule(id_, schedule, rpc_timeout=RPC_TIMEOUT, **options)

    async def change_schedule(self, id_: str, change: Callable[[ScheduleHandle], Awaitable[None]]) -> None:
        """Change a schedule by a method of its handle. Raises AuditUnavailable and what the method raises."""
        await audit.allow()
        await change(client_for(self._client, id_).get_schedule_handle(id_))
