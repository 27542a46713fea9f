"""Any OpenAI-compatible provider as an engine: the job runs there, and its text goes the way of every other job's.

A provider has neither tokens nor state to give. So a token is what a piece of its stream holds, until its own count at
the end says how many there were, and an attempt cannot continue another's output: it starts over, unless the provider
has responses in the background.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionChunk
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs

from jobs.errors import EngineDead, EngineFailed, InvalidJob, UnsupportedParams
from llm_pb import internal_pb2, llm_pb2
from services.gpu_worker.engines.chat import ROLE_NAMES
from services.gpu_worker.engines.engine import IDLE, CannotContinue, EngineConfig, Generation, Load, Output
from services.gpu_worker.engines.openai_background import Background
from services.gpu_worker.engines.openai_errors import as_job_errors, charged, name_in
from services.gpu_worker.engines.openai_options import OpenAIOptions
from services.gpu_worker.engines.openai_silence import answer_of, until_silent
from services.gpu_worker.engines.openai_transport import PIECES_OF_A_TOKEN, ask_for_models, provider_client

_SILENCE_SECONDS: Final = 600
"""Maximum wait for bytes of a provider. The worker's own limits (prefill_timeout, decode_timeout) are shorter."""
_REASONS: Final = {"stop": llm_pb2.FINISH_REASON_STOP, "length": llm_pb2.FINISH_REASON_LENGTH}
_OF_OPENAI: Final = ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty")
_OF_VLLM: Final = ("top_k", "min_p", "min_tokens", "repetition_penalty")


class OpenAIEngine:
    """See Engine. It starts every generation over."""

    name = "openai"

    def __init__(self, config: EngineConfig, options: OpenAIOptions) -> None:
        self._model = config.model_path
        self._options = options
        self.context_tokens = options.context_tokens
        self.gpu = llm_pb2.GpuInfo(name=urlsplit(str(options.base_url)).netloc)
        self.dead = asyncio.Event()
        self._running: set[asyncio.Task[Any]] = set()
        self._client = provider_client(options.base_url, options.api_key_file, _SILENCE_SECONDS)
        self._background = Background(self._client, self._model, options, self.dead)

    async def start(self) -> None:
        """See ask_for_models."""
        await ask_for_models(self._client)

    async def generate(self, generation: Generation) -> AsyncGenerator[Output, None]:
        """Yield a generation's output; see Engine.generate."""
        if generation.resume_token_ids and not self._options.background:
            raise CannotContinue("a provider starts every output over")
        room = generation.room(0, self.context_tokens)
        if self.dead.is_set():
            raise EngineDead("the engine was closed")
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  a generator runs in a task
        self._running.add(task)
        try:
            outputs = self._background.generate(generation, room) if self._options.background else None
            async with contextlib.aclosing(outputs or self._completion(generation, room)) as made:
                async for output in made:
                    yield output
        finally:
            self._running.discard(task)

    async def abandon(self, response: internal_pb2.ProviderResponse) -> None:
        """See Abandons."""
        await self._background.abandon(response)

    async def _completion(self, generation: Generation, room: int) -> AsyncGenerator[Output, None]:
        request, options = chat_request(generation.job, room, self._options), self._options
        pieces = _Pieces(request[self._options.max_tokens_field], self.context_tokens, logprobs="logprobs" in request)
        patience = lambda: options.silence_seconds if pieces.has_begun else options.first_seconds  # noqa: E731
        yield Output("", (), 0)
        async with as_job_errors():
            asking = self._client.chat.completions.create(model=self._model, **request)
            stream = await answer_of(asking, options.first_seconds)
            async with stream, contextlib.aclosing(until_silent(stream, self.dead, patience)) as chunks:
                async for chunk in chunks:
                    if (output := pieces.add(chunk)) is not None:
                        yield output
                    if pieces.is_over:
                        break
        yield pieces.last(stream.response.headers)

    def load(self) -> Load:
        """Count the generations at the provider."""
        return IDLE._replace(running=len(self._running))

    async def close(self) -> None:
        """End running generations and close the connections."""
        self.dead.set()
        await self._client.close()


class _Pieces:
    """Turns the chunks of one stream into outputs."""

    def __init__(self, max_tokens: int, context_tokens: int, *, logprobs: bool) -> None:
        self._max_pieces = max_tokens * PIECES_OF_A_TOKEN
        self._context_tokens = context_tokens
        self._logprobs = logprobs
        self._refused = False
        self._tokens = 0
        self._bytes = 0
        self._reason: str | None = None
        self._usage: CompletionUsage | None = None

    def add(self, chunk: ChatCompletionChunk) -> Output | None:
        """Return the output of a chunk, if it holds any."""
        self._usage = chunk.usage or self._usage
        if not chunk.choices:
            return None
        choice = next((choice for choice in chunk.choices if not choice.index), None)
        if choice is None:
            return None
        self._reason = choice.finish_reason or self._reason
        self._refused = self._refused or bool(choice.delta.refusal)
        # Half of a surrogate pair is no text.
        text = (choice.delta.content or "").encode(errors="replace").decode()
        end = self._bytes + len(text.encode())
        logprobs = tuple(_logprobs(choice.logprobs, self._bytes, end)) if self._logprobs else ()
        if not (text or logprobs):
            return None
        if self._logprobs and not logprobs:
            raise UnsupportedParams("params.logprobs: the provider returns none")
        self._bytes = end
        count = len(logprobs) if self._logprobs else 1
        self._tokens += count
        return Output(text, (0,) * count, 0, logprobs=logprobs)

    @property
    def has_begun(self) -> bool:
        """Whether output has come."""
        return self._tokens > 0

    @property
    def is_over(self) -> bool:
        """Whether the output is longer than max_tokens allow, however short the pieces are."""
        return self._tokens >= self._max_pieces

    def last(self, headers: Mapping[str, str]) -> Output:
        """Return the last output, with what the provider counted. Raises JobError if the provider has not finished."""
        if self._reason == "content_filter":
            raise InvalidJob("the provider's content filter ended the output")
        if self._refused:
            raise InvalidJob("the provider's model refuses to answer")
        if self.is_over and self._reason is None:
            return Output("", (), 0, llm_pb2.FINISH_REASON_LENGTH)
        if self._reason not in _REASONS:
            reason = name_in(self._reason) or "unknown"
            raise EngineFailed(f"the provider's stream ended without an end: finish_reason {reason}")
        usage = self._usage
        if usage is None:
            return Output("", (), 0, _REASONS[self._reason], cost_micros=charged(None, headers))
        # With log probabilities there is one for each token that the output holds.
        more = 0 if self._logprobs else max(self._count(usage.completion_tokens) - self._tokens, 0)
        return Output(
            "",
            (0,) * more,
            self._count(usage.prompt_tokens),
            _REASONS[self._reason],
            cached_prompt_tokens=self._count(getattr(usage.prompt_tokens_details, "cached_tokens", 0)),
            cost_micros=charged((usage.model_extra or {}).get("cost"), headers),
        )

    def _count(self, told: object) -> int:
        """Return a number of tokens that the provider tells, which may be anything; 0 for one that cannot be."""
        return told if type(told) is int and 0 <= told <= self._context_tokens else 0


def chat_request(job: llm_pb2.JobRequest, room: int, options: OpenAIOptions) -> dict[str, Any]:
    """Return the members of a job's chat completion. Raises UnsupportedParams for what the dialect cannot say."""
    params = job.params
    messages = [{"role": ROLE_NAMES[message.role], "content": message.content} for message in job.messages]
    request: dict[str, Any] = {
        "messages": messages or [{"role": "user", "content": job.prompt}],
        "stream": True,
        "stream_options": {"include_usage": True},
        options.max_tokens_field: min(params.max_tokens, room),
    }
    asked = {field.name: value for field, value in params.ListFields()}
    request |= {name: asked[name] for name in _OF_OPENAI if name in asked}
    if params.stop:
        request["stop"] = list(params.stop)
    if params.HasField("logprobs"):
        request |= {"logprobs": True, "top_logprobs": params.logprobs}
    if params.HasField("json_schema"):
        schema = {"name": "output", "schema": json.loads(params.json_schema), "strict": True}
        request["response_format"] = {"type": "json_schema", "json_schema": schema}
    of_vllm = {name: asked[name] for name in _OF_VLLM if name in asked}
    forms: dict[str, Any] = {}
    if params.HasField("regex"):
        forms["regex"] = params.regex
    elif params.HasField("choice"):
        forms["choice"] = list(params.choice.options)
    if options.dialect != "vllm":
        for name in (*of_vllm, *forms):
            raise UnsupportedParams(f"params.{name}: the provider does not support it")
    request["extra_body"] = {**options.extra_body, **of_vllm, **({"structured_outputs": forms} if forms else {})}
    return request


def _logprobs(logprobs: ChoiceLogprobs | None, offset: int, end: int) -> Iterator[llm_pb2.TokenLogprobs]:
    """Yield the places of a chunk, whose text begins at `offset` and ends at `end`."""
    for place in (logprobs.content if logprobs else None) or ():
        yield llm_pb2.TokenLogprobs(
            chosen=llm_pb2.TokenLogprob(token=place.token, logprob=place.logprob),
            top=[llm_pb2.TokenLogprob(token=top.token, logprob=top.logprob) for top in place.top_logprobs],
            offset=offset,
        )
        # A part of a character is shown as a character of its own, and some tokens are no text.
        size = len(place.token.encode(errors="replace")) if place.bytes is None else len(place.bytes)
        offset = min(offset + size, end)


def create(config: EngineConfig) -> OpenAIEngine:
    """Return the engine. Raises ValueError for an unknown or bad option."""
    return OpenAIEngine(config, OpenAIOptions.model_validate(dict(config.options)))
