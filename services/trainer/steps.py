"""The steps of a training other than TrainModel: validate, tokenize, evaluate, register, clean up."""

import asyncio
import hashlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

from temporalio import activity
from temporalio.client import Client, WithStartWorkflowOperation, WorkflowUpdateFailedError
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.exceptions import ApplicationError

from jobs import names
from jobs.ids import models_workflow_id, tenant_of
from jobs.options import duration
from jobs.training import LIMIT_EXCEEDED, TRAINING_FAILED
from llm_pb import internal_pb2, llm_pb2, pipeline_pb2
from runtime.temporal import RPC_TIMEOUT
from runtime.work_folders import work_folder
from services.trainer.adapters import adapter_of
from services.trainer.base_models import BaseModels, digest_of
from services.trainer.beats import beat_of_threads
from services.trainer.checkpoints import Checkpoints
from services.trainer.dataset import Document, inspect, read
from services.trainer.dataset_files import fetch_file
from services.trainer.device import Device
from services.trainer.failures import step_errors
from services.trainer.settings import WORK_PREFIX, TrainerSettings
from services.trainer.shards import SHARD_TOKENS, Datasets, read_shards
from services.trainer.tokenizing import Tokenizing
from services.trainer.training import TrainedModel, require_modules
from store.models import get_file, put_model
from store.store import Store

_AT_ONCE: Final = 256
"""Number of documents that are tokenized between two heartbeats."""
_WEIGHTS: Final = "model.safetensors"


class _Files(NamedTuple):
    dataset: Path
    held_out: Path | None
    key: str
    """A hash of their contents."""


class TrainingSteps:
    """The activities, bound to this process's device."""

    def __init__(
        self, client: Client, store: Store, models: BaseModels, device: Device, settings: TrainerSettings
    ) -> None:
        self._client = client
        self._store = store
        self._models = models
        self._device = device
        self._settings = settings

    @activity.defn(name=names.ACTIVITY_VALIDATE_DATASET)
    async def validate(self, task: internal_pb2.TrainingTask) -> internal_pb2.DatasetReport:
        """Check the data set and the operator's bounds, before anything costs much. Raises ApplicationError."""
        spec, settings = task.spec, self._settings
        for field, value, most in (
            ("steps", spec.steps, settings.max_steps),
            ("step_tokens", spec.step_tokens, settings.max_step_tokens),
        ):
            if value > most:
                message = f"{field} is {value}; the operator allows at most {most}"
                raise ApplicationError(message, type=LIMIT_EXCEEDED, non_retryable=True)
        if spec.lora_rank and find_spec("peft") is None:
            message = "an adapter needs the extra lora of durable-llm-suite, which this trainer does not have"
            raise ApplicationError(message, type=TRAINING_FAILED, non_retryable=True)
        with self._working() as folder:
            base = await self._models.resolve(spec.base_model, _tenant())
            where = await self._models.folder(base, _tenant(), folder / "base", activity.heartbeat)
            if (adapter := adapter_of(spec)) is not None and adapter.modules:
                try:
                    await asyncio.to_thread(require_modules, where, adapter)
                except (ValueError, TypeError, KeyError) as error:
                    raise ApplicationError(str(error), type=TRAINING_FAILED, non_retryable=True) from error
            files = await self._fetch(task, folder)
            found = await asyncio.to_thread(
                inspect, files.dataset, files.held_out, settings.max_documents, beat_of_threads()
            )
            return internal_pb2.DatasetReport(
                base_model=base,
                base_sha256=await asyncio.to_thread(digest_of, where),
                documents=found.documents,
                held_out_documents=found.held_out_documents,
                heartbeat_timeout=duration(settings.heartbeat_timeout),
            )

    @activity.defn(name=names.ACTIVITY_TOKENIZE_DATASET)
    async def tokenize(self, task: internal_pb2.TrainingTask) -> internal_pb2.TokenizedDataset:
        """Write the tokens to the store, unless they are there. Raises ApplicationError."""
        with self._working() as folder:
            where = await self._models.folder(task.report.base_model, _tenant(), folder / "base", activity.heartbeat)
            tokenizing = await asyncio.to_thread(Tokenizing, where)
            files = await self._fetch(task, folder)
            key = hashlib.sha256(f"{files.key}/{tokenizing.fingerprint}".encode()).hexdigest()
            datasets = Datasets(self._store, _tenant(), key)
            if (known := await datasets.find(self._settings.keep / 2)) is not None:
                known.summary.reused = True
                return known
            beat, most = beat_of_threads(), self._settings.max_documents
            found = await asyncio.to_thread(inspect, files.dataset, files.held_out, most, beat)
            dataset = internal_pb2.TokenizedDataset()
            counts = _Counts()
            learned = _documents(read(files.dataset, "dataset", most, beat), found.held_out, counts, held=False)
            dataset.shards.extend(await self._write(datasets, tokenizing, learned, counts))
            documents, tokens = counts.documents, counts.tokens
            held_out = read(files.held_out or files.dataset, "held_out", most, beat)
            others = _documents(held_out, found.held_out, counts, held=True)
            dataset.held_out_shards.extend(await self._write(datasets, tokenizing, others, counts))
            dataset.summary.CopyFrom(
                pipeline_pb2.PreprocessResult(
                    documents=documents,
                    held_out_documents=counts.documents - documents,
                    duplicates=found.documents + found.held_out_documents - counts.documents,
                    tokens=tokens,
                    held_out_tokens=counts.tokens - tokens,
                )
            )
            await datasets.write_manifest(dataset)
            return dataset

    async def _write(
        self, datasets: Datasets, tokenizing: Tokenizing, documents: Iterator[Document], counts: "_Counts"
    ) -> list[internal_pb2.StoredFile]:
        """Tokenize documents and write their shards. Raises ApplicationError for more tokens than are allowed."""
        pieces, shards, rest = tokenizing.tokens(documents), list[internal_pb2.StoredFile](), array("i")

        def some() -> bool:
            """Append the tokens of some documents; return whether there may be more."""
            for _ in range(_AT_ONCE):
                if (piece := next(pieces, None)) is None:
                    return False
                rest.extend(piece)
                counts.tokens += len(piece)
                if counts.tokens > self._settings.max_tokens:
                    message = f"the data set has more than {self._settings.max_tokens} tokens"
                    raise ApplicationError(message, type=LIMIT_EXCEEDED, non_retryable=True)
            return True

        more = True
        while more:
            more = await asyncio.to_thread(some)
            activity.heartbeat()
            while len(rest) >= SHARD_TOKENS or (rest and not more):
                shards.append(await datasets.write_shard(rest[:SHARD_TOKENS]))
                del rest[:SHARD_TOKENS]
        return shards

    @activity.defn(name=names.ACTIVITY_EVALUATE_MODEL)
    async def evaluate(self, task: internal_pb2.TrainingTask) -> internal_pb2.ModelEvaluation:
        """Compare the trained model with the base model; write its files to the store if it is to be registered."""
        with self._working() as folder:
            held_out = await read_shards(self._store, task.dataset.held_out_shards, activity.heartbeat)
            where = await self._models.folder(task.report.base_model, _tenant(), folder / "base", activity.heartbeat)
            await get_file(self._store, task.trained.file, folder / "checkpoint", activity.heartbeat)
            model = await self._device.run(TrainedModel, where, self._settings.device)
            activity.heartbeat()
            base_loss = await self._loss(model, held_out)
            await self._device.run(model.take, folder / "checkpoint", adapter_of(task.spec))
            activity.heartbeat()
            loss = await self._loss(model, held_out)
            result = internal_pb2.ModelEvaluation(loss=loss, base_loss=base_loss)
            if loss < base_loss and base_loss - loss >= task.spec.min_improvement:
                await self._device.run(model.export, folder / "model")
                activity.heartbeat()
                id_ = activity.info().workflow_id or ""
                files = await put_model(self._store, id_, folder / "model", activity.heartbeat)
                result.files.extend(files)
                result.sha256 = next(file.sha256 for file in files if file.path == _WEIGHTS)
            return result

    async def _loss(self, model: TrainedModel, content: bytearray) -> float:
        """Return the loss per token, over all rows."""
        losses, total, count = model.losses(content), 0.0, 0
        while (part := await self._device.run(next, losses, None)) is not None:
            loss, rows = part
            total, count = total + loss * rows, count + rows
            activity.heartbeat()
        return total / count

    @activity.defn(name=names.ACTIVITY_REGISTER_MODEL)
    async def register(self, task: internal_pb2.TrainingTask) -> internal_pb2.RegisterModelResponse:
        """Register the trained model. Raises ApplicationError for a model beyond the maximum."""
        evaluation = task.evaluation
        version = llm_pb2.ModelVersion(
            base_model=task.report.base_model,
            pipeline_id=activity.info().workflow_id or "",
            loss=evaluation.loss,
            base_loss=evaluation.base_loss,
            sha256=evaluation.sha256,
            size_bytes=sum(file.size for file in evaluation.files),
        )
        request = internal_pb2.RegisterModelRequest(
            model=task.spec.model,
            alias=task.spec.alias,
            version=internal_pb2.RegisteredVersion(version=version, files=evaluation.files),
        )
        start: WithStartWorkflowOperation[Any, Any] = WithStartWorkflowOperation(
            names.MODELS_WORKFLOW_TYPE,
            internal_pb2.ModelRegistry(),
            id=models_workflow_id(_tenant()),
            task_queue=task.workflow_queue,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        )
        try:
            registered: internal_pb2.RegisterModelResponse = await self._client.execute_update_with_start_workflow(
                names.UPDATE_REGISTER_MODEL,
                request,
                start_workflow_operation=start,
                result_type=internal_pb2.RegisterModelResponse,
                rpc_timeout=RPC_TIMEOUT,
            )
        except WorkflowUpdateFailedError as error:
            cause = error.cause
            if not isinstance(cause, ApplicationError) or cause.type != names.TOO_MANY_MODELS:
                # The registry itself has not refused it: its run has ended meanwhile, say.
                raise
            raise ApplicationError(cause.message, type=cause.type, non_retryable=True) from error
        return registered

    @activity.defn(name=names.ACTIVITY_CLEAN_TRAINING)
    async def clean(self, task: internal_pb2.TrainingTask) -> internal_pb2.CleanedTraining:
        """Remove the checkpoints of the training, with keep_last but for the last one. Raises ApplicationError."""
        with step_errors():
            left = await Checkpoints(self._store, _tenant(), task).remove_all_but(1 if task.keep_last else 0)
        cleaned = internal_pb2.CleanedTraining()
        if left:
            cleaned.kept_step = left[0].step
            cleaned.expire_time.FromDatetime(datetime.now(UTC) + self._settings.keep)
        return cleaned

    async def _fetch(self, task: internal_pb2.TrainingTask, folder: Path) -> _Files:
        spec, most, held_out, key = task.spec, self._settings.max_dataset_bytes, None, ""
        fetch = partial(fetch_file, self._client, self._store, progressed=activity.heartbeat)
        dataset = folder / "dataset"
        digest = await fetch(spec.dataset, _tenant(), most, dataset)
        if spec.HasField("held_out"):
            held_out = folder / "held-out"
            key = (await fetch(spec.held_out, _tenant(), most, held_out)).hex()
        return _Files(dataset, held_out, f"{digest.hex()}/{key}")

    @contextmanager
    def _working(self) -> Iterator[Path]:
        """Provide a folder for a step, which is removed at its end, and name its errors."""
        with step_errors(self._device), work_folder(WORK_PREFIX, self._settings.work_dir) as folder:
            yield folder


class _Counts:
    """What was tokenized until now."""

    def __init__(self) -> None:
        self.documents = 0
        self.tokens = 0


def _documents(
    documents: Iterable[Document], held_out: frozenset[bytes], counts: _Counts, *, held: bool
) -> Iterator[Document]:
    """Yield the documents that are held out, or those that are not, each once."""
    seen = set[bytes]()
    for document in documents:
        digest = document.digest
        if (digest in held_out) == held and digest not in seen:
            seen.add(digest)
            counts.documents += 1
            yield document


def _tenant() -> str:
    return tenant_of(activity.info().workflow_id or "")
