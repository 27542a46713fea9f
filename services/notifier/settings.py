"""Settings of the notifier."""

import base64
import binascii
from datetime import timedelta
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from jobs import names

_PREFIX = "whsec_"


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


SigningSecret = Annotated[SecretStr, AfterValidator(_usable)]


class UserEndpoint(BaseModel):
    """Settings for the jobs of one user."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: SecretStr | None = None
    """The webhook for the events of jobs that name no target."""
    secrets: tuple[SigningSecret, ...] = ()
    """Signing secrets of all webhooks of the user's jobs."""


class NotifierSettings(BaseSettings):
    """The notifier: delivers the events of jobs to their receivers."""

    model_config = SettingsConfigDict(
        env_prefix="NOTIFIER_", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True
    )

    task_queue: str = Field(names.NOTIFY_QUEUE, min_length=1, max_length=names.MAX_NOTIFY_QUEUE)
    """The queue to take deliveries from."""
    default_webhook_url: SecretStr | None = None
    """The webhook for the outcomes of jobs that name no target. If unset, they are not delivered."""
    webhook_secrets: tuple[SigningSecret, ...] = ()
    """Signing secrets of webhooks, as JSON: whsec_ and base64 each. Set several while one replaces another."""
    users: dict[str, UserEndpoint] = Field(default_factory=dict)
    """Users with their own endpoint, as JSON by user id: url, for jobs that name no target, and secrets."""
    event_source: str = "/llm.v1/jobs"
    """The CloudEvents source of every event."""
    job_url: str = ""
    """URL of a job's page or API, with {workflow_id} in it, to which every event links. If unset, events have no
    link."""
    webhook_timeout: timedelta = Field(timedelta(seconds=30), gt=timedelta(0))
    """Maximum duration of a webhook's attempt, from the DNS lookup to the answer."""
    webhook_schemes: tuple[str, ...] = ("https",)
    """Schemes that the URL of a webhook may have, as JSON: https, http."""
    webhook_ports: tuple[int, ...] = (443,)
    """Ports that webhooks may connect to, as JSON. Empty allows any."""
    webhook_networks: tuple[IPv4Network | IPv6Network, ...] = ()
    """Networks that webhooks may connect to although they are not public, as JSON. The local stack allows loopback."""
    dns_servers: tuple[str, ...] = ()
    """Name servers for the hosts of webhooks, as JSON: addresses, or address:port. Empty means the system's."""
    webhook_proxy: SecretStr | None = None
    """HTTP proxy for webhooks. It looks names up itself, so it must refuse private addresses."""
    nats_url: SecretStr | None = None
    """URL of the NATS server for targets of the kind nats. It may hold a user and password. If unset, such targets are
    refused."""
    nats_subject_prefix: str = "llm.events"
    """Prefix of the subjects that jobs name. A dot follows it."""
    kafka_servers: str | None = None
    """Kafka brokers for targets of the kind kafka: host:port, separated by commas. If unset, such targets are
    refused."""
    kafka_topics: tuple[str, ...] = ()
    """Topics that jobs may name, as JSON."""
    kafka_tls: bool = False
    """Whether to use TLS with the brokers."""
    kafka_user: str | None = None
    """User for SASL SCRAM-SHA-512 at the brokers. If unset, there is no authentication."""
    kafka_password: SecretStr | None = None
    """Password of that user."""
    broker_timeout: timedelta = Field(timedelta(seconds=10), gt=timedelta(0))
    """Maximum wait for NATS or Kafka to acknowledge an event."""
    max_concurrent: int = Field(1000, gt=0)
    """Maximum number of concurrent deliveries, including those that wait for a slot."""
    max_per_user: int = Field(250, gt=0)
    """Maximum number of concurrent deliveries of one user's jobs. More are retried later, so that one user's slow
    receivers leave room for others."""
    max_per_destination: int = Field(16, gt=0)
    """Maximum number of concurrent deliveries to one destination: the scheme, host and port of a webhook, a topic, or
    the NATS server."""
    max_waiting_per_destination: int = Field(64, ge=0)
    """Maximum number of deliveries that wait for one destination. More are retried later, so that they do not block
    others."""
    max_progress: int = Field(500, gt=0)
    """Maximum number of concurrent jobs with notifications of progress, including those that still wait for a
    worker."""
    max_progress_per_user: int = Field(125, gt=0)
    """Maximum number of one user's concurrent jobs with notifications of progress. Those of more jobs begin once others
    of the user have ended, up to 100 s later."""
    shutdown_grace: timedelta = timedelta(seconds=10)
    """Time that running deliveries have to finish after SIGTERM."""
    metrics_host: str = "127.0.0.1"
    """Address to serve Prometheus metrics on; loopback unless set."""
    metrics_port: int = Field(9466, ge=0, le=65535)
    """Port to serve Prometheus metrics on; 0 takes a free one and logs it."""
