"""The spans of attempts, generations, and items of batches.

Names follow OpenTelemetry's conventions for generative AI (`gen_ai.…`). Names that those do not have begin with
`llm.job.`. Temporal's plugin creates the span of an attempt, and this module describes it. The span has one generation
below it, or two if the first could not be continued.

A batch has as many generations as items, which no trace could show. So the first items of each attempt at a chunk have
a trace each, linked with the span of the chunk in both directions, and the others have no span.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    NoOpTracer,
    Span,
    SpanContext,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
)

from jobs.errors import JobError, error_type
from llm_pb import internal_pb2, llm_pb2
from services.gpu_worker.engines.chat import ROLE_NAMES
from services.gpu_worker.engines.engine import CannotContinue, Output

ATTEMPT: Final = "llm.job.attempt"
HANDOVERS: Final = "llm.job.handovers"
CONTINUED_TOKENS: Final = "llm.job.continued_tokens"
FINISH_REASON: Final = "llm.job.finish_reason"
WORKER: Final = "llm.job.worker"
PAUSED: Final = "llm.job.paused"
RESUMED: Final = "llm.job.resumed"
CHUNK: Final = "llm.batch.chunk"
CHUNK_ITEMS: Final = "llm.batch.chunk.items"
ITEM: Final = "llm.batch.item"
MAX_TRACED_ITEMS: Final = 8
"""Maximum number of items of an attempt at a chunk that have a trace."""
_ITEM_SPAN: Final = "BatchItem"
_NO_TRACER: Final = NoOpTracer()

_PARAMS: Final = {
    "temperature": gen_ai.GEN_AI_REQUEST_TEMPERATURE,
    "top_p": gen_ai.GEN_AI_REQUEST_TOP_P,
    "top_k": gen_ai.GEN_AI_REQUEST_TOP_K,
    "max_tokens": gen_ai.GEN_AI_REQUEST_MAX_TOKENS,
    "seed": gen_ai.GEN_AI_REQUEST_SEED,
    "presence_penalty": gen_ai.GEN_AI_REQUEST_PRESENCE_PENALTY,
    "frequency_penalty": gen_ai.GEN_AI_REQUEST_FREQUENCY_PENALTY,
}
"""Fields of SamplingParams that the conventions know. Stop texts are left out, because they are the user's content."""


def operation_name(job: llm_pb2.JobRequest) -> str:
    """Return the conventions' name for the generation that the job asks for."""
    names = gen_ai.GenAiOperationNameValues
    name: str = (names.CHAT if job.messages else names.TEXT_COMPLETION).value
    return name


def describe_attempt(number: int, handovers: int, worker: str) -> None:
    """Set the attributes of the attempt on the current span."""
    trace.get_current_span().set_attributes({ATTEMPT: number, HANDOVERS: handovers, WORKER: worker})


def describe_chunk(request: internal_pb2.ChunkRequest, number: int, worker: str) -> None:
    """Set the attributes of an attempt at a chunk of a batch on the current span."""
    attributes: dict[str, Any] = {CHUNK: request.chunk, CHUNK_ITEMS: request.count, ATTEMPT: number, WORKER: worker}
    trace.get_current_span().set_attributes(attributes)


def describe_end(reason: "llm_pb2.FinishReason.ValueType") -> None:
    """Set the attempt's finish reason on the current span."""
    trace.get_current_span().set_attribute(FINISH_REASON, _reason_name(reason))


def describe_error(error: JobError) -> None:
    """Set the attempt's error on the current span."""
    trace.get_current_span().set_attribute(ERROR_TYPE, error.reason)


def describe_pause() -> None:
    """Mark on the current span that the attempt has freed its seat, and waits for another."""
    trace.get_current_span().add_event(PAUSED)


def describe_resumption() -> None:
    """Mark on the current span that the attempt has a seat again."""
    trace.get_current_span().add_event(RESUMED)


def describe_giving_up() -> None:
    """Mark on the current span that Temporal has given the attempt up, for example because it took too long."""
    span = trace.get_current_span()
    span.set_attribute(ERROR_TYPE, asyncio.CancelledError.__name__)
    span.set_status(Status(StatusCode.ERROR, "Temporal has given the attempt up"))


class ItemSpans:
    """The spans of the items of one attempt at a chunk, whose span is the current one when this is created."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._chunk = trace.get_current_span()
        self._left = MAX_TRACED_ITEMS

    @contextmanager
    def item(self, line: int) -> Iterator[None]:
        """Make a span for the item of a line current, which is the root of a trace of its own. Most items have none."""
        context = self._chunk.get_span_context()
        if self._chunk.is_recording() and self._left:
            self._left -= 1
            about, links = {ITEM: line}, [Link(context)]
            with self._tracer.start_as_current_span(_ITEM_SPAN, Context(), attributes=about, links=links) as span:
                self._chunk.add_link(span.get_span_context(), about)
                yield
            return
        # Log lines still name the trace of the batch.
        unsampled = SpanContext(context.trace_id, context.span_id, False, TraceFlags(TraceFlags.DEFAULT))
        with trace.use_span(NonRecordingSpan(unsampled)):
            yield


class GenerationSpan:
    """The span of a running generation. Its cost for each token is negligible."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._began = time.monotonic()
        self._tokens = 0
        self._last: Output | None = None
        self.texts: list[str] | None = None
        """The output so far. None if it is not captured."""

    def add(self, output: Output) -> None:
        """Add an output of the engine."""
        if not self._tokens and output.token_ids:
            waited = time.monotonic() - self._began
            self._span.set_attribute(gen_ai.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK, waited)
        self._tokens += len(output.token_ids)
        self._last = output
        if self.texts is not None:
            self.texts.append(output.text)

    def end(self, *, cancelled: bool) -> None:
        """Set the usage and the output on the span."""
        reason: llm_pb2.FinishReason.ValueType | None = llm_pb2.FINISH_REASON_CANCELLED if cancelled else None
        if self._last is not None:
            reason = self._last.finish_reason or reason
            self._span.set_attribute(gen_ai.GEN_AI_USAGE_INPUT_TOKENS, self._last.prompt_tokens)
        self._span.set_attribute(gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS, self._tokens)
        finish_reasons = [] if reason is None else [_reason_name(reason)]
        self._span.set_attribute(gen_ai.GEN_AI_RESPONSE_FINISH_REASONS, finish_reasons)
        if self.texts is not None:
            message = _message("assistant", "".join(self.texts))
            self._span.set_attribute(gen_ai.GEN_AI_OUTPUT_MESSAGES, json.dumps([message]))


@contextmanager
def generation_span(
    tracer: Tracer, engine: str, job: llm_pb2.JobRequest, capture_content: bool
) -> Iterator[GenerationSpan]:
    """Start the span of one generation, current while the context is open. There is none below an unsampled span."""
    parent = trace.get_current_span().get_span_context()
    tracer = _NO_TRACER if parent.is_valid and not parent.trace_flags.sampled else tracer
    operation = operation_name(job)
    output_type = gen_ai.GenAiOutputTypeValues.JSON if job.params.json_schema else gen_ai.GenAiOutputTypeValues.TEXT
    attributes: dict[str, Any] = {
        gen_ai.GEN_AI_OPERATION_NAME: operation,
        gen_ai.GEN_AI_PROVIDER_NAME: engine,
        gen_ai.GEN_AI_REQUEST_MODEL: job.model,
        gen_ai.GEN_AI_RESPONSE_MODEL: job.model,
        gen_ai.GEN_AI_OUTPUT_TYPE: output_type.value,
        **{_PARAMS[field.name]: value for field, value in job.params.ListFields() if field.name in _PARAMS},
    }
    with tracer.start_as_current_span(
        f"{operation} {job.model}", attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as span:
        recording = GenerationSpan(span)
        if capture_content:
            recording.texts = []
            span.set_attribute(gen_ai.GEN_AI_INPUT_MESSAGES, json.dumps(_input_messages(job)))
        cancelled = False
        try:
            yield recording
        except asyncio.CancelledError:
            cancelled = True
            raise
        except CannotContinue:
            # Not an error: the next generation starts over.
            span.set_attribute(ERROR_TYPE, CannotContinue.__name__)
            raise
        except Exception as error:
            span.set_attribute(ERROR_TYPE, error_type(error))
            span.set_status(Status(StatusCode.ERROR, str(error)))
            raise
        finally:
            recording.end(cancelled=cancelled)


def _reason_name(reason: "llm_pb2.FinishReason.ValueType") -> str:
    return llm_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()


def _input_messages(job: llm_pb2.JobRequest) -> list[dict[str, Any]]:
    if job.messages:
        return [_message(ROLE_NAMES[message.role], message.content) for message in job.messages]
    return [_message("user", job.prompt)]


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"type": "text", "content": text}]}
