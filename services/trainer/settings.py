"""Settings of the trainer."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Final

from pydantic import AfterValidator, DirectoryPath, Field
from pydantic_settings import SettingsConfigDict

from jobs.training import MAX_STEP_TOKENS, MAX_STEPS
from models import DOCSTRINGS
from runtime.metrics_settings import MetricsSettings


def _folder(path: str) -> str:
    """Return the path of a folder. Raises ValueError for one that there is not."""
    if path and not Path(path).is_dir():
        raise ValueError(f"there is no folder {path!r}")
    return path


class TrainerSettings(MetricsSettings):
    """The trainer: runs the steps of trainings."""

    model_config = SettingsConfigDict(env_prefix="TRAINER_", frozen=True, use_attribute_docstrings=True)

    base_models: dict[str, Annotated[str, AfterValidator(_folder)]] = Field(
        default_factory=lambda: {DOCSTRINGS.name: ""}
    )
    """The models that a training may start from: the folder of each in Hugging Face format, by its name, as JSON. All
    trainers need the same ones. An empty folder is that of the bundled model of the name. Trained models need no
    entry."""
    max_concurrent: int = Field(1, gt=0)
    """Maximum number of concurrent trainings. They take turns on the device, step by step."""
    device: str | None = None
    """A torch device such as "cuda:1" or "cpu". Unset: the GPU if there is one."""
    threads: int | None = Field(None, gt=0)
    """CPU threads of a step. Unset: torch's own default, all cores. The weights of a training that moved to another
    trainer are those of an undisturbed one only if both have the same number."""
    max_steps: int = Field(100_000, gt=0, le=MAX_STEPS)
    """Maximum number of steps of a training."""
    max_step_tokens: int = Field(65_536, gt=1, le=MAX_STEP_TOKENS)
    """Maximum number of tokens of a step. A step reads at least one row, which has up to 512."""
    max_dataset_bytes: int = Field(256 * 1024 * 1024, gt=0)
    """Maximum size of a file of documents, in bytes."""
    max_documents: int = Field(1_000_000, gt=1)
    """Maximum number of documents in a file."""
    max_tokens: int = Field(64 * 1024 * 1024, gt=1)
    """Maximum number of tokens of a data set. They take 4 bytes of memory each."""
    keep: timedelta = Field(timedelta(days=7), ge=timedelta(days=2))
    """Time for which tokenized data sets, and the last checkpoints of trainings that did not succeed, stay in the
    store. Half of that is the maximum age of tokens that another training takes over. Also the age at which files of
    models that no version names are removed."""
    sweep_interval: timedelta = Field(timedelta(hours=1), ge=timedelta(0))
    """Interval at which the store is searched for what may be removed. PT0S: this trainer never searches."""
    heartbeat_timeout: timedelta = Field(timedelta(minutes=5), ge=timedelta(seconds=2))
    """Maximum time without a heartbeat of a training, in which a single step of its optimizer and the load of its model
    must fit. Then another trainer goes on with it."""
    work_dir: DirectoryPath | None = None
    """Folder for what a step needs on disk while it runs: a data set, a model, a checkpoint, which is three times as
    large as the model in 32-bit numbers. Unset: that of the system for temporary files."""
    shutdown_grace: timedelta = Field(timedelta(seconds=60), ge=timedelta(0))
    """Time that running steps have after SIGTERM. A training writes a checkpoint in it, and another trainer goes on.
    PT0S: they are cancelled at once."""
    metrics_port: int = Field(9470, ge=0, le=65535)
    """Port to serve Prometheus metrics on; 0 takes a free one and logs it."""


WORK_PREFIX: Final = "durable-llm-training-"
"""Beginning of the names of folders in the work_dir."""


def folder_of(settings: TrainerSettings, name: str) -> Path | None:
    """Return the folder of a base model; None for one that is not in the settings."""
    path = settings.base_models.get(name)
    if path == "":
        return DOCSTRINGS.parent / name
    return None if path is None else Path(path)
