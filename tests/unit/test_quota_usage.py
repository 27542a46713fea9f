"""The gauge of the quotas in use: see services.gateway.quotas.usage."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from opentelemetry.metrics import NoOpMeterProvider

from encryption import KeysUnavailable
from payload_converter import PayloadError
from services.gateway.quotas.usage import QuotaUsage


class Quotas:
    """Quotas of two tenants, of which the first one's ledger cannot be read."""

    tenants = ("lost", "known")

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.asked: list[str] = []

    async def shares(self, tenant: str) -> dict[str, float]:
        self.asked.append(tenant)
        if tenant == "lost":
            raise self.error
        return {"max_open_jobs": 0.5}


@pytest.mark.parametrize("error", [KeysUnavailable("scripted"), PayloadError("scripted")])
async def test_a_ledger_that_cannot_be_decrypted_does_not_end_the_gateway(error: Exception) -> None:
    """Whatever this task raises ends the whole gateway. The other tenants are measured nevertheless."""
    quotas: Any = Quotas(error)
    usage = QuotaUsage(quotas, NoOpMeterProvider().get_meter("test"))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await usage.keep_counting(timedelta(milliseconds=10))
    assert "known" in quotas.asked
