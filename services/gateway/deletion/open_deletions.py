"""How many deletions by DeleteJobs a tenant may have open, at all gateways together, by a ledger like that of jobs.

No deletion tells their ledger of its end. The checks of the ledger find it.
"""

from datetime import timedelta
from typing import Final

from temporalio.client import Client

from jobs.ids import deletions_ledger_workflow_id
from services.gateway.errors import exhausted
from services.gateway.quotas.admission import Reservation, reserve_slot
from services.gateway.quotas.ledgers import Ledger
from services.gateway.settings import GatewaySettings

_WAIT: Final = timedelta(seconds=10)
"""The wait that a DeleteJobs beyond the bound is asked for: the ledger looks for ended deletions as often."""


class OpenDeletions:
    """The bound for each tenant."""

    def __init__(self, client: Client, settings: GatewaySettings) -> None:
        self._client = client
        self._settings = settings
        self._ledgers: dict[str, Ledger] = {}

    async def reserve(self, tenant: str, deletion_id: str) -> Reservation:
        """Reserve a slot for a deletion that is about to be started.

        Raises ApiError RESOURCE_EXHAUSTED when no slot is free, and like OpenJobQuotas.reserve().
        """
        most = self._settings.delete_max_open
        if tenant not in self._ledgers:
            ledger_id = deletions_ledger_workflow_id(tenant)
            self._ledgers[tenant] = Ledger(self._client, self._settings.workflow_queue, ledger_id, most)
        reservation = await reserve_slot(self._ledgers[tenant], deletion_id)
        if isinstance(reservation, str):
            message = f"{most} deletions by DeleteJobs are under way; call again when one has ended"
            raise exhausted(message, _WAIT)
        return reservation
