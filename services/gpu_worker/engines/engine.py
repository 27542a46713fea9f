"""The interface between the worker and the engine that runs the model: one Protocol, one contract suite, all engines.

An engine is chosen by name and only its module is imported, so that a worker without a GPU never loads vllm.
"""

import asyncio
import importlib
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

from jobs.costs import output_allowance
from jobs.ids import owner
from llm_pb import internal_pb2, llm_pb2

ENGINES: Final = {
    "torch": "services.gpu_worker.engines.torch",
    "vllm": "services.gpu_worker.engines.vllm",
    "openai": "services.gpu_worker.engines.openai",
    "simulated": "services.gpu_worker.engines.simulated",
}
"""The module of each engine by its name. `create(config: EngineConfig) -> Engine` in it returns the engine."""
IMAGE_ENGINES: Final = {
    "simulated-images": "services.gpu_worker.engines.simulated_images",
    "openai-images": "services.gpu_worker.engines.openai_images",
    "diffusers": "services.gpu_worker.engines.diffusers",
}
"""Those that make images instead of text, by services.gpu_worker.engines.images, which has their contract."""


@dataclass(frozen=True)
class EngineConfig:
    """The configuration of every engine."""

    model_path: str
    """A folder in Hugging Face format, or a hub name."""
    max_concurrent: int
    """Maximum number of concurrent generations, which is the size of the batch."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The engine's own options, passed through. An unknown one raises ValueError."""
    special_tokens_in_messages: bool = False
    """Whether a chat message may hold special tokens of the model's tokenizer."""


class CannotContinue(Exception):
    """The engine cannot continue these tokens as one uninterrupted run would. Raised before any output.

    The caller starts over, without resume_token_ids.
    """


@dataclass(frozen=True)
class Generation:
    """The request for one generation."""

    request_id: str
    """Chosen by the worker, unique among all attempts, and never the client's."""
    job: llm_pb2.JobRequest
    """Model input and sampling parameters, already valid by llm.proto. params.max_tokens is always set."""
    resume_token_ids: tuple[int, ...] = ()
    """Output tokens that an earlier attempt generated. Generation continues after them. They count as output
    (max_tokens, min_tokens, stop texts) but are not yielded again."""
    resume_text: str = ""
    """The output text of resume_token_ids that was already published. It is not yielded again."""
    trace_headers: Mapping[str, str] = field(default_factory=dict)
    """The W3C context that an engine's own spans belong to."""
    tenant: str = ""
    """The job's tenant. Empty for a job without one."""
    price: llm_pb2.ModelPrice | None = None
    """The model's price. Set for a job with a budget of costs."""
    stream_interval: int = 1
    """Number of tokens that an engine may join to one Output. The first token comes by itself."""
    provider_response: internal_pb2.ProviderResponse = field(default_factory=internal_pb2.ProviderResponse)
    """The response of a provider that goes on without the worker, as an earlier attempt has left it. The engine keeps
    it up to date: after each output with what has been yielded. Empty for engines without one."""

    def room(self, prompt_tokens: int, context_tokens: int) -> int:
        """Return the maximum number of tokens of prompt and output together: the context's, or fewer by the budget.

        Raises BudgetSpent if the prompt leaves room for no output token, InvalidJob for a budget that needs a price.
        """
        allowed = output_allowance(self.job.budget, self.price, prompt_tokens)
        return context_tokens if allowed is None else min(context_tokens, prompt_tokens + allowed)

    @property
    def owner(self) -> str:
        """The owner of what an engine caches of the prompt, for the owner's jobs alone. See jobs.ids.owner."""
        return owner(self.job.user_id, self.tenant)


@dataclass(frozen=True)
class Image:
    """An image."""

    data: bytes
    """The file."""
    media_type: str
    """image/png, image/jpeg or image/webp."""


@dataclass(frozen=True)
class Output:
    """One step's output. The texts of all outputs, joined, are the job's output.

    The first Output comes before the model has read the prompt. It has neither text nor tokens, only the prompt's
    length.
    """

    text: str
    """New text: whole characters; may be empty while a character or a stop text is undecided."""
    token_ids: tuple[int, ...]
    """The step's new tokens."""
    prompt_tokens: int
    """Number of tokens of the prompt, including the chat template's. The same in every output, or 0 in all but the last
    where only the end tells it."""
    finish_reason: "llm_pb2.FinishReason.ValueType | None" = None
    """FINISH_REASON_STOP or _LENGTH in the last output, None before."""
    logprobs: tuple[llm_pb2.TokenLogprobs, ...] = ()
    """One for each of token_ids when params.logprobs is set, with its offset."""
    cached_prompt_tokens: int = 0
    """Of the prompt's tokens, in the last output: those that came from a cache of the engine."""
    cost_micros: int | None = None
    """What a provider charges for the whole output, in millionths of the currency, in the last output. None: the
    model's price decides."""
    image: Image | None = None
    """The image, in the last output of an engine of IMAGE_ENGINES."""


class Load(NamedTuple):
    """How full an engine is."""

    running: int
    """Generations in the batch."""
    waiting: int
    """Generations that wait for a slot in the batch."""
    kv_cache_usage: float
    """Share of the engine's room for keys and values that is in use, 0 to 1."""


IDLE: Final = Load(0, 0, 0.0)


@runtime_checkable
class Abandons(Protocol):
    """An engine whose generations go on without the worker."""

    async def abandon(self, response: internal_pb2.ProviderResponse) -> None:
        """Cancel a response that no attempt will continue. Raises nothing."""
        ...


class Engine(Protocol):
    """What runs a model. All methods but load() are called on one event loop, which they must never block."""

    name: str
    """Its key in ENGINES."""
    context_tokens: int
    """Maximum number of tokens of prompt and output together. Valid after start()."""
    gpu: llm_pb2.GpuInfo
    """The device that the model runs on. Valid after start()."""
    dead: asyncio.Event
    """Set once the engine can never generate a token again. Running generations then raise EngineDead."""

    async def start(self) -> None:
        """Load the model. Raises EngineDead with the reason if that fails."""
        ...

    def generate(self, generation: Generation) -> AsyncGenerator[Output, None]:
        """Yield an Output without text, then the output as it is generated. The last Output has a finish_reason.

        Closing the generator, or cancelling the task that iterates it, frees the generation's slot in the batch within
        one step, in prefill too.

        The output ends with FINISH_REASON_LENGTH where the job's budget bounds its tokens: see Generation.room.

        Raises CannotContinue if resume_token_ids cannot be continued, PromptTooLong or BudgetSpent if the prompt leaves
        no room for a token, UnsupportedParams for parameters that the engine cannot honour, OutOfMemory, EngineFailed,
        EngineDead.
        """
        ...

    def load(self) -> Load:
        """Return the recent load of the engine. May be called at any time, from any thread, and returns immediately."""
        ...

    async def close(self) -> None:
        """End running generations with EngineDead and free the device. Idempotent."""
        ...


def create_engine(name: str, config: EngineConfig) -> Engine:
    """Import the engine's module and return its engine, not yet started. Raises KeyError for an unknown name."""
    engine: Engine = importlib.import_module({**ENGINES, **IMAGE_ENGINES}[name]).create(config)
    return engine
