"""How many streams of one kind a gateway serves: all together, and of each tenant."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext

from runtime.auth import Caller
from runtime.keyed_limiter import KeyedLimiter
from services.gateway.errors import exhausted
from services.gateway.settings import GatewaySettings


class Watchers:
    """The limits of max_watchers and max_watchers_per_tenant."""

    def __init__(self, settings: GatewaySettings, what: str) -> None:
        """`what` names what is watched: jobs."""
        most, most_of_tenant = settings.max_watchers, settings.max_watchers_per_tenant
        self._all = KeyedLimiter(
            most, lambda: exhausted(f"this gateway serves {most} streams, its limit; call again or call another")
        )
        self._of_tenant = KeyedLimiter(
            most_of_tenant,
            lambda: exhausted(f"{most_of_tenant} streams watch this tenant's {what}, the limit; end one first"),
        )

    @asynccontextmanager
    async def acquired(self, caller: Caller) -> AsyncIterator[None]:
        """Count a stream of the caller while the context is open. Raises ApiError RESOURCE_EXHAUSTED at a limit."""
        of_tenant = self._of_tenant.acquired(caller.tenant) if caller.tenant else nullcontext()
        async with self._all.acquired(), of_tenant:
            yield
