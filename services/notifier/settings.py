"""Settings of the notifier."""

import base64
import binascii
import re
from contextlib import suppress
from datetime import timedelta
from importlib.util import find_spec
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import SettingsConfigDict

from feed.nats_settings import NatsUrl, SubjectPrefix
from jobs import names
from jobs.errors import DeliveryRefused
from jobs.target_rules import TABLE_PATTERN
from runtime.files import ReadableFile
from runtime.metrics_settings import MetricsSettings
from runtime.tenants import TenantName
from runtime.tls import ClientTls, client_tls
from services.notifier.sinks.egress_policy import unrestricted

_PREFIX = "whsec_"
_EXTRAS: Final = {
    "nats_url": ("nats", "nats"),
    "kafka_servers": ("kafka", "aiokafka"),
    "postgres_url": ("postgres", "asyncpg"),
}
"""The extra that a setting needs, and the module that it installs."""


def _usable(secret: SecretStr) -> SecretStr:
    """Return the secret. Raises ValueError, without the secret in it, if Standard Webhooks does not allow it."""
    text = secret.get_secret_value()
    try:
        key = base64.b64decode(text.removeprefix(_PREFIX), validate=True) if text.startswith(_PREFIX) else b""
    except binascii.Error:
        key = b""
    if not 24 <= len(key) <= 64:
        raise ValueError("a signing secret is whsec_ and the base64 of 24 to 64 random bytes")
    return secret


def _table(name: str) -> str:
    if TABLE_PATTERN.fullmatch(name) is None:
        raise ValueError("a table has 1 to 50 of a-z 0-9 _ and first no digit")
    return name


def _endpoint(url: SecretStr) -> SecretStr:
    """Return the URL of the operator's own webhook. Raises ValueError, without the URL in it, if it cannot be used."""
    try:
        unrestricted().parse(url.get_secret_value())
    except DeliveryRefused as error:
        raise ValueError(str(error)) from None
    return url


def _proxy(url: SecretStr) -> SecretStr:
    if not _is_http(url.get_secret_value()):
        raise ValueError("a proxy has the form http://host:port or https://host:port")
    return url


def _postgres(url: SecretStr) -> SecretStr:
    """Return the URL. Raises ValueError, without the URL in it, if it has another form."""
    if not url.get_secret_value().startswith(("postgresql://", "postgres://")):
        raise ValueError("the URL of a database has the form postgresql://user:password@host/database")
    return url


def _job_url(url: str) -> str:
    if url and not (_is_http(url) and "{workflow_id}" in url):
        raise ValueError("the link has the form https://host/path/{workflow_id}, or http")
    return url


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _network(value: object) -> object:
    try:
        return ip_network(str(value))
    except ValueError:
        raise ValueError(
            "a network has the form 10.0.0.0/8 or fd00::/8: only its prefix has bits that are set"
        ) from None


def _name_server(text: str) -> str:
    """Return the server: an address, or with a port address:port or [address]:port."""
    with_port = re.fullmatch(r"(?:\[(.+)\]|([0-9.]+)):(\d{1,5})", text)
    with suppress(ValueError):
        ip_address((with_port[1] or with_port[2]) if with_port else text)
        if with_port is None or 0 < int(with_port[3]) < 65536:
            return text
    raise ValueError("a name server has the form 192.0.2.1, 192.0.2.1:53 or [2001:db8::1]:53")


SigningSecret = Annotated[SecretStr, AfterValidator(_usable)]
Endpoint = Annotated[SecretStr, AfterValidator(_endpoint)]
Network = Annotated[IPv4Network | IPv6Network, BeforeValidator(_network)]


class UserEndpoint(BaseModel):
    """The settings for the jobs of one user."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: Endpoint | None = None
    """The endpoint for the events of jobs that name no target."""
    secrets: tuple[SigningSecret, ...] = ()
    """The secrets that sign all webhooks of the user's jobs."""


class TenantEndpoint(UserEndpoint):
    """The settings for the jobs of one tenant."""

    users: dict[str, UserEndpoint] = Field(default_factory=dict)
    """Users of the tenant with an endpoint or secrets of their own."""


class NotifierSettings(MetricsSettings):
    """The notifier: delivers the events of jobs to their targets."""

    model_config = SettingsConfigDict(
        env_prefix="NOTIFIER_", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True
    )

    task_queue: str = Field(names.NOTIFY_QUEUE, min_length=1, max_length=names.MAX_NOTIFY_QUEUE)
    """The task queue from which the notifier takes deliveries."""
    default_webhook_url: Endpoint | None = None
    """The endpoint for outcomes of jobs that name no target. Unset: none."""
    webhook_secrets: tuple[SigningSecret, ...] = ()
    """The secrets that sign webhooks, as JSON: each is whsec_ and base64. There are several while one replaces
    another."""
    users: dict[str, UserEndpoint] = Field(default_factory=dict)
    """Users with an endpoint or secrets of their own, as JSON by user id: url, for jobs that name no target, and
    secrets. They are users without a tenant."""
    tenants: dict[TenantName, TenantEndpoint] = Field(default_factory=dict)
    """Tenants with an endpoint or secrets of their own, as JSON by name: url, for jobs that name no target, secrets,
    and users, which is for the tenant's users what NOTIFIER_USERS is for those without a tenant."""
    event_source: str = "/llm.v1/jobs"
    """The CloudEvents source of every event."""
    job_url: Annotated[str, AfterValidator(_job_url)] = ""
    """The link to the job in every event: a page or an API's address with {workflow_id} in it. Unset: none."""
    webhook_timeout: timedelta = Field(timedelta(seconds=30), gt=timedelta(0))
    """Maximum duration of an attempt of a webhook, from the lookup of its name to its answer."""
    webhook_schemes: tuple[Literal["https", "http"], ...] = Field(("https",), min_length=1)
    """The schemes that the URL of a webhook may have, as JSON: https, http."""
    webhook_ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = (443,)
    """The ports to which webhooks may go, as JSON. `[]`: any."""
    webhook_networks: tuple[Network, ...] = ()
    """Networks to which webhooks may go although they are not public, as JSON. The local stack allows loopback."""
    dns_servers: tuple[Annotated[str, AfterValidator(_name_server)], ...] = ()
    """The name servers for the names of webhooks, as JSON: addresses, or address:port. `[]`: the system's."""
    webhook_proxy: Annotated[SecretStr, AfterValidator(_proxy)] | None = None
    """The HTTP proxy for webhooks. It looks names up itself, so it must refuse private addresses."""
    nats_url: NatsUrl | None = None
    """The URL of the NATS server for targets of the kind nats. It may hold a user and a password. Unset: such targets
    are refused."""
    nats_tls_ca: ReadableFile | None = None
    """PEM file of the CAs that may have issued the NATS server's certificate. If set, the connection begins with the
    TLS handshake, so the server needs handshake_first. Unset: the connection is in clear, unless the server requires
    TLS."""
    nats_tls_cert: ReadableFile | None = None
    """PEM file of the certificate to present to the NATS server."""
    nats_tls_key: ReadableFile | None = None
    """PEM file of the private key of NOTIFIER_NATS_TLS_CERT, not encrypted."""
    nats_nkey_seed: ReadableFile | None = None
    """File of the NKey seed with which the process authenticates to the NATS server."""
    nats_subject_prefix: SubjectPrefix = "llm.events"
    """The prefix of the subjects that jobs name. A dot follows it."""
    postgres_url: Annotated[SecretStr, AfterValidator(_postgres)] | None = None
    """The URL of the PostgreSQL database for targets of the kind postgres: postgresql://user:password@host/database.
    Unset: such targets are refused."""
    postgres_tables: tuple[Annotated[str, AfterValidator(_table)], ...] = ("llm_results",)
    """Tables that jobs may name, as JSON."""
    postgres_migrate: bool = True
    """Whether the notifier creates these tables, and changes those of an earlier version. If not, the operator does."""
    postgres_connections: int = Field(4, gt=0)
    """Maximum number of connections to PostgreSQL."""
    postgres_tls_ca: ReadableFile | None = None
    """PEM file of the CAs that may have issued PostgreSQL's certificate, whose name is checked. Unset: sslmode in the
    URL counts."""
    postgres_tls_cert: ReadableFile | None = None
    """PEM file of the certificate to present to PostgreSQL."""
    postgres_tls_key: ReadableFile | None = None
    """PEM file of the private key of NOTIFIER_POSTGRES_TLS_CERT, not encrypted."""
    kafka_servers: str | None = None
    """The Kafka brokers for targets of the kind kafka: host:port, separated by commas. Unset: such targets are
    refused."""
    kafka_topics: tuple[str, ...] = ()
    """Topics that jobs may name, as JSON."""
    kafka_tls: bool = False
    """Whether the connections to the Kafka brokers use TLS."""
    kafka_user: str | None = None
    """The user at the Kafka brokers, by SASL SCRAM-SHA-512. Unset: none."""
    kafka_password: SecretStr | None = None
    """The password of NOTIFIER_KAFKA_USER."""
    broker_timeout: timedelta = Field(timedelta(seconds=10), gt=timedelta(0))
    """Maximum wait for NATS or Kafka to acknowledge an event, and for PostgreSQL to store it."""
    max_concurrent: int = Field(1000, gt=0)
    """Maximum number of concurrent deliveries, those that wait for their turn included."""
    max_per_user: int = Field(250, gt=0)
    """Maximum number of concurrent deliveries of one user's jobs. Further ones are postponed, so that one user's slow
    receivers leave room for other users."""
    max_per_tenant: int = Field(500, gt=0)
    """Maximum number of concurrent deliveries of one tenant's jobs, however many users it names. Further ones are
    postponed. Jobs without a tenant have no such limit."""
    max_per_destination: int = Field(16, gt=0)
    """Maximum number of concurrent deliveries to one destination: scheme, host and port of a webhook, a topic, the NATS
    server."""
    max_waiting_per_destination: int = Field(64, ge=0)
    """Maximum number of deliveries that wait for their turn at one destination. Further ones are postponed, so that
    they do not block others."""
    max_progress: int = Field(500, gt=0)
    """Maximum number of concurrent jobs whose progress is sent, those that wait for a worker included."""
    max_progress_per_user: int = Field(125, gt=0)
    """Maximum number of concurrent jobs of one user whose progress is sent. The progress of further jobs is sent once
    other jobs of the user have ended, up to 100 s later."""
    max_progress_per_tenant: int = Field(250, gt=0)
    """Maximum number of concurrent jobs of one tenant whose progress is sent. Jobs without a tenant have no such
    limit."""
    shutdown_grace: timedelta = Field(timedelta(seconds=10), ge=timedelta(0))
    """Maximum time for running deliveries to end after SIGTERM. PT0S: they are ended at once."""
    metrics_port: int = Field(9466, ge=0, le=65535)
    """Port to serve Prometheus metrics on; 0 takes a free one and logs it."""

    def endpoint(self, user_id: str, tenant: str = "") -> UserEndpoint:
        """Return where to send the events of a user's jobs that name no target, and what signs all their webhooks.

        What a user has none of, is the tenant's, and then that of the whole installation.
        """
        of_tenant = self.tenants.get(tenant)
        users = self.users if not tenant else of_tenant.users if of_tenant else {}
        chosen = [one for one in (users.get(user_id), of_tenant) if one is not None]
        return UserEndpoint(
            url=next((one.url for one in chosen if one.url), self.default_webhook_url),
            secrets=next((one.secrets for one in chosen if one.secrets), self.webhook_secrets),
        )

    @property
    def has_endpoints(self) -> bool:
        """Whether any job that names no target has an endpoint."""
        users = [*self.users.values(), *(user for tenant in self.tenants.values() for user in tenant.users.values())]
        return bool(self.default_webhook_url or any(one.url for one in (*users, *self.tenants.values())))

    @property
    def nats_tls(self) -> ClientTls | None:
        """The files of TLS with NATS. None: no CA is set."""
        return client_tls(self, "nats_")

    @property
    def postgres_tls(self) -> ClientTls | None:
        """The files of TLS with PostgreSQL. None: no CA is set."""
        return client_tls(self, "postgres_")

    @field_validator(*_EXTRAS)
    @classmethod
    def _has_its_package(cls, value: Any, info: ValidationInfo) -> Any:
        extra, module = _EXTRAS[info.field_name or ""]
        if value is not None and find_spec(module) is None:
            raise ValueError(f"needs the extra {extra}, which is not installed")
        return value

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        client_tls(self, "nats_")
        client_tls(self, "postgres_")
        return self
