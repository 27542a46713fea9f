"""TrainModel: one attempt at a training, from its last checkpoint on."""

import asyncio
import logging
import time
from datetime import timedelta
from pathlib import Path
from typing import Final

from temporalio import activity
from temporalio.exceptions import ApplicationError

from jobs import names
from jobs.ids import tenant_of
from jobs.training import (
    DEFAULT_CHECKPOINT_STEPS,
    DEFAULT_LEARNING_RATE,
    DEFAULT_STEP_TOKENS,
    HANDED_OVER,
    TRAINING_FAILED,
)
from llm_pb import internal_pb2
from runtime.work_folders import work_folder
from services.trainer.adapters import adapter_of
from services.trainer.base_models import BaseModels
from services.trainer.checkpoints import Checkpoint, Checkpoints
from services.trainer.device import Device
from services.trainer.failures import step_errors
from services.trainer.metrics import TrainerMetrics
from services.trainer.settings import WORK_PREFIX, TrainerSettings
from services.trainer.shards import read_shards
from services.trainer.training import Recipe, TrainingRun
from store.store import Store

_log = logging.getLogger(__name__)
_BEAT_SECONDS: Final = 0.5
"""Time of training between two heartbeats, unless a step takes longer."""
_LAST_WORDS: Final = timedelta(seconds=60)
"""Maximum time to write the checkpoint of a training that was cancelled."""
_RETRY_DELAY: Final = timedelta(milliseconds=100)


class TrainModel:
    """The activity, bound to this process's device."""

    def __init__(
        self, store: Store, models: BaseModels, device: Device, settings: TrainerSettings, metrics: TrainerMetrics
    ) -> None:
        self._store = store
        self._models = models
        self._device = device
        self._settings = settings
        self._metrics = metrics

    @activity.defn(name=names.ACTIVITY_TRAIN_MODEL)
    async def __call__(self, task: internal_pb2.TrainingTask) -> internal_pb2.TrainingCheckpoint:
        """Train to the last step, and return the checkpoint there.

        A cancel, and a trainer that stops, end the attempt with a checkpoint. Raises ApplicationError.
        """
        with step_errors(self._device), work_folder(WORK_PREFIX, self._settings.work_dir) as folder:
            attempt = _Attempt(self._store, self._device, self._metrics, task, folder)
            try:
                await attempt.load(self._models, self._settings)
                return await attempt.run()
            except (ValueError, TypeError, KeyError) as error:
                # No attempt mends the code, or a model that it does not know.
                message = f"{type(error).__name__}: {error}"
                raise ApplicationError(message, type=TRAINING_FAILED, non_retryable=True) from error


class _Attempt:
    def __init__(
        self, store: Store, device: Device, metrics: TrainerMetrics, task: internal_pb2.TrainingTask, folder: Path
    ) -> None:
        self._store = store
        self._device = device
        self._metrics = metrics
        self._task = task
        self._folder = folder
        self._tenant = tenant_of(activity.info().workflow_id or "")
        self._checkpoints = Checkpoints(store, self._tenant, task)
        self._saved: Checkpoint | None = None
        self._run: TrainingRun

    async def load(self, models: BaseModels, settings: TrainerSettings) -> None:
        """Load the model and the tokens, and go on at the last checkpoint."""
        spec = self._task.spec
        self._beat()
        tokens = await read_shards(self._store, self._task.dataset.shards, self._beat)
        base = self._task.report.base_model
        folder = await models.folder(base, self._tenant, self._folder / "base", self._beat)
        self._beat()
        recipe = Recipe(
            spec.steps,
            spec.seed,
            spec.learning_rate or DEFAULT_LEARNING_RATE,
            spec.step_tokens or DEFAULT_STEP_TOKENS,
            adapter_of(spec),
        )
        self._run = await self._device.run(TrainingRun, folder, recipe, tokens, settings.device)
        self._beat()
        path = self._folder / "checkpoint"
        restored = await self._checkpoints.restore(path, self._beat)
        if restored is not None:
            await self._device.run(self._run.restore, path)
            # Another run may remove its own at any time.
            self._saved = restored if self._checkpoints.is_own(restored) else None
        _log.info("training begins at step %d of %d", self._run.step, spec.steps)

    async def run(self) -> internal_pb2.TrainingCheckpoint:
        """See TrainModel."""
        spec, run = self._task.spec, self._run
        every = spec.checkpoint_every or DEFAULT_CHECKPOINT_STEPS
        try:
            while run.step < spec.steps:
                stop = min((run.step // every + 1) * every, spec.steps)
                steps, tokens = run.step, run.tokens
                await self._device.run(run.advance, stop, _BEAT_SECONDS)
                self._metrics.advanced(run.step - steps, run.tokens - tokens, run.loss)
                self._beat()
                if run.step == stop:
                    await self._save()
                elif activity.is_worker_shutdown():
                    await self._save()
                    message = f"the trainer stops; another one goes on at step {run.step}"
                    raise ApplicationError(message, type=HANDED_OVER, next_retry_delay=_RETRY_DELAY)
            saved = await self._save()
        except asyncio.CancelledError:
            async with asyncio.timeout(_LAST_WORDS.total_seconds()):
                await self._save()
            raise
        return internal_pb2.TrainingCheckpoint(step=run.step, file=saved.file, loss=run.loss, tokens=run.tokens)

    async def _save(self) -> Checkpoint:
        """Write a checkpoint, unless the last one is of the same step, and return it."""
        run, path = self._run, self._folder / "checkpoint"
        if self._saved is not None and self._saved.step == run.step:
            return self._saved
        began = time.monotonic()
        sha256 = await self._device.run(run.save, path)
        self._saved = await self._checkpoints.save(run.step, sha256, path, self._beat)
        self._metrics.saved(time.monotonic() - began)
        self._beat()
        return self._saved

    def _beat(self) -> None:
        beat = internal_pb2.TrainingHeartbeat(steps=self._task.spec.steps)
        if self._saved is not None:
            beat.checkpoint_step = self._saved.step
        if (run := getattr(self, "_run", None)) is not None:
            beat.step, beat.loss, beat.tokens_per_second = run.step, run.loss, run.tokens_per_second
        activity.heartbeat(beat)
