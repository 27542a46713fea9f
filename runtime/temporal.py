"""The connection to Temporal, the same for every service.

Its address comes from Temporal's own environment configuration (`TEMPORAL_ADDRESS`, `TEMPORAL_NAMESPACE`,
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
"""Maximum wait for an answer of Temporal, except of a long poll."""

_COMPRESSIONS: Final = {"none": GrpcCompression.NONE, "gzip": GrpcCompression.GZIP}


class TemporalSettings(BaseSettings):
    """The connection to Temporal, as well as Temporal's own variables."""

    model_config = SettingsConfigDict(env_prefix="TEMPORAL_", frozen=True, use_attribute_docstrings=True)

    grpc_compression: Literal["none", "gzip"] = "none"
    """Compression of calls to Temporal. `gzip` is for a distant Temporal, in the cloud. With a Temporal nearby it costs
    a tenth of a job's processor time."""


async def connect(runtime: Runtime, readiness: Readiness) -> Client:
    """Return a connected client with the payload converter of the suite. Waits until Temporal can be reached.

    The client and its workers propagate the trace's context and record Temporal's own spans. Spans of workflows are
    replay-safe. `runtime` is the one of the process, which has its metrics and logs: see runtime.metrics. The process
    is ready only while Temporal answers.

    Raises RPCError if Temporal refuses the connection, because of its credentials for example: a retry would not help.
    Raises RuntimeError if the configuration has no address of Temporal.
    """
    options = ClientConfig.load_client_connect_config()
    tracing = OpenTelemetryPlugin(add_temporal_spans=True)
    compression = _COMPRESSIONS[TemporalSettings().grpc_compression]
    if "target_host" not in options:
        raise RuntimeError(
            "the address of Temporal is not set: set TEMPORAL_ADDRESS, or a profile in TEMPORAL_CONFIG_FILE"
        )
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
    """Return whether Temporal's frontend reports within this time that it is healthy."""
    try:
        return await client.service_client.check_health(timeout=within)
    except RPCError:
        return False


async def register_search_attributes(client: Client, keys: Collection[SearchAttributeKey[Any]]) -> None:
    """Register the search attributes that the namespace lacks.

    Temporal Cloud does not let clients register them. A log line then asks for an operator.
    """
    for _ in range(_REGISTER_TRIES):
        try:
            await _register_search_attributes(client, keys)
        except RPCError as error:
            _log.warning("search attributes could not be registered: %s", error)
            if error.status in _TRANSIENT:
                await asyncio.sleep(_RETRY.total_seconds())
                continue
            _log.warning("an operator has to register the search attributes that are missing")
        return


async def _register_search_attributes(client: Client, keys: Collection[SearchAttributeKey[Any]]) -> None:
    try:
        known = await client.operator_service.list_search_attributes(
            ListSearchAttributesRequest(namespace=client.namespace), timeout=RPC_TIMEOUT
        )
        missing = {key.name: key.indexed_value_type for key in keys if key.name not in known.custom_attributes}
        if missing:
            request = AddSearchAttributesRequest(namespace=client.namespace)
            for name, kind in missing.items():
                request.search_attributes[name] = cast("IndexedValueType.ValueType", kind.value)
            await client.operator_service.add_search_attributes(request, timeout=RPC_TIMEOUT)
    except RPCError as error:
        if error.status != RPCStatusCode.ALREADY_EXISTS:
            raise
