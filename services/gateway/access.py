"""Whose a workflow is. Its id tells its tenant, so that it is known before Temporal is asked."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from encryption import KeysUnavailable
from jobs.ids import tenant_of
from payload_converter import PayloadError
from runtime.auth import Caller
from services.gateway.errors import ApiError, not_found

T = TypeVar("T")


def require_own(caller: Caller, workflow_id: str) -> None:
    """Raise ApiError NOT_FOUND for the id of another tenant's workflow, whether there is one or not."""
    if tenant_of(workflow_id) != caller.tenant:
        raise not_found(workflow_id)


async def read_own(
    caller: Caller,
    reading: Awaitable[T],
    user_of: Callable[[T], str],
    user_of_unread: Callable[[Exception], Awaitable[str | None]],
    missing: Callable[[], ApiError],
) -> T:
    """Return what is read of the caller's tenant, unless the caller is bound to another user.

    Whose it is decides before anything is said about it: what the caller may not see raises `missing()`, also where it
    cannot be decrypted. `user_of` returns whose it is, and `user_of_unread` whose is what cannot be decrypted, after
    PayloadError or KeysUnavailable: empty if nothing tells any more, None if nothing tells now. Raises like `reading`.
    """
    try:
        found = await reading
    except (PayloadError, KeysUnavailable) as error:
        user_id = await user_of_unread(error) if caller.user_id else None
        if user_id is not None and not caller.may_see(user_id):
            raise missing() from error
        raise
    if not caller.may_see(user_of(found)):
        raise missing()
    return found
