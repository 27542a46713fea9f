"""Whose a workflow is. Its id tells its tenant, so that it is known before Temporal is asked."""

from jobs.ids import tenant_of
from runtime.auth import Caller
from services.gateway.errors import not_found


def require_own(caller: Caller, workflow_id: str) -> None:
    """Raise ApiError NOT_FOUND for the id of another tenant's workflow, whether there is one or not."""
    if tenant_of(workflow_id) != caller.tenant:
        raise not_found(workflow_id)
