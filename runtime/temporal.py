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
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
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
    Temporal answers and has the namespace.

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
    namespace = _Namespace(connected)
    readiness.need("namespace", "does not exist: create it, or correct TEMPORAL_NAMESPACE", namespace.exists)
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


class _Namespace:
    """Whether the namespace of a client exists. Temporal is not asked again once it does."""

    def __init__(self, connected: "asyncio.Future[Client]") -> None:
        self._connected = connected
        self._known = False

    async def exists(self) -> bool:
        """Return False if Temporal says that the namespace does not exist, True if it says anything else."""
        if self._known or not self._connected.done():
            return True
        client = self._connected.result()
        request = DescribeNamespaceRequest(namespace=client.namespace)
        try:
            await client.workflow_service.describe_namespace(request, timeout=CHECK_TIMEOUT)
        except RPCError as error:
            return error.status != RPCStatusCode.NOT_FOUND
        self._known = True
        return True


async def answers(client: Client, within: timedelta) -> bool:
    """Return whether Temporal's frontend says in that time that it is well."""
    try:
        return await client.service_client.check_health(timeout=within)
    except RPCError:
        return False


async def register_search_attributes(client: Client, keys: Collection[SearchAttributeKey[Any]]) -> None:
    """Make the search attributes known to the namespace; those that are there stay.

    Temporal Cloud refuses this to clients: there an operator registers them, and a log line says so.
    """
    for _ in range(_REGISTER_TRIES):
        try:
            await _register_search_attributes(client, keys)
        except RPCError as error:
            if error.status == RPCStatusCode.NOT_FOUND:
                _log.error("Temporal has no namespace %s: create it, or correct TEMPORAL_NAMESPACE", client.namespace)
                return
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
