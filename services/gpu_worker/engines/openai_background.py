"""Responses in the background of a provider: they go on while the worker is gone, so nothing is paid twice.

The provider's id of the response, and the number of the last event that was published, are a part of the attempt's
heartbeat. The next attempt continues after that event. What the live feed holds beyond it comes again, and is skipped.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final

import openai

from jobs.errors import EngineFailed, InvalidJob, UnsupportedParams
from llm_pb import internal_pb2, llm_pb2
from services.gpu_worker.engines.chat import ROLE_NAMES
from services.gpu_worker.engines.engine import CannotContinue, Generation, Output
from services.gpu_worker.engines.openai_errors import as_job_errors, charged, name_in
from services.gpu_worker.engines.openai_options import OpenAIOptions
from services.gpu_worker.engines.openai_silence import answer_of, until_silent
from services.gpu_worker.engines.openai_transport import PIECES_OF_A_TOKEN, log

_OF_RESPONSES: Final = ("temperature", "top_p")
_OF_VLLM: Final = (
    *("seed", "presence_penalty", "frequency_penalty", "stop"),
    *("top_k", "min_p", "min_tokens", "repetition_penalty"),
)
"""What the API of responses does not have, by the names of servers that know vLLM's parameters."""
_ABANDON_SECONDS: Final = 10
_GONE: Final = (400, 404, 409, 410, 422)
"""HTTP statuses of a response that cannot be read on: it is not kept any more, or its stream is not."""
_MAX_ID_LENGTH: Final = 1024
"""Maximum length of the id of a response. It is in every heartbeat of the attempt."""
_REPLACED: Final = "output_replaced"
"""The code of this suite's own front for an output that was replaced meanwhile."""


class _Lost(EngineFailed):
    """A response cannot be continued where an earlier attempt has left it."""

    def __init__(self, message: str, *, whole: bool = False) -> None:
        """`whole`: it can be read from its beginning."""
        super().__init__(message)
        self.whole = whole


class Background:
    """Generates by responses in the background."""

    def __init__(self, client: openai.AsyncOpenAI, model: str, options: OpenAIOptions, dead: asyncio.Event) -> None:
        self._client = client
        self._model = model
        self._options = options
        self._dead = dead

    async def generate(self, generation: Generation, room: int) -> AsyncGenerator[Output, None]:
        """See Engine.generate."""
        response = generation.provider_response
        if generation.resume_token_ids and not response.response_id:
            raise CannotContinue("no response of the provider is known")
        request = response_request(generation.job, room, self._options)
        while True:
            place = _Place(generation, request["max_output_tokens"], self._options.context_tokens)
            whole = not (response.sequence_number or generation.resume_token_ids)
            try:
                async with contextlib.aclosing(self._run(request, place)) as outputs:
                    async for output in outputs:
                        yield output
            except _Lost as why:
                # One that was lost although it was read as a whole would be lost again.
                id_ = response.response_id if why.whole and not whole else ""
                response.Clear()
                response.response_id = id_
                if generation.resume_token_ids:
                    raise CannotContinue(str(why)) from None
            else:
                return

    async def abandon(self, response: internal_pb2.ProviderResponse) -> None:
        """See Abandons."""
        try:
            async with asyncio.timeout(_ABANDON_SECONDS):
                await self._client.responses.cancel(response.response_id)
        except (openai.OpenAIError, OSError, EngineFailed, TimeoutError) as error:
            # It ends by itself, at its maximum of tokens.
            log.warning("a response of the provider was not cancelled: %s", type(error).__name__)

    async def _run(self, request: Mapping[str, Any], place: "_Place") -> AsyncGenerator[Output, None]:
        options = self._options
        async with as_job_errors():
            asking = self._resumed(place.response) if place.resumes else self._begun(request)
            stream = await answer_of(asking, options.first_seconds)
            patience = lambda: options.silence_seconds if place.has_progressed else options.first_seconds  # noqa: E731
            async with stream, contextlib.aclosing(until_silent(stream, self._dead, patience)) as events:
                async for event in events:
                    output = place.add(event, stream.response.headers)
                    if place.is_over_bound:
                        # The attempt may end with the output, and the response would go on.
                        await self.abandon(place.response)
                    yield output
                    # The attempt has published it.
                    place.note(event)
                    if output.finish_reason is not None:
                        return
        raise EngineFailed("the provider's stream ended without an end of the response")

    async def _begun(self, request: Mapping[str, Any]) -> Any:
        return await self._client.responses.create(model=self._model, **request)

    async def _resumed(self, response: internal_pb2.ProviderResponse) -> Any:
        after: dict[str, Any] = {}
        if response.sequence_number:
            after["starting_after"] = response.sequence_number
        try:
            return await self._client.responses.retrieve(response.response_id, stream=True, **after)
        except openai.APIStatusError as error:
            if error.status_code not in _GONE:
                raise
            raise _Lost("the provider does not know the response any more") from None


class _Place:
    """Turns the events of one stream into outputs, from what earlier attempts have published on."""

    def __init__(self, generation: Generation, max_tokens: int, context_tokens: int) -> None:
        self.response = generation.provider_response
        self.resumes = bool(self.response.response_id)
        self.has_progressed = False
        """Whether output has come."""
        self.is_over_bound = False
        """Whether the provider has sent more pieces than max_tokens allows, which ends the output."""
        self._max_pieces = max_tokens * PIECES_OF_A_TOKEN
        self._context_tokens = context_tokens
        self._held = generation.resume_text.encode()
        self._tokens = len(generation.resume_token_ids)
        if self.response.output_bytes > len(self._held):
            # The feed has lost a part, so the response comes again from its beginning.
            self.response.sequence_number = self.response.output_bytes = 0
        self._bytes = self.response.output_bytes

    def note(self, event: Any) -> None:
        """Note that what the event brought was published."""
        self.response.sequence_number = event.sequence_number
        self.response.output_bytes = self._bytes

    def add(self, event: Any, headers: Mapping[str, str]) -> Output:
        """Return the output of an event, which may be empty. Raises JobError where the response has failed."""
        match event.type:
            case "response.created" | "response.queued" | "response.in_progress":
                if len(event.response.id) > _MAX_ID_LENGTH:
                    raise EngineFailed("the provider's id of the response is too long")
                self.response.response_id = event.response.id
            case "response.output_text.delta":
                return self._delta(event.delta.encode(errors="replace"))
            case "response.refusal.delta" | "response.refusal.done":
                raise InvalidJob("the provider's model refuses to answer")
            case "response.completed":
                return self._end(event.response, llm_pb2.FINISH_REASON_STOP, headers)
            case "response.incomplete":
                return self._end(event.response, self._why_incomplete(event.response), headers)
            case "response.failed":
                code = name_in(getattr(event.response.error, "code", None)) or "unknown"
                raise self._failed(f"the provider's response has failed: {code}")
            case "error":
                code = name_in(event.code) or "unknown"
                if code == _REPLACED and self.resumes and not self.has_progressed:
                    raise _Lost("the provider has replaced the output", whole=True)
                raise EngineFailed(f"the provider's stream broke: {code}")
        return Output("", (), 0)

    def _delta(self, data: bytes) -> Output:
        known = self._held[self._bytes : self._bytes + len(data)]
        if not data.startswith(known):
            raise _Lost("the response is not what was published of it", whole=True)
        self._bytes += len(data)
        if not (text := data[len(known) :].decode(errors="replace")):
            return Output("", (), 0)
        self.has_progressed = True
        self._tokens += 1
        if self._tokens >= self._max_pieces:
            self.is_over_bound = True
            return Output(text, (0,), 0, llm_pb2.FINISH_REASON_LENGTH)
        return Output(text, (0,), 0)

    def _why_incomplete(self, response: Any) -> "llm_pb2.FinishReason.ValueType":
        reason = name_in(getattr(response.incomplete_details, "reason", None))
        if response.status == "cancelled":
            raise self._failed("the response was cancelled at the provider")
        if reason == "content_filter":
            raise InvalidJob("the provider's content filter ended the output")
        if reason != "max_output_tokens":
            raise self._failed(f"the provider's response is incomplete: {reason or 'unknown'}")
        return llm_pb2.FINISH_REASON_LENGTH

    def _failed(self, why: str) -> EngineFailed:
        """Return the error of a response that is over: the next attempt begins another one."""
        if self.resumes and not self.has_progressed:
            return _Lost(why)
        self.response.Clear()
        return EngineFailed(why)

    def _end(self, response: Any, reason: "llm_pb2.FinishReason.ValueType", headers: Mapping[str, str]) -> Output:
        if self._bytes < len(self._held):
            raise _Lost("the response is not what was published of it", whole=True)
        usage = response.usage
        if usage is None:
            return Output("", (), 0, reason, cost_micros=charged(None, headers))
        return Output(
            "",
            (0,) * max(self._count(usage.output_tokens) - self._tokens, 0),
            self._count(usage.input_tokens),
            reason,
            cached_prompt_tokens=self._count(getattr(usage.input_tokens_details, "cached_tokens", 0)),
            cost_micros=charged((usage.model_extra or {}).get("cost"), headers),
        )

    def _count(self, told: object) -> int:
        return told if type(told) is int and 0 <= told <= self._context_tokens else 0


def response_request(job: llm_pb2.JobRequest, room: int, options: OpenAIOptions) -> dict[str, Any]:
    """Return the members of a job's response. Raises UnsupportedParams for what the dialect cannot say."""
    params = job.params
    messages = [{"role": ROLE_NAMES[message.role], "content": message.content} for message in job.messages]
    request: dict[str, Any] = {
        "input": messages or job.prompt,
        "stream": True,
        "background": True,
        "max_output_tokens": min(params.max_tokens, room),
    }
    asked = {field.name: value for field, value in params.ListFields()}
    more: dict[str, Any] = {}
    for name, value in asked.items():
        if name in _OF_RESPONSES:
            request[name] = value
        elif name == "json_schema":
            form = {"type": "json_schema", "name": "output", "schema": json.loads(value), "strict": True}
            request["text"] = {"format": form}
        elif name in _OF_VLLM and options.dialect == "vllm":
            more[name] = list(value) if name == "stop" else value
        elif name != "max_tokens":
            raise UnsupportedParams(f"params.{name}: the provider does not support it for responses in the background")
    request["extra_body"] = {**options.extra_body, **more}
    return request
