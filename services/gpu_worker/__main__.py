"""`python -m services.gpu_worker`: load the model and run jobs until asked to stop or the engine dies."""

import asyncio
import os
import socket
from typing import Final

from opentelemetry import trace
from temporalio.client import Client

from encryption import EncryptionSettings, open_encryption
from encryption.settings import KEY_PATIENCE
from feed.encrypted import open_feed
from feed.feed import FeedSettings, want_feed
from jobs.ids import tenant_of
from runtime import process, temporal
from runtime.health import Readiness
from runtime.metrics import serving_metrics
from runtime.temporal_metrics import temporal_runtime
from services.gpu_worker.activity import RunLLMOnGPU
from services.gpu_worker.answer_cache import AnswerCache
from services.gpu_worker.batch.activity import RunBatchChunk
from services.gpu_worker.chosen_engine import chosen_engine
from services.gpu_worker.polling import polling
from services.gpu_worker.recipe import Recipe
from services.gpu_worker.reporting import reporting
from services.gpu_worker.settings import GpuWorkerSettings
from services.gpu_worker.trained_model import load, model_folder
from store.encrypted import open_store
from store.settings import StoreSettings

SERVICE: Final = "gpu-worker"
_SETTINGS: Final = (GpuWorkerSettings, FeedSettings, EncryptionSettings, StoreSettings, temporal.TemporalSettings)


async def main() -> None:
    """Run the worker, which polls while the model loads. Raises EngineDead: the process then ends with status 1."""
    settings, readiness = GpuWorkerSettings(), Readiness(SERVICE)
    encryption = open_encryption(tenant_of, patience=KEY_PATIENCE)
    readiness.describe(engine=settings.engine, model=settings.model, task_queue=settings.task_queue)
    async with (
        serving_metrics(settings, readiness) as metrics,
        temporal_runtime(metrics) as runtime,
        model_folder(settings) as path,
    ):
        engine = chosen_engine(settings, path)
        feed, reports, answers = open_feed(FeedSettings(), SERVICE, encryption, readiness)
        store = open_store(StoreSettings(), encryption)
        name = f"{socket.gethostname()}-{os.getpid()}"
        connected: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        loading = asyncio.create_task(load(engine, path, settings, store, readiness, connected))
        readiness.need("engine", "has not loaded the model", lambda: loading.done() and not engine.dead.is_set())
        want_feed(readiness, feed, "watchers see no tokens")
        try:
            client = await temporal.connect(runtime, readiness, encryption)
            connected.set_result(client)
            telemetry = (metrics.meter(__package__), trace.get_tracer(__package__))
            cache = AnswerCache(answers, Recipe(settings, path), telemetry[0])
            activity = RunLLMOnGPU(engine, loading, feed, settings, name, *telemetry, store, cache)
            chunks = RunBatchChunk(activity, engine, feed, store, settings, name, telemetry[0])
            polls = polling(client, activity, chunks, settings, name)
            async with reporting(reports, activity, engine, loading, settings, name) as reporter, polls:
                with readiness.serving(), reporter.serving():
                    await activity.wait_until_engine_fails()
        finally:
            loading.cancel()
            await engine.close()
            await feed.close()


if __name__ == "__main__":
    process.run(SERVICE, main, _SETTINGS, temporal.new_provider)
