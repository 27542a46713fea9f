"""The edge of the API: parses and checks requests, and turns every error into a status with details.

One interceptor wraps the methods of the gateway's own services, so that a handler gets only valid requests and raises
only ApiError or Temporal's own RPCError. Other services on the server (health, reflection) pass through unchanged.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from datetime import timedelta
from typing import Any, Final

import grpc
from google.protobuf import message_factory
from google.protobuf.message import Message
from google.rpc import status_pb2
from temporalio.service import RPCError

from encryption import KeysUnavailable
from jobs.errors import reason_of
from jobs.field_rules import Violation, too_large
from payload_converter import PayloadError
from runtime import audit
from runtime.answers import SENDING_COPIES, Answers, NoRoomError, TooManyCallsError
from runtime.audit import AuditUnavailable
from runtime.auth import Caller, Refusal
from runtime.grpc_auth import current_caller
from runtime.grpc_interceptor import Handler, Interceptor, behavior_of, with_behavior
from runtime.grpc_parsing import MAX_REQUEST_BYTES
from runtime.tracebacks import forget_frames
from services.gateway.auditing import WRITES, describe_request
from services.gateway.client_messages import ClientMessages
from services.gateway.errors import (
    ApiError,
    audit_unavailable,
    exhausted,
    from_temporal,
    invalid,
    keys_unavailable,
    refused,
    unreadable,
)
from services.gateway.methods import LARGE_ANSWERS, LARGE_REQUESTS, SERVICES, VALIDATORS
from services.gateway.parsing import parse
from services.gateway.scopes import CHECKS

_log = logging.getLogger(__name__)
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}

Count = Callable[[Caller], None]
"""Counts a call, before its request is parsed. Raises ApiError for one too many."""

Bounds = Callable[[Any], Awaitable[Sequence[Violation]]]
"""Returns the violations of this gateway's own settings. It gets any request that parses, valid or not."""

Refused = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Awaitable[Message | None]]
"""Returns the answer to a request that breaks the rules but was valid once; None refuses it. It gets any request that
parses."""

_ANSWERED: Final = (
    ApiError,
    Refusal,
    RPCError,
    NoRoomError,
    TooManyCallsError,
    PayloadError,
    KeysUnavailable,
    AuditUnavailable,
)
"""Errors that become a status with details."""

_JOB_OVERHEAD: Final = 8
"""Bytes that a SubmitRequest adds to its job, rounded up."""


class RequestInterceptor(Interceptor):
    """Parses and checks requests, counts the bytes of requests and answers, turns errors into statuses.

    `bounds` and `refused` have entries for some methods, by name.
    """

    def __init__(
        self,
        count: Count,
        bounds: Mapping[str, Bounds],
        refused: Mapping[str, Refused],
        answers: Answers,
        max_job_bytes: int,
        message_timeout: timedelta,
    ) -> None:
        """`message_timeout` is the maximum wait for the next message of a client that streams."""
        self._message_timeout = message_timeout
        self._count = count
        self._bounds = bounds
        self._refused = refused
        self._answers = answers
        self._max_job_bytes = max_job_bytes

    def wrap(self, handler: Handler, call: grpc.HandlerCallDetails) -> Handler:
        """Wrap the handlers of the gateway's own services."""
        service, _, name = call.method.strip("/").rpartition("/")
        if service not in SERVICES:
            return handler
        kind = message_factory.GetMessageClass(SERVICES[service].methods_by_name[name].input_type)

        async def admit(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> tuple[Message, Message | None]:
            """Return the request and None, or a request that breaks the rules and the answer it gets nevertheless."""
            self._check_size(name, len(data))
            request, violations = parse(data, kind)
            describe_request(request)
            if name in CHECKS:
                CHECKS[name](current_caller(), request)
            not_text = {violation.field for violation in violations}
            bounds = await self._bounds[name](request) if name in self._bounds else ()
            # Those of the operator are the narrower ones.
            told = not_text | {violation.field for violation in bounds}
            violations += [violation for violation in VALIDATORS[name](request) if violation.field not in told]
            violations += [violation for violation in bounds if violation.field not in not_text]
            if not violations:
                return request, None
            # A text that is not UTF-8 was never valid.
            if name in self._refused and not not_text:
                answer = await self._refused[name](request, context)
                if answer is not None:
                    return request, answer
            raise invalid(violations)

        handle = behavior_of(handler)
        if handler.response_streaming:
            return with_behavior(handler, _stream(handle, self._count, admit, self._answers), parses=False)
        if handler.request_streaming:
            streamed = _client_stream(handle, self._count, admit, self._answers, self._message_timeout)
            return with_behavior(handler, streamed, parses=False, serializes=False)
        unary = _unary(handle, self._count, admit, self._answers, LARGE_ANSWERS.get(name, 0), writes=name in WRITES)
        return with_behavior(handler, unary, parses=False, serializes=False)

    def _check_size(self, method: str, size: int) -> None:
        """Raise ApiError INVALID_ARGUMENT for a request that is too large to be worth parsing."""
        if method == "Submit":
            if size > self._max_job_bytes + _JOB_OVERHEAD:
                raise invalid([Violation("job", too_large(size, self._max_job_bytes))])
        elif size > (most := LARGE_REQUESTS.get(method, MAX_REQUEST_BYTES)):
            raise invalid([Violation("", f"the request {too_large(size, most)}")])


Admit = Callable[[bytes, grpc.aio.ServicerContext[Any, Any]], Awaitable[tuple[Message, Message | None]]]


def _unary(handle: Any, count: Count, admit: Admit, answers: Answers, large: int, *, writes: bool) -> Any:
    async def respond(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Message:
        request, response = await admit(data, context)
        if response is None:
            response = await handle(request, context)
        if writes:
            # Most have done so before they had an effect. This one had none.
            await audit.allow()
        else:
            audit.note_allowed()
        return response

    async def call(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        try:
            answer = answers.open(context)
            count(current_caller())
            with answer.request(len(data)):
                await answer.reserve(max(large, len(data)))
                response = await respond(data, context)
        except _ANSWERED as error:
            del data
            await _abort(context, error)
            raise
        # Only the bytes stay in memory from here on, because a client may read slowly.
        raw = response.SerializeToString()
        answer.sending(len(raw), SENDING_COPIES)
        return raw

    return call


def _client_stream(handle: Any, count: Count, admit: Admit, answers: Answers, timeout: timedelta) -> Any:
    """Wrap a method whose client streams. The method bounds the memory of the requests, and what it does is a write."""

    async def call(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        coming = ClientMessages(requests, timeout)

        async def admitted() -> AsyncGenerator[Message, None]:
            async for data in coming:
                request, _ = await admit(data, context)
                yield request

        try:
            answer = answers.open(context)
            count(current_caller())
            async with aclosing(admitted()) as messages:
                response = await handle(messages, context)
            await audit.allow()
            await _drain(coming, context)
        except _ANSWERED as error:
            # The frames hold the message that was refused, and the client may go on for a while.
            forget_frames(error)
            await _drain(coming, context)
            await _abort(context, error)
            raise
        finally:
            await coming.close()
        raw: bytes = response.SerializeToString()
        answer.sending(len(raw), SENDING_COPIES)
        return raw

    return call


async def _drain(coming: ClientMessages, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Read what the client still sends. The initial metadata tells it that its call has an answer, and to stop."""
    await context.send_initial_metadata(())
    await coming.drain()


def _stream(handle: Any, count: Count, admit: Admit, answers: Answers) -> Any:
    async def call(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Message]:
        try:
            answer = answers.open(context, stream=True)
            count(current_caller())
            with answer.request(len(data)):
                request, _ = await admit(data, context)
                handling = handle(request, context)
                del data, request
            async with aclosing(handling) as responses:
                async for response in responses:
                    audit.note_allowed()
                    yield response
        except _ANSWERED as error:
            await _abort(context, error)

    return call


async def _abort(
    context: grpc.aio.ServicerContext[Any, Any],
    error: ApiError
    | Refusal
    | RPCError
    | NoRoomError
    | TooManyCallsError
    | PayloadError
    | KeysUnavailable
    | AuditUnavailable,
) -> None:
    if isinstance(error, TooManyCallsError):
        error = exhausted("this gateway serves its maximum number of calls; call again or call another")
    if isinstance(error, NoRoomError):
        error = exhausted("other calls hold the memory that this gateway may use; call again or call another")
    if isinstance(error, Refusal):
        error = refused(error)
    if isinstance(error, AuditUnavailable):
        error = audit_unavailable()
    if isinstance(error, RPCError):
        _log.warning("Temporal refused or failed: %s %s", error.status.name, error)
        error = from_temporal(error)
    if isinstance(error, PayloadError):
        error = unreadable(error)
    if isinstance(error, KeysUnavailable):
        _log.warning("a key is unavailable: %s", error)
        error = keys_unavailable()
    status: status_pb2.Status = error.status
    await audit.refuse(_CODES[status.code].name, reason_of(status))
    await context.abort(_CODES[status.code], status.message, _trailers(status))


def refusal(code: grpc.StatusCode, message: str) -> tuple[tuple[str, bytes], ...]:
    """Return the trailing metadata of a call that the server ended before it reached LlmService."""
    exceeded = code == grpc.StatusCode.RESOURCE_EXHAUSTED
    return _trailers((exhausted(message) if exceeded else invalid([Violation("", message)])).status)


def auth_refusal(refused_call: Refusal) -> tuple[tuple[str, bytes], ...]:
    """Return the trailing metadata of a call that has ended for who made it."""
    return _trailers(refused(refused_call).status)


def _trailers(status: status_pb2.Status) -> tuple[tuple[str, bytes], ...]:
    return (("grpc-status-details-bin", status.SerializeToString()),)
