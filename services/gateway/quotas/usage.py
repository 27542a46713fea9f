"""Measures how much of their quotas the tenants use, by asking their ledgers in turn. No call waits for it.

A ledger is asked by a query, which is a workflow task and no event of its history. Quotas of files are left out: what a
tenant has of them is a list of visibility.
"""

import asyncio
import logging
from collections.abc import Iterable
from datetime import timedelta
from typing import Final

from opentelemetry.metrics import CallbackOptions, Meter, Observation
from temporalio.service import RPCError

from encryption import KeysUnavailable
from payload_converter import PayloadError
from services.gateway.errors import ApiError
from services.gateway.quotas.admission import OpenJobQuotas

_log = logging.getLogger(__name__)
_MIN_PAUSE: Final = timedelta(seconds=0.1)


class QuotaUsage:
    """A gauge of the used share of each quota, by tenant. A tenant whose ledger did not answer last is absent."""

    def __init__(self, quotas: OpenJobQuotas, meter: Meter) -> None:
        self._quotas = quotas
        self._shares: dict[str, dict[str, float]] = {}
        """By tenant and quota."""
        meter.create_observable_gauge(
            "llm.quota.usage.ratio",
            [self._observe],
            "1",
            "Share of a quota that its tenant uses. Every gateway measures that of all of them together.",
        )

    async def keep_counting(self, interval: timedelta) -> None:
        """Ask each ledger once per interval, until cancelled. An interval of zero asks none."""
        tenants = self._quotas.tenants if interval else []
        pause = max(interval / max(len(tenants), 1), _MIN_PAUSE)
        while tenants:
            for tenant in tenants:
                await self._ask(tenant)
                await asyncio.sleep(pause.total_seconds())

    async def _ask(self, tenant: str) -> None:
        try:
            shares = await self._quotas.shares(tenant)
        except (RPCError, ApiError, PayloadError, KeysUnavailable) as error:
            if self._shares.pop(tenant, None):
                _log.warning("the quotas in use of %s cannot be read: %s", tenant, error)
        else:
            self._shares[tenant] = shares

    def _observe(self, _: CallbackOptions) -> Iterable[Observation]:
        for tenant, shares in [*self._shares.items()]:
            for quota, share in shares.items():
                yield Observation(share, {"llm.tenant": tenant, "llm.quota": quota})
