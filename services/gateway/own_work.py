"""The workflows of batches and pipelines that a caller may see."""

from temporalio.client import WorkflowExecutionDescription

from jobs.ids import tenant_of
from runtime.auth import Caller
from services.gateway.job_record import user_of
from services.gateway.runs import Runs


async def describe_own(runs: Runs, caller: Caller, id_: str, workflow_type: str) -> WorkflowExecutionDescription | None:
    """Return Temporal's description of a workflow of the type that the caller may see; None without one.

    Raises RPCError, KeysUnavailable.
    """
    # Temporal is not asked about an id of another tenant.
    found = await runs.describe(id_) if tenant_of(id_) == caller.tenant else None
    if found is None or found.workflow_type != workflow_type:
        return None
    if caller.user_id and not caller.may_see(await user_of(found)):
        return None
    return found
