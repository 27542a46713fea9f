"""Calls of the service, repeated while what they fail for may pass."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import timedelta
from typing import Any, TypeVar

import grpc

from durable_llm.errors import ApiError, from_call
from durable_llm.retry import RetryPolicy
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub

T = TypeVar("T")
Metadata = tuple[tuple[str, str], ...]


class Calls:
    """The calls of one client. All of them are safe to repeat."""

    def __init__(self, stub: LlmServiceStub, metadata: Metadata, timeout: timedelta, retry: RetryPolicy) -> None:
        """`timeout` is that of one try of a call that does not stream."""
        self._stub = stub
        self._metadata = metadata
        self._timeout = timeout
        self._retry = retry
        self._answered = False

    async def unary(self, method: str, request: Any) -> Any:
        """Return the answer of a method. Raises ApiError."""
        call: Callable[..., Awaitable[Any]] = getattr(self._stub, method)
        tries = _Tries()
        while True:
            try:
                answer = await call(request, timeout=self._timeout.total_seconds(), metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                await self._pause(from_call(error), tries)
            else:
                self._answered = True
                return answer

    async def watch(self, workflow_id: str, resume_token: str) -> AsyncGenerator[llm_pb2.StreamStatusResponse, None]:
        """Yield a job's messages to its end. A stream that breaks is opened again where it broke. Raises ApiError."""
        tries = _Tries()
        while True:
            request = llm_pb2.StreamStatusRequest(workflow_id=workflow_id, resume_token=resume_token)
            call = self._stub.StreamStatus(request, metadata=self._metadata)
            try:
                async for message in call:
                    self._answered = True
                    tries = _Tries()
                    resume_token = message.resume_token
                    yield message
                return
            except grpc.aio.AioRpcError as error:
                await self._pause(from_call(error), tries)
            finally:
                call.cancel()

    async def _pause(self, error: ApiError, tries: "_Tries") -> None:
        tries.failures += 1
        silence = timedelta(seconds=time.monotonic() - tries.since)
        wait = self._retry.backoff(error, tries.failures, silence, answered=self._answered)
        if wait is None:
            raise error
        await asyncio.sleep(wait.total_seconds())


class _Tries:
    """The tries since the service last answered."""

    def __init__(self) -> None:
        self.failures = 0
        self.since = time.monotonic()
