"""`python -m services.gateway`: serve the API and run the workflows until told to stop."""

import logging
from contextlib import AsyncExitStack
from typing import Final

from feed.feed import FeedSettings
from feed.nats import NatsFeed
from jobs import names
from runtime import process, temporal
from runtime.health import Readiness
from runtime.metrics import serving_metrics
from services.gateway.server import serving_api
from services.gateway.settings import GatewaySettings, Role
from services.gateway.workflow_worker import workflow_worker

SERVICE: Final = "gateway"


async def main() -> None:
    """Run the halves that the role asks for."""
    settings, readiness = GatewaySettings(), Readiness(SERVICE)
    async with AsyncExitStack() as stack:
        serving = serving_metrics(settings.metrics_host, settings.metrics_port, "GATEWAY_", readiness)
        metrics = await stack.enter_async_context(serving)
        client = await temporal.connect(metrics.temporal, readiness)
        known = await temporal.register_search_attributes(client, names.SEARCH_ATTRIBUTES)
        feed = NatsFeed(FeedSettings())
        feed.start()
        stack.push_async_callback(feed.close)
        readiness.want("feed", "is not connected: watchers see progress once a second", lambda: feed.available)
        if settings.role != Role.API:
            await stack.enter_async_context(workflow_worker(client, feed, settings))
        if settings.role != Role.WORKFLOWS:
            meter = metrics.meter(__package__)
            knows_tenants = names.TENANT_ID.name in known
            serving_calls = serving_api(client, feed, settings, meter, readiness, knows_tenants=knows_tenants)
            await stack.enter_async_context(serving_calls)
        logging.getLogger("services.gateway").info("ready")
        with readiness.serving():
            await process.forever()


if __name__ == "__main__":
    process.run(SERVICE, main, (GatewaySettings, FeedSettings, temporal.TemporalSettings))
