"""`python -m services.gateway`: serve the API and run the workflows until told to stop."""

import logging
from contextlib import AsyncExitStack
from typing import Final

from encryption import EncryptionSettings, open_encryption
from feed.encrypted import open_feed
from feed.feed import FeedSettings, want_feed
from jobs import names
from jobs.ids import tenant_of
from runtime import process, temporal
from runtime.health import Readiness
from runtime.metrics import serving_metrics
from runtime.temporal_metrics import temporal_runtime
from services.gateway.metrics import GatewayMetrics
from services.gateway.pipelines.catalogue import load_pipelines
from services.gateway.schedules.canaries import keeping_canaries
from services.gateway.server import serving_api
from services.gateway.settings import GatewaySettings, Role
from services.gateway.workflow_worker import running_workflows
from store.encrypted import open_store
from store.settings import StoreSettings

SERVICE: Final = "gateway"
_SETTINGS: Final = (GatewaySettings, FeedSettings, EncryptionSettings, StoreSettings, temporal.TemporalSettings)


async def main() -> None:
    """Run the halves that the role asks for."""
    settings, feed_settings, readiness = GatewaySettings(), FeedSettings(), Readiness(SERVICE)
    load_pipelines()
    encryption = open_encryption(tenant_of)
    async with AsyncExitStack() as stack:
        metrics = await stack.enter_async_context(serving_metrics(settings, readiness))
        runtime = await stack.enter_async_context(temporal_runtime(metrics))
        client = await temporal.connect(runtime, readiness, encryption)
        known = await temporal.register_search_attributes(client, names.SEARCH_ATTRIBUTES)
        feed, reports, answers = open_feed(feed_settings, SERVICE, encryption, readiness)
        stack.push_async_callback(feed.close)
        want_feed(readiness, feed, "watchers see progress once a second")
        store = open_store(StoreSettings(), encryption)
        meter = metrics.meter(__package__)
        counted = GatewayMetrics(meter, settings.tenants)
        knows_tenants = names.TENANT_ID.name in known
        if settings.role != Role.API:
            workflows = running_workflows(client, feed, answers, settings, counted, encryption, store)
            await stack.enter_async_context(workflows)
            canaries = keeping_canaries(client, settings, encryption, knows_tenants=knows_tenants)
            await stack.enter_async_context(canaries)
        if settings.role != Role.WORKFLOWS:
            serving_calls = serving_api(
                client,
                feed,
                reports,
                settings,
                meter,
                counted,
                readiness,
                encryption,
                store,
                knows_tenants=knows_tenants,
            )
            await stack.enter_async_context(serving_calls)
        logging.getLogger("services.gateway").info("ready")
        with readiness.serving():
            await process.forever()


if __name__ == "__main__":
    process.run(SERVICE, main, _SETTINGS, temporal.new_provider)
