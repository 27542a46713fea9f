"""`python -m services.trainer`: run the steps of trainings until asked to stop."""

import logging
from datetime import timedelta
from typing import Final

from temporalio.worker import Worker

from encryption import EncryptionSettings, open_encryption
from encryption.settings import KEY_PATIENCE
from jobs import names
from jobs.ids import tenant_of
from runtime import process, temporal
from runtime.background import beside
from runtime.health import Readiness
from runtime.metrics import serving_metrics
from runtime.temporal_metrics import temporal_runtime
from services.trainer.base_models import BaseModels
from services.trainer.device import Device
from services.trainer.metrics import TrainerMetrics
from services.trainer.settings import TrainerSettings
from services.trainer.steps import TrainingSteps
from services.trainer.sweeping import TrainingSweeper
from services.trainer.train import TrainModel
from services.trainer.training import use_threads
from store.encrypted import open_store
from store.settings import StoreSettings

SERVICE: Final = "trainer"
_SETTINGS: Final = (TrainerSettings, EncryptionSettings, StoreSettings, temporal.TemporalSettings)
_STEPS: Final = 2
"""Maximum number of concurrent steps. Trainings do not count."""


async def main() -> None:
    """Run one worker for trainings and one for their other steps. Raises RuntimeError without a store."""
    settings, readiness = TrainerSettings(), Readiness(SERVICE)
    encryption = open_encryption(tenant_of, patience=KEY_PATIENCE)
    store = open_store(StoreSettings(), encryption)
    if store is None:
        raise RuntimeError("a trainer needs the store of files: set STORE_URL")
    use_threads(settings.threads)
    async with serving_metrics(settings, readiness) as metrics, temporal_runtime(metrics) as runtime:
        client = await temporal.connect(runtime, readiness, encryption)
        models, device = BaseModels(client, store, settings), Device()
        steps = TrainingSteps(client, store, models, device, settings)
        train = TrainModel(store, models, device, settings, TrainerMetrics(metrics.meter(__package__)))
        trainings = Worker(
            client,
            task_queue=names.TRAINING_RUNS_QUEUE,
            activities=[train.__call__],
            max_concurrent_activities=settings.max_concurrent,
            # A cancel reaches a running activity with the answer to a heartbeat.
            max_heartbeat_throttle_interval=timedelta(seconds=1),
            graceful_shutdown_timeout=settings.shutdown_grace,
        )
        others = Worker(
            client,
            task_queue=names.TRAINING_QUEUE,
            activities=[steps.validate, steps.tokenize, steps.evaluate, steps.register, steps.clean],
            max_concurrent_activities=_STEPS,
            graceful_shutdown_timeout=settings.shutdown_grace,
        )
        sweeping = TrainingSweeper(client, store, settings).keep_sweeping()
        async with beside(sweeping, device.require()), trainings, others:
            logging.getLogger("services.trainer").info("ready")
            with readiness.serving():
                await process.forever()


if __name__ == "__main__":
    process.run(SERVICE, main, _SETTINGS, temporal.new_provider)
