"""The front's connection to the gateway. Each call carries the credential of the request that it is made for.

Calls go through durable_llm, which repeats them and continues streams at another gateway. All share one channel.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from datetime import timedelta
from http import HTTPStatus
from typing import Any, Final, Self

import grpc
from grpc_health.v1 import health_pb2
from opentelemetry import trace
from opentelemetry.semconv._incubating.attributes.rpc_attributes import (
    RPC_METHOD,
    RPC_RESPONSE_STATUS_CODE,
    RPC_SYSTEM_NAME,
    RpcSystemNameValues,
)
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from starlette.requests import Request

from durable_llm import ApiError, AsyncBatches, AsyncClient, AsyncFiles, AsyncPipelines, RetryPolicy
from durable_llm._services import SERVICE_OF
from llm_pb import llm_pb2
from runtime.addresses import is_loopback
from runtime.health import CHECK_TIMEOUT
from runtime.telemetry import current_headers
from runtime.tls import ClientTls
from services.http.failures import Failure
from services.http.settings import HttpSettings

_log = logging.getLogger(__name__)
_SERVICE: Final = llm_pb2.DESCRIPTOR.services_by_name["LlmService"].full_name
_OPTIONS: Final = (
    # A proxy of the environment is for calls to the outside.
    ("grpc.enable_http_proxy", 0),
    # Bounds what a client of a stream has not read. By default the window grows to megabytes for each stream.
    ("grpc.http2.lookahead_bytes", 64 * 1024),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
)
_BETWEEN_PROBES: Final = 0.5
_OPEN_SECONDS: Final = 10
_MAX_CREDENTIAL: Final = 15 * 1024
"""Maximum size of a credential, in bytes. With the other metadata of a call it fits into what gRPC takes."""
_CALLS: Final = "gateway_calls"
"""The key of a scope with the calls of the request."""


class _Retry(RetryPolicy):
    """Repeats calls that another gateway may answer. A caller over a limit gets the error at once."""

    def backoff(self, error: ApiError, failures: int, silence: timedelta, *, answered: bool) -> timedelta | None:
        """See RetryPolicy."""
        if error.code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            return None
        return super().backoff(error, failures, silence, answered=answered)


class Gateway:
    """The gateway, for all requests. A context manager that closes the connection."""

    def __init__(self, settings: HttpSettings, tracer: Tracer) -> None:
        """Raises OSError when a file of the TLS cannot be read."""
        self._timeout = settings.gateway_timeout
        self._retry = _Retry(connect_timeout=settings.gateway_retry, give_up_after=settings.gateway_retry)
        self._tracer = tracer
        self._open_until = 0.0
        """Until this time of the monotonic clock the gateway is known to ask for no credential."""
        tls = settings.gateway_tls
        self._client = AsyncClient(
            settings.gateway,
            credentials=_credentials(tls) if tls is not None else None,
            options=_OPTIONS,
            timeout=self._timeout,
            retry=self._retry,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    def of(self, request: Request) -> "Calls":
        """Return the calls of a request's caller. Raises Failure for several credentials and for an invalid one."""
        if _CALLS not in request.scope:
            request.scope[_CALLS] = self.in_name_of(_credential(request))
        calls: Calls = request.scope[_CALLS]
        return calls

    def in_name_of(self, credential: Mapping[str, str]) -> "Calls":
        """Return the calls of a caller, by the metadata that holds the credential. It may be empty."""
        return Calls(self._client, self._tracer, credential)

    async def judge(self, request: Request) -> None:
        """Return once the gateway has accepted the credential of a request. Raises Failure, and ApiError for a refusal.

        An answered call of the request is enough. Otherwise this makes a call, which the caller's rate counts. The
        answer that no credential is needed is kept for some seconds.
        """
        calls, anonymous = self.of(request), "authorization" not in request.headers
        if calls.answered or (anonymous and time.monotonic() < self._open_until):
            return
        try:
            # It names no job, so the gateway only authenticates the caller.
            await calls.call("GetStatus", llm_pb2.GetStatusRequest())
        except ApiError as error:
            if error.code not in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED):
                raise
        if anonymous:
            self._open_until = time.monotonic() + _OPEN_SECONDS

    async def serves(self) -> bool | str:
        """Return whether the gateway answers, or what it answers when it does not serve."""
        check = self._client.channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            answer = await check(health_pb2.HealthCheckRequest(service=_SERVICE), timeout=CHECK_TIMEOUT.total_seconds())
        except grpc.aio.AioRpcError:
            return False
        status = health_pb2.HealthCheckResponse
        return answer.status == status.SERVING or f"is {status.ServingStatus.Name(answer.status)}"

    async def require_authentication(self, settings: HttpSettings) -> None:
        """Return once callers from other machines are known to be authenticated. Raises RuntimeError if they are not.

        For an address on loopback, or where the settings allow everybody, it returns at once. Otherwise it waits for
        the gateway and calls it without a credential.
        """
        if settings.allow_anonymous or is_loopback(settings.host):
            return
        while True:
            try:
                await self._client.models()
            except ApiError as error:
                if error.code == grpc.StatusCode.UNAUTHENTICATED:
                    return
                _log.warning("waiting for the gateway, to know whether it asks for credentials: %s", error)
                await asyncio.sleep(_BETWEEN_PROBES)
            else:
                raise RuntimeError(
                    f"HTTP_HOST {settings.host} is not loopback, and the gateway asks nobody for a credential. Let it"
                    " authenticate its callers (see docs/security.md); or, behind a proxy that does so,"
                    " HTTP_ALLOW_ANONYMOUS=true"
                )


class Calls:
    """Calls of the gateway in the name of one caller. Each has a span, which the gateway's continues."""

    def __init__(self, client: AsyncClient, tracer: Tracer, credential: Mapping[str, str]) -> None:
        self._client = client
        self._tracer = tracer
        self._credential = credential
        self.answered = False
        """Whether the gateway has answered a call, and so knows the caller."""

    async def call(self, method: str, request: Any) -> Any:
        """Return the response of a method, which has one request and one response. Raises ApiError."""
        with self._observed(method) as client:
            return await client.call(method, request)

    async def watch(
        self, workflow_id: str, resume_token: str = "", *, output_offset: int = 0
    ) -> AsyncGenerator[llm_pb2.StreamStatusResponse, None]:
        """Yield the messages of StreamStatus to the job's end, also across gateways. Raises ApiError."""
        with self._observed("StreamStatus") as client:
            job = client.job(workflow_id)
            async with aclosing(job.watch(resume_token, output_offset=output_offset)) as messages:
                async for message in messages:
                    yield message

    @contextmanager
    def files(self, method: str) -> Iterator[AsyncFiles]:
        """Yield the files of the caller, for a call of a method of FileService, in a span."""
        with self._observed(method) as client:
            yield client.files

    @contextmanager
    def batches(self, method: str) -> Iterator[AsyncBatches]:
        """Yield the batches of the caller, for a call of a method of BatchService, in a span."""
        with self._observed(method) as client:
            yield client.batches

    @contextmanager
    def pipelines(self, method: str) -> Iterator[AsyncPipelines]:
        """Yield the pipelines of the caller, for a call of a method of PipelineService, in a span."""
        with self._observed(method) as client:
            yield client.pipelines

    @contextmanager
    def _observed(self, method: str) -> Iterator[AsyncClient]:
        """Yield the client of a call, in a span. The span is not the current one, for a generator has no context."""
        service = SERVICE_OF[method].full_name
        attributes = {RPC_SYSTEM_NAME: RpcSystemNameValues.GRPC.value, RPC_METHOD: f"{service}/{method}"}
        span = self._tracer.start_span(f"{service}/{method}", kind=SpanKind.CLIENT, attributes=attributes)
        with trace.use_span(span):
            headers = current_headers()
        try:
            yield self._client.with_metadata({**self._credential, **headers})
            self.answered = True
            _end(span, grpc.StatusCode.OK)
        except ApiError as error:
            # Only a gateway sends a reason. Without one no gateway has answered.
            self.answered = self.answered or bool(error.reason)
            _end(span, error.code)
            raise
        except BaseException:
            # The client has gone, or has read enough.
            _end(span, grpc.StatusCode.CANCELLED)
            raise


def _end(span: Span, code: grpc.StatusCode) -> None:
    span.set_attribute(RPC_RESPONSE_STATUS_CODE, code.name)
    if code not in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED):
        span.set_attribute(ERROR_TYPE, code.name)
        span.set_status(Status(StatusCode.ERROR))
    span.end()


def _credential(request: Request) -> dict[str, str]:
    """Return the metadata with the credential as it came; empty without one. Raises Failure, 401."""
    values = request.headers.getlist("authorization")
    if not values:
        return {}
    printable = values[0].isascii() and values[0].isprintable()
    if len(values) > 1 or not printable or len(values[0]) > _MAX_CREDENTIAL:
        message = (
            "the credential must be sent once, as `Authorization: Bearer <credential>` of at most"
            f" {_MAX_CREDENTIAL} bytes"
        )
        challenge = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
        raise Failure(HTTPStatus.UNAUTHORIZED, message, "CREDENTIAL_INVALID", headers=challenge)
    return {"authorization": values[0]}


def _credentials(tls: ClientTls) -> grpc.ChannelCredentials:
    key = tls.key.read_bytes() if tls.key is not None else None
    cert = tls.cert.read_bytes() if tls.cert is not None else None
    return grpc.ssl_channel_credentials(tls.ca.read_bytes(), key, cert)
