"""`python -m services.notifier`: deliver events until asked to stop."""

import logging
from datetime import timedelta
from typing import Final

from temporalio.worker import Worker

from encryption import EncryptionSettings, open_encryption
from encryption.settings import KEY_PATIENCE
from jobs import names
from jobs.ids import tenant_of
from runtime import process, temporal
from runtime.health import Readiness
from runtime.metrics import serving_metrics
from runtime.temporal_metrics import temporal_runtime
from services.notifier.activity import NotifyUI
from services.notifier.dispatcher import Dispatcher
from services.notifier.metrics import NotifierMetrics
from services.notifier.progress import NotifyProgress
from services.notifier.settings import NotifierSettings
from services.notifier.sinks.registry import open_sinks

SERVICE: Final = "notifier"


async def main() -> None:
    """Run one worker for outcomes and one for progress."""
    settings, readiness = NotifierSettings(), Readiness(SERVICE)
    log = logging.getLogger("services.notifier")
    if settings.has_endpoints:
        log.info("notifies endpoints of its settings of the jobs whose gateway has GATEWAY_NOTIFY_OPERATOR=true")
    encryption = open_encryption(tenant_of, patience=KEY_PATIENCE)
    async with (
        serving_metrics(settings, readiness) as metrics,
        temporal_runtime(metrics) as runtime,
        open_sinks(settings, readiness) as sinks,
    ):
        client = await temporal.connect(runtime, readiness, encryption)
        dispatcher = Dispatcher(sinks, settings, NotifierMetrics(metrics.meter(__package__)))
        outcomes = Worker(
            client,
            task_queue=settings.task_queue,
            activities=[NotifyUI(dispatcher).__call__],
            max_concurrent_activities=settings.max_concurrent,
            graceful_shutdown_timeout=settings.shutdown_grace,
        )
        progress = Worker(
            client,
            task_queue=settings.task_queue + names.PROGRESS_QUEUE_SUFFIX,
            activities=[NotifyProgress(client, dispatcher, settings).__call__],
            max_concurrent_activities=settings.max_progress,
            # Heartbeats carry the log, and their answers report a job's end, so none may be delayed for long.
            max_heartbeat_throttle_interval=timedelta(seconds=1),
        )
        async with outcomes, progress:
            log.info("ready")
            with readiness.serving():
                await process.forever()


if __name__ == "__main__":
    process.run(SERVICE, main, (NotifierSettings, EncryptionSettings, temporal.TemporalSettings), temporal.new_provider)
