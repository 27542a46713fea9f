"""`python -m services.gateway`: serve the API and run the workflows until told to stop."""

import logging
from contextlib import AsyncExitStack

from feed.feed import FeedSettings
from feed.nats import NatsFeed
from jobs import names
from runtime import process, temporal
from runtime.metrics import serving_metrics
from services.gateway.server import serving_api
from services.gateway.settings import GatewaySettings, Role
from services.gateway.workflow_worker import workflow_worker


async def main() -> None:
    """Run the halves that the role asks for."""
    settings = GatewaySettings()
    async with AsyncExitStack() as stack:
        serving = serving_metrics(settings.metrics_host, settings.metrics_port, "GATEWAY_")
        metrics = await stack.enter_async_context(serving)
        client = await temporal.connect(metrics.temporal)
        await temporal.register_search_attributes(client, names.SEARCH_ATTRIBUTES)
        feed = NatsFeed(FeedSettings())
        feed.start()
        stack.push_async_callback(feed.close)
        if settings.role != Role.API:
            await stack.enter_async_context(workflow_worker(client, feed, settings))
        if settings.role != Role.WORKFLOWS:
            await stack.enter_async_context(serving_api(client, feed, settings, metrics.meter(__package__)))
        logging.getLogger("services.gateway").info("ready")
        await process.forever()


if __name__ == "__main__":
    process.run("gateway", main, (GatewaySettings, FeedSettings, temporal.TemporalSettings))
