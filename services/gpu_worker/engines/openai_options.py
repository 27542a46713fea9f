"""The options of the openai engine."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, HttpUrl


class OpenAIOptions(BaseModel):
    """The openai engine's options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_url: HttpUrl
    """Where the provider's API begins, "/v1" included."""
    context_tokens: int = Field(ge=2)
    """Maximum number of tokens of prompt and output together, which a provider does not tell."""
    api_key_file: Path | None = None
    """A file with the key, which is read for each request. Default: the environment variable OPENAI_API_KEY."""
    dialect: Literal["openai", "vllm"] = "openai"
    """Whether the provider knows vLLM's parameters as well: top_k, min_p, min_tokens, repetition_penalty, regex and
    choice."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The name of the field that bounds the output."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """More members of each request."""
    background: bool = False
    """Whether the provider runs jobs as responses in the background, which go on while a worker is gone. It needs the
    API of responses, with background, stream and starting_after. A provider that knows vLLM's parameters (dialect vllm)
    takes those that this API lacks, seed and stop among them."""
    first_seconds: float = Field(240, gt=0)
    """Maximum time without a message of the provider until its first piece of output. Less than
    GPU_WORKER_PREFILL_TIMEOUT, beyond which the worker counts as hung."""
    silence_seconds: float = Field(50, gt=0)
    """Maximum time without a message of the provider after that. Less than GPU_WORKER_DECODE_TIMEOUT."""
