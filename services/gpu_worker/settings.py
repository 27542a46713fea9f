"""Settings of the GPU worker."""

from datetime import timedelta
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import SettingsConfigDict

from jobs import names
from jobs.limits import MAX_TEMPORAL_ID
from models import DOCSTRINGS
from runtime.tls import MetricsTlsSettings


class GpuWorkerSettings(MetricsTlsSettings):
    """The GPU worker: takes jobs of one model from its queue and runs them."""

    model_config = SettingsConfigDict(env_prefix="GPU_WORKER_", frozen=True, use_attribute_docstrings=True)

    engine: Literal["torch", "vllm", "simulated"] = "torch"
    """What runs the model."""
    model: str = "docstrings"
    """The name that jobs ask for."""
    model_path: str = ""
    """A folder in Hugging Face format, or a hub name. Unset: the model docstrings, which comes along; of another name
    only with the engine simulated."""
    engine_options: dict[str, Any] = Field(default_factory=dict)
    """The engine's own options, as JSON; for vllm those of its AsyncEngineArgs, and structured_floor and
    structured_slowdown."""
    task_queue: str = Field(names.GPU_QUEUE, min_length=1, max_length=MAX_TEMPORAL_ID)
    """The queue to take jobs from."""
    max_concurrent: int = Field(16, gt=0)
    """Jobs run at once: the size of the engine's batch."""
    default_max_tokens: int = Field(256, gt=0)
    """max_tokens of a job that came past the gateway without."""
    special_tokens_in_messages: bool = False
    """Whether a chat message may hold special tokens of the model, with which it can pass for other turns."""
    capture_content: bool = False
    """Write prompts and outputs into the spans of generations. They go wherever spans go."""
    heartbeat_interval: timedelta = timedelta(seconds=1)
    """How often progress goes to Temporal, and how soon a cancel is seen at latest. Of more than 16 jobs at once each
    reports less often, here and to watchers: of 64 every 4 s."""
    progress_interval: timedelta = timedelta(milliseconds=250)
    """How often watchers see progress."""
    load_timeout: timedelta = timedelta(minutes=30)
    """An engine that loads for longer hangs: its worker ends."""
    prefill_timeout: timedelta = timedelta(minutes=5)
    """A job without a first token for longer is lost and tried again; if none has moved meanwhile, the worker ends."""
    decode_timeout: timedelta = timedelta(minutes=1)
    """A job without a next token for longer is lost and tried again; if none has moved meanwhile, the worker ends."""
    shutdown_grace: timedelta = timedelta(seconds=10)
    """What running jobs get to finish on SIGTERM."""
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
