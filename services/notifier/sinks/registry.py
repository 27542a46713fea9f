"""The sinks that the settings ask for. Those of NATS, Kafka and PostgreSQL are imported only then, because their
packages are extras."""

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from runtime.health import Readiness
from services.notifier.settings import NotifierSettings
from services.notifier.sinks.egress_policy import unrestricted
from services.notifier.sinks.sink import OPERATORS, Sink
from services.notifier.sinks.webhook import WebhookSink

_log = logging.getLogger(__name__)


@asynccontextmanager
async def open_sinks(
    settings: NotifierSettings, readiness: Readiness | None = None
) -> AsyncIterator[Mapping[str, Sink]]:
    """Yield the sinks by the name of their target's field in NotifyTarget, and OPERATORS; close them at the end.

    `readiness` names files of their connections while they cannot be used.
    """
    sinks: dict[str, Sink] = {"webhook": WebhookSink(settings), OPERATORS: WebhookSink(settings, policy=unrestricted())}
    if not settings.webhook_secrets:
        _log.warning(
            "webhooks are not signed, apart from those of users and tenants with secrets: set NOTIFIER_WEBHOOK_SECRETS"
        )
    if settings.nats_url is not None:
        from services.notifier.sinks.nats import NatsSink

        sinks["nats"] = NatsSink(settings, readiness)
    if settings.kafka_servers is not None:
        from services.notifier.sinks.kafka import KafkaSink

        sinks["kafka"] = KafkaSink(settings)
    if settings.postgres_url is not None:
        from services.notifier.sinks.postgres import PostgresSink

        sinks["postgres"] = PostgresSink(settings, readiness)
    async with AsyncExitStack() as stack:
        for sink in sinks.values():
            stack.push_async_callback(sink.close)
        yield sinks
