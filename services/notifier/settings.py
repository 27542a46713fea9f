"""Settings of the notifier."""

import base64
import binascii
from datetime import timedelta
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FilePath, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from jobs import names
from runtime.tls import ClientTls, MetricsTlsSettings, client_tls

_PREFIX = "whsec_"


def _usable(secret: SecretStr) -> SecretStr:
    """Refuse a secret that Standard Webhooks does not allow. Raises ValueError, without the secret in it."""
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
    """What holds for the jobs of one user."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: SecretStr | None = None
    """Where the events of jobs go that name no target."""
    secrets: tuple[SigningSecret, ...] = ()
    """What all webhooks of the user's jobs are signed with."""


class NotifierSettings(MetricsTlsSettings):
    """The notifier: tells the outside world how jobs ended."""

    model_config = SettingsConfigDict(
        env_prefix="NOTIFIER_", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True
    )

    task_queue: str = Field(names.NOTIFY_QUEUE, min_length=1, max_length=names.MAX_NOTIFY_QUEUE)
    """The queue to take deliveries from."""
    default_webhook_url: SecretStr | None = None
    """Where outcomes of jobs go that name no target. Unset: nowhere."""
    webhook_secrets: tuple[SigningSecret, ...] = ()
    """What webhooks are signed with, as JSON: whsec_ and base64 each; several while one replaces another."""
    users: dict[str, UserEndpoint] = Field(default_factory=dict)
    """Users with an endpoint of their own, as JSON by user id: url, for jobs that name no target, and secrets."""
    event_source: str = "/llm.v1/jobs"
    """The CloudEvents source of every event."""
    job_url: str = ""
    """A page or API address of a job, with {workflow_id} in it: the link in every event. Unset: none."""
    webhook_timeout: timedelta = Field(timedelta(seconds=30), gt=timedelta(0))
    """Longest attempt of a webhook, from looking its name up to its answer."""
    webhook_schemes: tuple[str, ...] = ("https",)
    """What the URL of a webhook may begin with, as JSON: https, http."""
    webhook_ports: tuple[int, ...] = (443,)
    """The ports that webhooks may go to, as JSON. Empty: any."""
    webhook_networks: tuple[IPv4Network | IPv6Network, ...] = ()
    """Networks that webhooks may go to although they are not public, as JSON; the local stack allows loopback."""
    dns_servers: tuple[str, ...] = ()
    """The name servers to ask where webhooks lead, as JSON: addresses, or address:port. Empty: the system's."""
    webhook_proxy: SecretStr | None = None
    """The HTTP proxy that webhooks go through. It looks names up itself, so it must refuse private addresses."""
    nats_url: SecretStr | None = None
    """The NATS server for targets of the kind nats; may hold a user and password. Unset: they are refused."""
    nats_tls_ca: FilePath | None = None
    """CAs as a PEM file: the NATS server must have a certificate of one of them. It must speak TLS from the first byte
    (handshake_first). Unset: the connection is in clear, unless the server asks for TLS."""
    nats_tls_cert: FilePath | None = None
    """A certificate to show to the NATS server: a PEM file."""
    nats_tls_key: FilePath | None = None
    """The private key of the certificate: a PEM file, not encrypted."""
    nats_nkey_seed: FilePath | None = None
    """A file with the seed of an NKey, by which the NATS server knows this process."""
    nats_subject_prefix: str = "llm.events"
    """What comes before the subjects that jobs name, and a dot."""
    kafka_servers: str | None = None
    """The Kafka brokers for targets of the kind kafka: host:port, separated by commas. Unset: they are refused."""
    kafka_topics: tuple[str, ...] = ()
    """The topics that jobs may name, as JSON."""
    kafka_tls: bool = False
    """Whether to speak TLS with the brokers."""
    kafka_user: str | None = None
    """The user at the brokers, by SASL SCRAM-SHA-512. Unset: none."""
    kafka_password: SecretStr | None = None
    """The user's password."""
    broker_timeout: timedelta = Field(timedelta(seconds=10), gt=timedelta(0))
    """Longest wait for NATS or Kafka to acknowledge an event."""
    max_concurrent: int = Field(1000, gt=0)
    """Deliveries at once, those that wait for their turn included."""
    max_per_user: int = Field(250, gt=0)
    """Deliveries at once of one user's jobs; more are put off, so that slow receivers of one leave room for others."""
    max_per_destination: int = Field(16, gt=0)
    """Deliveries at once to one destination: scheme, host and port of a webhook, a topic, the NATS server."""
    max_waiting_per_destination: int = Field(64, ge=0)
    """Deliveries that wait for their turn at one destination; more are put off, so that they do not block others."""
    max_progress: int = Field(500, gt=0)
    """Jobs at once whose progress is told, those that still wait for a worker included."""
    max_progress_per_user: int = Field(125, gt=0)
    """Of one user; the progress of more is told once others of the user's have ended, up to 100 s later."""
    shutdown_grace: timedelta = timedelta(seconds=10)
    """What running deliveries get on SIGTERM."""
    metrics_host: str = "127.0.0.1"
    """Address to serve Prometheus metrics on; loopback unless set."""
    metrics_port: int = Field(9466, ge=0, le=65535)
    """Port to serve Prometheus metrics on; 0 takes a free one and logs it."""

    @property
    def nats_tls(self) -> ClientTls | None:
        """The files of TLS with NATS. None: no CA is set."""
        return client_tls(self, "nats_")

    @model_validator(mode="after")
    def _nats_tls_is_whole(self) -> Self:
        client_tls(self, "nats_")
        return self
