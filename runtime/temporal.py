"""The connection to Temporal, the same for every service.

Where Temporal is comes from its own environment configuration (`TEMPORAL_ADDRESS`, `TEMPORAL_NAMESPACE`,
`TEMPORAL_TLS_…`, `TEMPORAL_API_KEY`, a profile file): see the SDK's `temporalio.envconfig`.
"""

import asyncio
import logging
from collections.abc import Collection
from datetime import timedelta
from typing import Any, Final, Literal, cast

from pydantic_settings import BaseSettings, SettingsConfigDict
from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest, ListSearchAttributesRequest
from temporalio.client import Client
from temporalio.common import SearchAttributeKey
from temporalio.contrib.opentelemetry import OpenTelemetryPlugin
from temporalio.envconfig import ClientConfig
from temporalio.runtime import Runtime
from temporalio.service import GrpcCompression, RPCError, RPCStatusCode

from payload_converter import data_converter
from runtime.health import CHECK_TIMEOUT, Readiness

_log = logging.getLogger(__name__)
_RETRY = timedelta(seconds=1)
_REGISTER_TRIES = 30
_TRANSIENT = (RPCStatusCode.UNAVAILABLE, RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.RESOURCE_EXHAUSTED)
RPC_TIMEOUT = timedelta(seconds=10)
"""Longest wait for one answer of Temporal's, long polls apart."""

_COMPRESSIONS: Final = {"none": GrpcCompression.NONE, "gzip": GrpcCompression.GZIP}


class TemporalSettings(BaseSettings):
    """The connection to Temporal, as well as Temporal's own variables."""

    model_config = SettingsConfigDict(env_prefix="TEMPORAL_", frozen=True, use_attribute_docstrings=True)

    grpc_compression: Literal["none", "gzip"] = "none"
    """Compression of calls to Temporal. `gzip` is for a distant Temporal, in the cloud. With a Temporal nearby it costs
    a tenth of a job's processor time."""


async def connect(runtime: Runtime, readiness: Readiness) -> Client:
    """Return a client that is connected and speaks protobuf payloads; waits for a Temporal that is away.

    It and its workers carry the trace's context along and make Temporal's own spans, those of workflows replay-safe.
    `runtime` is the process's, which has its metrics and logs: see runtime.metrics. The process is ready only while
    Temporal answers.

    Raises RPCError when Temporal answers and refuses (credentials, say): waiting would not help. Raises RuntimeError
    when the configuration does not say where Temporal is.
    """
    options = ClientConfig.load_client_connect_config()
    tracing = OpenTelemetryPlugin(add_temporal_spans=True)
    compression = _COMPRESSIONS[TemporalSettings().grpc_compression]
    if "target_host" not in options:
        raise RuntimeError("TEMPORAL_ADDRESS, or a profile in TEMPORAL_CONFIG_FILE, has to say where Temporal is")
    connected: asyncio.Future[Client] = asyncio.get_running_loop().create_future()

    async def ready() -> bool:
        return connected.done() and await answers(connected.result(), CHECK_TIMEOUT)

    readiness.describe(namespace=options.get("namespace", "default"), temporal=options["target_host"])
    readiness.need("temporal", "does not answer", ready)
    while True:
        try:
            client = await Client.connect(
                **options,
                data_converter=data_converter,
                plugins=[tracing],
                runtime=runtime,
                grpc_compression=compression,
            )
        except RuntimeError as error:
            # The SDK reports a failed connection as a plain RuntimeError.
            _log.warning("Temporal cannot be reached yet: %s", error)
            await asyncio.sleep(_RETRY.total_seconds())
        else:
            connected.set_result(client)
            return client


async def answers(client: Client, within: timedelta) -> bool:
    """Return whether Temporal's frontend says in that time that it is well."""
    try:
        return await client.service_client.check_health(timeout=within)
    except RPCError:
        return False


async def register_search_attributes(client: Client, keys: Collection[SearchAttributeKey[Any]]) -> Collection[str]:
    """Make the search attributes known to the namespace; those that are there stay.

    Temporal Cloud refuses this to clients: there an operator registers them, and a log line says so.

    Return the names of those that were known before, which queries may contain at once: Temporal's servers learn of a
    new one after a while. Empty where Temporal does not say.
    """
    known: set[str] = set()
    for _ in range(_REGISTER_TRIES):
        try:
            known = await _known_search_attributes(client)
            await _add_search_attributes(client, [key for key in keys if key.name not in known])
        except RPCError as error:
            _log.warning("search attributes could not be registered: %s", error)
            if error.status in _TRANSIENT:
                await asyncio.sleep(_RETRY.total_seconds())
                continue
            _log.warning("an operator has to register the search attributes that are missing")
        break
    return known


async def _known_search_attributes(client: Client) -> set[str]:
    known = await client.operator_service.list_search_attributes(
        ListSearchAttributesRequest(namespace=client.namespace), timeout=RPC_TIMEOUT
    )
    return {*known.custom_attributes}


async def _add_search_attributes(client: Client, keys: Collection[SearchAttributeKey[Any]]) -> None:
    """Add each by itself: where the namespace has no room for one more, the others are there. Raises RPCError."""
    refused: RPCError | None = None
    for key in keys:
        request = AddSearchAttributesRequest(namespace=client.namespace)
        request.search_attributes[key.name] = cast("IndexedValueType.ValueType", key.indexed_value_type.value)
        try:
            await client.operator_service.add_search_attributes(request, timeout=RPC_TIMEOUT)
        except RPCError as error:
            if error.status in _TRANSIENT:
                raise
            if error.status != RPCStatusCode.ALREADY_EXISTS:
                refused = error
    if refused is not None:
        raise refused
