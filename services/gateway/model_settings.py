"""The models of the gateway's settings, and their canaries."""

from datetime import timedelta

from pydantic import BaseModel, ConfigDict, Field, FilePath

from jobs import limits, names
from jobs.classes import BACKGROUND_QUEUE_SUFFIX
from models import DOCSTRINGS
from runtime.tenants import TenantName
from services.gateway.prices import Price


class Model(BaseModel):
    """A model that jobs may name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    context_tokens: int = Field(gt=0)
    max_output_tokens: int = Field(gt=0)
    default_max_tokens: int = Field(gt=0)
    queue: str = Field(names.GPU_QUEUE, min_length=1, max_length=limits.MAX_TEMPORAL_ID - len(BACKGROUND_QUEUE_SUFFIX))
    """Task queue of the workers of the model. Several models need a queue each. Background jobs wait in the queue of
    this name with `.background`."""
    tokenizer: FilePath | None = None
    """Path of the model's tokenizer.json. With it the gateway refuses a prompt that cannot fit and a message that holds
    a special token. Without it the worker refuses them."""
    structured_output: bool = False
    tenant: TenantName | None = None
    """The only tenant whose jobs may name the model, and to which ListModels shows it. None: all may."""
    special_tokens_in_messages: bool = False
    """Whether a chat message may hold special tokens of the tokenizer. The worker decides by its own setting,
    GPU_WORKER_SPECIAL_TOKENS_IN_MESSAGES."""
    price: Price | None = None
    """What the model costs: see Price. None: its jobs have no cost, and no budget of costs."""


class Canary(BaseModel):
    """The canary: a job of a few tokens for each model, again and again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    interval: timedelta = Field(timedelta(minutes=1), ge=timedelta(seconds=5), le=timedelta(minutes=5))
    models: tuple[str, ...] | None = None
    """None: all models."""


EMBEDDED_MODEL = Model(
    name="docstrings",
    context_tokens=2048,
    max_output_tokens=2048,
    default_max_tokens=256,
    tokenizer=DOCSTRINGS / "tokenizer.json",
    structured_output=True,
)
