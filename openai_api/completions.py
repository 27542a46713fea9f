"""The objects and chunks of chat completions and of completions, made of a job alone."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

from jobs.response_ids import response_id
from llm_pb import llm_pb2
from openai_api.asked import tier_of
from openai_api.logprobs import legacy_logprobs, logprobs_of
from openai_api.outcome import Ending, completion_usage, finish_reason

Logprobs = RepeatedCompositeFieldContainer[llm_pb2.TokenLogprobs]


class Completion(ABC):
    """One completion: its object once the job has succeeded, or its chunks as the output comes."""

    prefix: ClassVar[str]
    """The prefix of its id."""
    whole: ClassVar[str]
    """The name of the object."""
    chunk: ClassVar[str]
    """The name of the object of a chunk."""

    def __init__(self, job: llm_pb2.JobRequest, status: llm_pb2.JobStatus, *, include_usage: bool = False) -> None:
        """`include_usage`: a last chunk holds the usage."""
        self._base = {
            "id": response_id(status.workflow_id).replace("resp_", self.prefix, 1),
            "created": status.create_time.seconds,
            "model": job.model,
            "service_tier": tier_of(job),
            "system_fingerprint": None,
        }
        self._include_usage = include_usage
        self._with_logprobs = job.params.HasField("logprobs")

    def object(self, ending: Ending) -> dict[str, Any]:
        """Return the object of a completion whose job has succeeded."""
        result = ending.result
        choice = {
            "index": 0,
            **self._answer(result.output),
            "logprobs": self._logprobs(result.logprobs) if self._with_logprobs else None,
            "finish_reason": finish_reason(result),
        }
        return {**self._base, "object": self.whole, "choices": [choice], "usage": completion_usage(result)}

    def begin(self) -> Iterator[dict[str, Any]]:
        """Yield what comes before the text."""
        if (opening := self._opening()) is not None:
            yield self._chunk(opening)

    def text(self, delta: llm_pb2.OutputDelta) -> Iterator[dict[str, Any]]:
        """Yield the chunk of new output."""
        logprobs = self._logprobs(delta.logprobs) if self._with_logprobs else None
        if delta.text or delta.logprobs:
            yield self._chunk(self._piece(delta.text), logprobs=logprobs)

    def end(self, ending: Ending) -> Iterator[dict[str, Any]]:
        """Yield the last chunks of a completion whose job has succeeded."""
        yield self._chunk(self._nothing(), finish_reason=finish_reason(ending.result))
        if self._include_usage:
            yield {**self._base, "object": self.chunk, "choices": [], "usage": completion_usage(ending.result)}

    def _chunk(self, content: dict[str, Any], **changes: Any) -> dict[str, Any]:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": None, **changes}
        usage = {"usage": None} if self._include_usage else {}
        return {**self._base, "object": self.chunk, "choices": [choice], **usage}

    @abstractmethod
    def _answer(self, text: str) -> dict[str, Any]:
        """Return the whole text, as a choice holds it."""

    @abstractmethod
    def _piece(self, text: str) -> dict[str, Any]:
        """Return a piece of the text, as the choice of a chunk holds it."""

    @abstractmethod
    def _opening(self) -> dict[str, Any] | None:
        """Return what the first chunk holds; None if it is the first piece of the text."""

    @abstractmethod
    def _nothing(self) -> dict[str, Any]:
        """Return what the last chunk holds as well as the reason of the end."""

    @abstractmethod
    def _logprobs(self, tokens: Logprobs) -> dict[str, Any]:
        """Return log probabilities, as a choice holds them."""


class ChatCompletion(Completion):
    """The answer of `/v1/chat/completions`."""

    prefix = "chatcmpl-"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def _answer(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None, "annotations": []}}

    def _piece(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def _opening(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": "", "refusal": None}}

    def _nothing(self) -> dict[str, Any]:
        return {"delta": {}}

    def _logprobs(self, tokens: Logprobs) -> dict[str, Any]:
        return {"content": logprobs_of(tokens), "refusal": None}


class TextCompletion(Completion):
    """The answer of `/v1/completions`."""

    prefix = "cmpl-"
    whole = "text_completion"
    chunk = "text_completion"

    def _answer(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _piece(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _opening(self) -> None:
        return None

    def _nothing(self) -> dict[str, Any]:
        return {"text": ""}

    def _logprobs(self, tokens: Logprobs) -> dict[str, Any]:
        return legacy_logprobs(tokens)
