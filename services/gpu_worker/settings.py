"""Settings of the GPU worker."""

from datetime import timedelta
from typing import Any, Final, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_settings import SettingsConfigDict

from jobs import names
from jobs.classes import BACKGROUND_QUEUE_SUFFIX, queue_of
from jobs.ids import MAX_TEMPORAL_ID
from jobs.training import trained_model
from llm_pb import common_pb2
from models import DOCSTRINGS
from runtime.metrics_settings import MetricsSettings
from runtime.tenants import TenantOrNone


def wrong_engine_options(error: ValueError) -> ValidationError:
    """Return what an engine says of its options as an error of the setting."""
    problems: list[tuple[tuple[int | str, ...], str]] = [((), str(error))]
    if isinstance(error, ValidationError):
        problems = [(problem["loc"], problem["msg"]) for problem in error.errors(include_url=False)]
    return ValidationError.from_exception_data(
        GpuWorkerSettings.__name__,
        [
            InitErrorDetails(
                type=PydanticCustomError("engine_options", "{problem}", {"problem": problem}),
                loc=("engine_options", *place),
                input=None,
            )
            for place, problem in problems
        ],
    )


_WITHOUT_PATH: Final = ("simulated", "simulated-images")
"""Engines whose models have no path."""


class GpuWorkerSettings(MetricsSettings):
    """The GPU worker: runs the jobs of one model from its queue."""

    model_config = SettingsConfigDict(env_prefix="GPU_WORKER_", frozen=True, use_attribute_docstrings=True)

    engine: Literal["torch", "vllm", "openai", "simulated", "simulated-images", "openai-images", "diffusers"] = "torch"
    """The engine that runs the model. The last three make images."""
    model: str = "docstrings"
    """Name of the model, as jobs ask for it."""
    model_path: str = ""
    """A folder in Hugging Face format, or a hub name; with the engines openai and openai-images the model's name at the
    provider. If unset, the worker uses the bundled model docstrings. A model of another name needs a path, except with
    the engines simulated and simulated-images. A trained model has none: it comes from the store."""
    model_revision: str = ""
    """What tells the weights from others of the same name, for the cache of answers: an answer is found by workers of
    the same revision alone. Unset: the worker reads the files of the model's folder once a job asks for the cache. Set
    it for a model from the hub or of a provider, whose files it does not see."""
    model_tenant: TenantOrNone = ""
    """The tenant that has trained the model, where GPU_WORKER_MODEL is a trained one, as <model>@<version> or
    <model>@<alias>. The worker loads the version that the alias names then, and refuses the jobs of other tenants.
    Unset: it was trained without a tenant."""
    engine_options: dict[str, Any] = Field(default_factory=dict)
    """The engine's own options, as JSON. For vllm they are the fields of its AsyncEngineArgs, structured_floor and
    structured_slowdown."""
    task_queue: str = Field(names.GPU_QUEUE, min_length=1, max_length=MAX_TEMPORAL_ID - len(BACKGROUND_QUEUE_SUFFIX))
    """The task queue from which the worker takes jobs. Background jobs come from a queue of this name and
    ".background"."""
    max_concurrent: int = Field(16, gt=0)
    """Maximum number of concurrent jobs, which is the size of the engine's batch."""
    background_seats: int = Field(1, ge=0)
    """Number of the concurrent jobs that are never stopped for more urgent ones: background jobs keep so many places in
    the batch, as long as there are any. One place is left for the others, so a worker with a single one keeps none."""
    pause_wait: timedelta = Field(timedelta(seconds=10), gt=timedelta(0))
    """Maximum wait of a paused job for a place at this worker. Then it goes back to the queue, for any worker. A job
    that went back before waits longer, by as much each time, up to 5 min."""
    default_max_tokens: int = Field(256, gt=0)
    """max_tokens of a job that was started without the gateway and sets none."""
    special_tokens_in_messages: bool = False
    """Whether a chat message may hold special tokens of the model, with which it can imitate other turns."""
    capture_content: bool = False
    """Whether to write prompts and outputs into the spans of generations, with which they are exported."""
    heartbeat_interval: timedelta = Field(timedelta(seconds=1), gt=timedelta(0))
    """Interval of progress reports to Temporal, and maximum delay of a cancel. With more than 16 concurrent jobs each
    reports less often, here and to watchers: with 64 every 4 s."""
    progress_interval: timedelta = Field(timedelta(milliseconds=250), gt=timedelta(0))
    """Interval of progress reports to watchers."""
    output_records_per_second: int = Field(4000, gt=0)
    """Maximum number of records of output that more than 16 concurrent jobs publish a second, all together. Where the
    engine is faster a record holds several tokens: with 256 jobs each publishes at least every 64 ms. A job's first
    token is published immediately."""
    report_interval: timedelta = Field(timedelta(seconds=5), gt=timedelta(0), le=timedelta(minutes=1))
    """Interval at which the worker reports itself to the gateways, for ListWorkers. A worker that is silent for three
    of them is no longer listed."""
    load_timeout: timedelta = Field(timedelta(minutes=30), gt=timedelta(0))
    """Maximum time to load the model. After that the engine counts as hung and the worker ends."""
    prefill_timeout: timedelta = Field(timedelta(minutes=5), gt=timedelta(0))
    """Maximum time to a job's first token. After that the job is retried; if no job has progressed meanwhile, the
    worker ends."""
    decode_timeout: timedelta = Field(timedelta(minutes=1), gt=timedelta(0))
    """Maximum time to a job's next token. After that the job is retried; if no job has progressed meanwhile, the worker
    ends."""
    shutdown_grace: timedelta = Field(timedelta(seconds=10), ge=timedelta(0))
    """Time that running jobs have to finish after SIGTERM. PT0S: they are handed over at once."""
    metrics_port: int = Field(9465, ge=0, le=65535)
    """Port to serve Prometheus metrics on; 0 takes a free one and logs it."""

    @field_validator("model_path")
    @classmethod
    def _found(cls, path: str, info: ValidationInfo) -> str:
        """Return the path of the model. Raises ValueError for a model that is not bundled and has no path."""
        if path or info.data.get("engine") in _WITHOUT_PATH or trained_model(info.data.get("model", "")):
            return path
        if (model := info.data.get("model")) == DOCSTRINGS.name:
            return str(DOCSTRINGS)
        raise ValueError(f"the model {model!r} is not bundled: set the path to its folder or its name at the hub")

    @property
    def is_trained(self) -> bool:
        """Whether the model is one of a training, which comes from the store."""
        return not self.model_path and self.engine not in _WITHOUT_PATH and trained_model(self.model) is not None


def queues_of(settings: GpuWorkerSettings) -> tuple[str, str]:
    """Return the task queues of the worker: its model's, and that of the model's background jobs."""
    return settings.task_queue, queue_of(settings.task_queue, common_pb2.JOB_CLASS_BACKGROUND)
