"""The edge of the API: bytes in, checked requests through, every error out as a status with details.

One interceptor around the methods of LlmService, so that a handler sees only valid requests and raises only ApiError or
Temporal's own RPCError. Other services on the server (health, reflection) pass through untouched.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final

import grpc
from google.protobuf import message_factory
from google.protobuf.message import Message
from google.rpc import status_pb2
from temporalio.service import RPCError

from jobs import rules
from jobs.rules import Violation
from llm_pb import llm_pb2
from runtime.grpc_parsing import MAX_REQUEST_BYTES
from services.gateway.errors import ApiError, from_temporal, invalid
from services.gateway.parsing import parse

_log = logging.getLogger(__name__)
_SERVICE: Final = llm_pb2.DESCRIPTOR.services_by_name["LlmService"]
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}

RULES: Final[Mapping[str, Callable[[Any], Sequence[Violation]]]] = {
    "Submit": rules.check_submit,
    "GetStatus": rules.check_workflow_id,
    "StreamStatus": rules.check_stream,
    "Cancel": rules.check_cancel,
    "List": rules.check_list,
    "ListModels": lambda _: (),
    "ListDeliveries": rules.check_workflow_id,
    "Redeliver": rules.check_redeliver,
}
"""What llm.proto asks of the request of each method."""

Bounds = Callable[[Any], Awaitable[Sequence[Violation]]]
"""Finds what only this gateway's operator can tell to be wrong with a request. Any request that parses may come."""


_JOB_OVERHEAD: Final = 8
"""Bytes that a SubmitRequest adds to its job, and some."""


class Boundary(grpc.aio.ServerInterceptor):
    """Parses and checks requests, and turns errors into statuses. `bounds` is by method name; not all have some."""

    def __init__(self, bounds: Mapping[str, Bounds], max_job_bytes: int) -> None:
        self._bounds = bounds
        self._max_job_bytes = max_job_bytes

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handlers of LlmService."""
        handler = await continuation(handler_call_details)
        service, _, name = handler_call_details.method.strip("/").rpartition("/")
        if handler is None or service != _SERVICE.full_name:
            return handler
        kind = message_factory.GetMessageClass(_SERVICE.methods_by_name[name].input_type)

        async def admit(data: bytes) -> Message:
            self._check_size(name, len(data))
            request, violations = parse(data, kind)
            not_text = {violation.field for violation in violations}
            violations += [violation for violation in RULES[name](request) if violation.field not in not_text]
            if name in self._bounds:
                violations += [item for item in await self._bounds[name](request) if item.field not in not_text]
            if violations:
                raise invalid(violations)
            return request

        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                _stream(handler.unary_stream, admit), None, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            _unary(handler.unary_unary, admit), None, handler.response_serializer
        )

    def _check_size(self, method: str, size: int) -> None:
        """Raise ApiError INVALID_ARGUMENT for a request that is too large to be worth parsing."""
        if method == "Submit":
            if size > self._max_job_bytes + _JOB_OVERHEAD:
                raise invalid([Violation("job", rules.too_large(size, self._max_job_bytes))])
        elif size > MAX_REQUEST_BYTES:
            raise invalid([Violation("", f"the request {rules.too_large(size, MAX_REQUEST_BYTES)}")])


def _unary(handle: Any, admit: Callable[[bytes], Awaitable[Message]]) -> Any:
    async def call(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Message:
        try:
            return await handle(await admit(data), context)  # type: ignore[no-any-return]
        except (ApiError, RPCError) as error:
            await _abort(context, error)
            raise

    return call


def _stream(handle: Any, admit: Callable[[bytes], Awaitable[Message]]) -> Any:
    async def call(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Message]:
        try:
            async with aclosing(handle(await admit(data), context)) as responses:
                async for response in responses:
                    yield response
        except (ApiError, RPCError) as error:
            await _abort(context, error)

    return call


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: ApiError | RPCError) -> None:
    if isinstance(error, RPCError):
        _log.warning("Temporal refused or failed: %s %s", error.status.name, error)
        error = from_temporal(error)
    status: status_pb2.Status = error.status
    await context.abort(_CODES[status.code], status.message, (("grpc-status-details-bin", status.SerializeToString()),))
