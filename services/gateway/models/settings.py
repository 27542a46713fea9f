"""The models of the gateway's settings, and their canaries."""

from datetime import timedelta
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from jobs import names
from jobs.classes import BACKGROUND_QUEUE_SUFFIX
from jobs.field_rules import MAX_IMAGE_SIDE
from jobs.ids import MAX_TEMPORAL_ID
from llm_pb import llm_pb2
from models import DOCSTRINGS
from runtime.files import ReadableFile
from runtime.tenants import TenantName
from services.gateway.models.prices import Price


class ImageSize(BaseModel):
    """A size of images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int = Field(ge=1, le=MAX_IMAGE_SIDE)
    """In pixels."""
    height: int = Field(ge=1, le=MAX_IMAGE_SIDE)
    """In pixels."""


class Model(BaseModel):
    """A model that jobs may name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    context_tokens: int = Field(gt=0)
    max_output_tokens: int = Field(gt=0)
    default_max_tokens: int = Field(gt=0)
    queue: str = Field(names.GPU_QUEUE, min_length=1, max_length=MAX_TEMPORAL_ID - len(BACKGROUND_QUEUE_SUFFIX))
    """Task queue of the workers of the model. Several models need a queue each. Background jobs wait in the queue of
    this name with `.background`."""
    tokenizer: ReadableFile | None = None
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
    image_sizes: tuple[ImageSize, ...] = ()
    """The sizes in which the model makes images, for a model whose workers have an image engine. An image counts as
    max_output_tokens, which default_max_tokens must equal. Empty: the model generates text."""

    @model_validator(mode="after")
    def _images_count_the_same(self) -> Self:
        if self.image_sizes and self.default_max_tokens != self.max_output_tokens:
            raise ValueError("a model with image_sizes needs a default_max_tokens that is its max_output_tokens")
        return self

    def image_messages(self) -> list[llm_pb2.ImageSize]:
        """Return the sizes of images as clients get them."""
        return [llm_pb2.ImageSize(width=size.width, height=size.height) for size in self.image_sizes]


class Canary(BaseModel):
    """The canary: a job of a few tokens for each model, again and again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    interval: timedelta = Field(timedelta(minutes=1), ge=timedelta(seconds=5), le=timedelta(minutes=5))
    models: tuple[str, ...] | None = None
    """None: all models that generate text. A model that makes images has no canary."""


EMBEDDED_MODEL = Model(
    name="docstrings",
    context_tokens=2048,
    max_output_tokens=2048,
    default_max_tokens=256,
    tokenizer=DOCSTRINGS / "tokenizer.json",
    structured_output=True,
)
