"""The connection to Temporal, the same for every service.

Its address comes from Temporal's own environment configuration (`TEMPORAL_ADDRESS`, `TEMPORAL_NAMESPACE`,
`TEMPORAL_TLS_…`, `TEMPORAL_API_KEY`, a profile file): see the SDK's `temporalio.envconfig`. runtime.temporal_tls
replaces the connection when the files of its TLS change.
"""

import asyncio
import logging
from collections.abc import Collection
from datetime import timedelta
from typing import Any, Final, Literal, Self, cast

from opentelemetry.sdk.resources import Resource
from pydantic import field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest, ListSearchAttributesRequest
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.client import Client, Plugin
from temporalio.common import SearchAttributeKey, WorkerDeploymentVersion
from temporalio.contrib.opentelemetry import OpenTelemetryPlugin, ReplaySafeTracerProvider, create_tracer_provider
from temporalio.envconfig import ClientConfigProfile
from temporalio.runtime import Runtime
from temporalio.service import GrpcCompression, KeepAliveConfig, RPCError, RPCStatusCode

from encryption import Encryption
from payload_converter.encryption import encrypting
from runtime import temporal_log
from runtime.encryption_health import wait_for_shared_keys, want_keys
from runtime.environment import WrongSetting
from runtime.health import CHECK_TIMEOUT, Readiness
from runtime.temporal_tls import CONNECT_TIMEOUT, TlsReloading, connect_problem, tls_paths
from runtime.worker_versioning import WorkerVersioning

_log = logging.getLogger(__name__)
_RETRY = timedelta(seconds=1)
_REGISTER_TRIES = 30
_TRANSIENT = (RPCStatusCode.UNAVAILABLE, RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.RESOURCE_EXHAUSTED)
RPC_TIMEOUT = timedelta(seconds=10)
"""Maximum wait for an answer of Temporal, except of a long poll."""

_KEEP_ALIVE: Final = KeepAliveConfig(interval_millis=12_000, timeout_millis=8_000)
"""Pings that find a dead connection whose end sends no more packets. By default the SDK needs 45 s, longer than a
worker's heartbeats may stay away. Temporal ends connections with pings more often than every 10 s
(`frontend.keepAliveMinTime`)."""
_TCP_TIMEOUT: Final = timedelta(seconds=5)
"""Maximum time of one try to open a connection. The system repeats the first packet less and less often, after a minute
without a network once a minute."""
_COMPRESSIONS: Final = {"none": GrpcCompression.NONE, "gzip": GrpcCompression.GZIP}


class TemporalSettings(BaseSettings):
    """The connection to Temporal, as well as Temporal's own variables."""

    model_config = SettingsConfigDict(env_prefix="TEMPORAL_", frozen=True, use_attribute_docstrings=True)

    grpc_compression: Literal["none", "gzip"] = "none"
    """Compression of calls to Temporal. `gzip` is for a distant Temporal, in the cloud. With a Temporal nearby it costs
    a tenth of a job's processor time."""
    deployment_name: str = ""
    """The Worker Deployment of Temporal that the workers of the process belong to. Set TEMPORAL_WORKER_BUILD_ID, too.
    They get no task until a version of the deployment is its current one. Unset: the workers have no version."""
    worker_build_id: str = ""
    """The version of the code that the process runs, the tag of its image for example. Together with
    TEMPORAL_DEPLOYMENT_NAME."""

    @field_validator("deployment_name")
    @classmethod
    def _names_a_deployment(cls, name: str) -> str:
        if "." in name or ":" in name:
            raise ValueError("must have no dot and no colon")
        return name

    @property
    def version(self) -> WorkerDeploymentVersion | None:
        """The version of the workers. None: they have no version."""
        return WorkerDeploymentVersion(self.deployment_name, self.worker_build_id) if self.deployment_name else None

    @model_validator(mode="after")
    def _version_is_whole(self) -> Self:
        if bool(self.deployment_name) != bool(self.worker_build_id):
            raise ValueError("TEMPORAL_DEPLOYMENT_NAME and TEMPORAL_WORKER_BUILD_ID: set both, or none of them")
        return self


def new_provider(resource: Resource) -> ReplaySafeTracerProvider:
    """Return the provider of tracers of a process that connects to Temporal: a replay of a workflow ends no span."""
    return create_tracer_provider(resource=resource, shutdown_on_exit=False)


async def connect(runtime: Runtime, readiness: Readiness, encryption: Encryption | None = None) -> Client:
    """Return a connected client with the payload converter of the suite. Waits until Temporal can be reached.

    The client and its workers propagate the trace's context and record Temporal's own spans. Spans of workflows are
    replay-safe. `runtime` is the one of the process, which has its metrics and logs: see runtime.temporal_metrics. The
    process is ready only while Temporal answers and has the namespace. `encryption` says how payloads are encrypted,
    None if they are not. The client waits for its keys, too. It also waits, with a warning, while Temporal refuses its
    credentials: an operator may give Temporal the key later.

    Raises RuntimeError if the configuration has no address of Temporal, WrongSetting if a file that it names cannot be
    read.
    """
    temporal_log.configure()
    profile = ClientConfigProfile.load()
    try:
        options = profile.to_client_connect_config()
    except OSError as error:
        raise WrongSetting(f"TEMPORAL_TLS_…: {error.filename} cannot be read: {error.strerror}") from error
    settings = TemporalSettings()
    if "target_host" not in options:
        raise RuntimeError(
            "the address of Temporal is not set: set TEMPORAL_ADDRESS, or a profile in TEMPORAL_CONFIG_FILE"
        )
    connected: asyncio.Future[Client] = asyncio.get_running_loop().create_future()

    async def ready() -> bool:
        return connected.done() and await answers(connected.result(), CHECK_TIMEOUT)

    readiness.describe(namespace=options.get("namespace", "default"), temporal=options["target_host"])
    if settings.version is not None:
        readiness.describe(version=settings.version.to_canonical_string())
    want_keys(readiness, encryption)
    if encryption is not None:
        await encryption.wait_for_store()
    readiness.need("temporal", "does not answer", ready)
    namespace = _Namespace(connected)
    readiness.need("namespace", "does not exist: create it, or correct TEMPORAL_NAMESPACE", namespace.exists)
    while True:
        plugins: list[Plugin] = [OpenTelemetryPlugin(add_temporal_spans=True), WorkerVersioning(settings.version)]
        if tls_paths(profile):
            plugins.append(TlsReloading(profile, readiness))
        try:
            # The SDK waits for ever for a peer that takes connections and does not answer.
            async with asyncio.timeout(CONNECT_TIMEOUT.total_seconds()):
                client = await Client.connect(
                    # The files of TLS may have changed since the last try.
                    **profile.to_client_connect_config(),
                    data_converter=encrypting(encryption),
                    plugins=plugins,
                    runtime=runtime,
                    keep_alive_config=_KEEP_ALIVE,
                    connect_timeout=_TCP_TIMEOUT,
                    grpc_compression=_COMPRESSIONS[settings.grpc_compression],
                )
        except (OSError, RuntimeError) as error:
            # The SDK reports a failed connection as a plain RuntimeError. A file of TLS may be missing for a moment.
            _log.warning("Temporal cannot be reached yet: %s", connect_problem(error))
            await asyncio.sleep(_RETRY.total_seconds())
        else:
            connected.set_result(client)
            await wait_for_shared_keys(client, readiness, encryption)
            if encryption is not None:
                await encryption.wait_for_keys()
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
    """Return whether Temporal's frontend reports within this time that it is healthy."""
    try:
        return await client.service_client.check_health(timeout=within)
    except RPCError:
        return False


async def register_search_attributes(client: Client, keys: Collection[SearchAttributeKey[Any]]) -> Collection[str]:
    """Register the search attributes that the namespace lacks.

    Temporal Cloud does not let clients register them. A log line then asks for an operator.

    Return the names of those that the namespace had before, which queries may contain at once: Temporal's servers learn
    of a new one after a while. Empty where Temporal does not say.
    """
    known: set[str] = set()
    for _ in range(_REGISTER_TRIES):
        try:
            known = await _known_search_attributes(client)
            await _add_search_attributes(client, [key for key in keys if key.name not in known])
        except RPCError as error:
            if error.status == RPCStatusCode.NOT_FOUND:
                _log.error("Temporal has no namespace %s: create it, or correct TEMPORAL_NAMESPACE", client.namespace)
                return known
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
