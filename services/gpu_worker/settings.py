"""Settings of the GPU worker."""

from datetime import timedelta
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from jobs import names
from jobs.limits import MAX_TEMPORAL_ID
from models import DOCSTRINGS


class GpuWorkerSettings(BaseSettings):
    """The GPU worker: takes jobs of one model from its queue and runs them."""

    model_config = SettingsConfigDict(env_prefix="GPU_WORKER_", frozen=True, use_attribute_docstrings=True)

    engine: Literal["torch", "vllm", "simulated"] = "torch"
    """The engine that runs the model."""
    model: str = "docstrings"
    """The name by which jobs ask for the model."""
    model_path: str = ""
    """The model: a folder in Hugging Face format, or its name at the hub. Unset: the model docstrings of the
    distribution. Only the engine simulated needs no path for a model of another name."""
    engine_options: dict[str, Any] = Field(default_factory=dict)
    """The engine's own options, as JSON. Those of vllm are its AsyncEngineArgs, structured_floor and
    structured_slowdown."""
    task_queue: str = Field(names.GPU_QUEUE, min_length=1, max_length=MAX_TEMPORAL_ID)
    """The task queue from which the worker takes jobs."""
    max_concurrent: int = Field(16, gt=0)
    """Maximum number of concurrent jobs: the size of the engine's batch."""
    default_max_tokens: int = Field(256, gt=0)
    """max_tokens of a job that was started past the gateway and sets none."""
    special_tokens_in_messages: bool = False
    """Whether a chat message may hold special tokens of the model. Such tokens can forge other turns of a
    conversation."""
    capture_content: bool = False
    """Whether spans of generations hold prompts and outputs, which then go wherever spans go."""
    heartbeat_interval: timedelta = timedelta(seconds=1)
    """Interval of heartbeats to Temporal. A cancel is noticed within it. With more than 16 concurrent jobs each job
    reports less often, to watchers as well: with 64 every 4 s."""
    progress_interval: timedelta = timedelta(milliseconds=250)
    """Interval at which watchers get progress."""
    load_timeout: timedelta = timedelta(minutes=30)
    """Maximum time for which the engine loads its model. The worker ends when the engine exceeds it."""
    prefill_timeout: timedelta = timedelta(minutes=5)
    """Maximum wait for the first token of a job. A job that exceeds it is lost and attempted again. The worker ends if
    no other job has made progress meanwhile."""
    decode_timeout: timedelta = timedelta(minutes=1)
    """Maximum wait for the next token of a job. A job that exceeds it is lost and attempted again. The worker ends if
    no other job has made progress meanwhile."""
    shutdown_grace: timedelta = timedelta(seconds=10)
    """Maximum time for running jobs to finish after SIGTERM. Other workers continue those that need longer."""
    metrics_host: str = "127.0.0.1"
    """Address to serve Prometheus metrics on; loopback unless set."""
    metrics_port: int = Field(9465, ge=0, le=65535)
    """Port to serve Prometheus metrics on; 0 takes a free one and logs it."""

    @field_validator("model_path")
    @classmethod
    def _found(cls, path: str, info: ValidationInfo) -> str:
        """Return where the model is. Raises ValueError for one that does not come along."""
        if path or info.data.get("engine") == "simulated":
            return path
        if (model := info.data.get("model")) == DOCSTRINGS.name:
            return str(DOCSTRINGS)
        raise ValueError(f"the model {model!r} does not come along: name its folder or its name at the hub")
