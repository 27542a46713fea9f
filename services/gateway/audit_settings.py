"""The settings of the audit log."""

from typing import Final, Self
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from feed.nats_settings import checked_nats_url, checked_stream_name
from runtime.files import ReadableFile
from runtime.tls import ClientTls, client_tls

_SCHEME: Final = "://"
"""Part of the URL of a broker and of no sensible path."""


class AuditSettings(BaseSettings):
    """Where the audit log is, to be inherited by the service's settings."""

    model_config = SettingsConfigDict(frozen=True, use_attribute_docstrings=True)

    audit: SecretStr | None = Field(None, min_length=1)
    """Where an audit record of each call goes: a file's path, or `nats://host:4222/STREAM` for a JetStream stream. Each
    gateway needs a file of its own. Unset: nowhere."""
    audit_tls_ca: ReadableFile | None = None
    """PEM file of the CAs that may have issued the certificate of the audit log's NATS server. If set, the connection
    begins with the TLS handshake, as for FEED_TLS_CA."""
    audit_tls_cert: ReadableFile | None = None
    """PEM file of the certificate to present to the audit log's NATS server."""
    audit_tls_key: ReadableFile | None = None
    """PEM file of the private key of GATEWAY_AUDIT_TLS_CERT, not encrypted."""
    audit_nkey_seed: ReadableFile | None = None
    """File of the NKey seed with which the process authenticates to the audit log's NATS server."""

    @property
    def audit_tls(self) -> ClientTls | None:
        """The files of TLS. None: no CA is set."""
        return client_tls(self, "audit_")

    @property
    def audit_url(self) -> SecretStr:
        """The URL of the broker, without the name of the stream. Empty: the log is no stream."""
        url = self._audit_place
        return SecretStr(urlunsplit(urlsplit(url)._replace(path="")) if _SCHEME in url else "")

    @property
    def audit_stream(self) -> str:
        """The name of the JetStream stream. Empty: the log is no stream."""
        url = self._audit_place
        return urlsplit(url).path.removeprefix("/") if _SCHEME in url else ""

    @property
    def _audit_place(self) -> str:
        return self.audit.get_secret_value() if self.audit is not None else ""

    @model_validator(mode="after")
    def _audit_is_usable(self) -> Self:
        client_tls(self, "audit_")
        if _SCHEME in self._audit_place:
            try:
                checked_nats_url(self.audit_url)
                checked_stream_name(self.audit_stream)
            except ValueError as error:
                raise ValueError(f"audit must name a server and a stream, nats://host:4222/STREAM: {error}") from None
        return self
