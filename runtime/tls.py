"""TLS from files that may be replaced while the process runs.

Each new connection uses the files as they are at that moment. Open connections keep what they began with. Files that
cannot be used, such as a certificate whose key has not been written yet, are logged once, and the last usable ones stay
in use. gRPC servers get grpc_server_credentials, everything else an SSLContext of the standard library. The minimum
version is TLS 1.2.
"""

import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import grpc
from pydantic import model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from runtime.files import ReadableFile, Reloaded, want_usable
from runtime.health import Readiness

_log = logging.getLogger(__name__)
T = TypeVar("T")
F = TypeVar("F", "ServerTls", "ClientTls")

_NO_PASSWORD: Final = ""
"""The password of private keys. Without one OpenSSL asks the terminal for that of an encrypted key."""


@dataclass(frozen=True)
class ServerTls:
    """The files of a server's TLS, in PEM."""

    settings: str
    """The prefix of the settings that name the files, for messages: "GATEWAY_TLS_"."""
    cert: Path
    """The certificate, followed by the intermediate ones."""
    key: Path
    """The private key of the certificate, not encrypted."""
    client_ca: Path | None = None
    """The CAs that may have issued the certificate of a client. None: clients need no certificate."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files."""
        return _without_none(self.cert, self.key, self.client_ca)


@dataclass(frozen=True)
class ClientTls:
    """The files of a client's TLS, in PEM."""

    settings: str
    """The prefix of the settings that name the files, for messages: "FEED_TLS_"."""
    ca: Path
    """The CAs that may have issued the certificate of the server."""
    cert: Path | None = None
    """The client's own certificate. None: it has none."""
    key: Path | None = None
    """The private key of the certificate, not encrypted."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files."""
        return _without_none(self.ca, self.cert, self.key)


def _without_none(*paths: Path | None) -> tuple[Path, ...]:
    return tuple(path for path in paths if path is not None)


class ServerTlsSettings(BaseSettings):
    """The TLS of a service's listener, to be inherited by the service's settings."""

    model_config = SettingsConfigDict(frozen=True, use_attribute_docstrings=True)

    tls_cert: ReadableFile | None = None
    """PEM file of the certificate to serve TLS with, followed by the intermediate ones. It is read again when it
    changes. Unset: no TLS."""
    tls_key: ReadableFile | None = None
    """PEM file of the certificate's private key, not encrypted."""
    tls_client_ca: ReadableFile | None = None
    """PEM file of the CAs that may have issued the certificates of clients. If set, clients need a certificate."""

    @property
    def tls(self) -> ServerTls | None:
        """The files. None: no TLS."""
        return _server_tls(self, "tls_")

    @model_validator(mode="after")
    def _tls_can_be_used(self) -> Self:
        _require_usable(self.tls, _server_context)
        return self


class MetricsTlsSettings(BaseSettings):
    """The TLS of the listener for metrics and health, to be inherited by the service's settings."""

    model_config = SettingsConfigDict(frozen=True, use_attribute_docstrings=True)

    metrics_tls_cert: ReadableFile | None = None
    """PEM file of the certificate to serve metrics and health with, by HTTPS. It is read again when it changes. Unset:
    HTTP."""
    metrics_tls_key: ReadableFile | None = None
    """PEM file of the private key of the certificate for metrics and health, not encrypted."""
    metrics_tls_client_ca: ReadableFile | None = None
    """PEM file of the CAs that may have issued the certificates of clients that read metrics or health. If set, such
    clients need a certificate."""

    @property
    def metrics_tls(self) -> ServerTls | None:
        """The files. None: no TLS."""
        return _server_tls(self, "metrics_tls_")

    @model_validator(mode="after")
    def _metrics_tls_can_be_used(self) -> Self:
        _require_usable(self.metrics_tls, _server_context)
        return self


def _server_tls(settings: BaseSettings, prefix: str) -> ServerTls | None:
    """Return the files of a listener. Raises ValueError when only a part is set: it would silently serve in clear."""
    cert, key, client_ca = (getattr(settings, prefix + name) for name in ("cert", "key", "client_ca"))
    name = f"{settings.model_config.get('env_prefix', '')}{prefix}".upper()
    if (cert is None) != (key is None) or (client_ca is not None and cert is None):
        raise ValueError(f"{name}CERT and {name}KEY must be set together, and both with {name}CLIENT_CA")
    return ServerTls(name, cert, key, client_ca) if cert is not None else None


def client_tls(settings: BaseSettings, prefix: str = "") -> ClientTls | None:
    """Return the files of the settings `<prefix>tls_ca`, `<prefix>tls_cert` and `<prefix>tls_key`; None without a CA.

    Raises ValueError when only a part is set, because the connection would be in clear, or when they cannot be used.
    """
    ca, cert, key = (getattr(settings, f"{prefix}tls_{name}") for name in ("ca", "cert", "key"))
    name = f"{settings.model_config.get('env_prefix', '')}{prefix}tls_".upper()
    if (cert is None) != (key is None) or (cert is not None and ca is None):
        raise ValueError(f"{name}CERT and {name}KEY must be set together, and {name}CA with them")
    files = ClientTls(name, ca, cert, key) if ca is not None else None
    _require_usable(files, _client_context)
    return files


def _require_usable(files: T | None, load: Callable[[T], object]) -> None:
    try:
        if files is not None:
            load(files)
    except OSError as error:
        # Settings report a ValueError as theirs.
        raise ValueError(str(error)) from error


def grpc_server_credentials(files: ServerTls, readiness: Readiness | None = None) -> grpc.ServerCredentials:
    """Return the credentials of a gRPC server. Raises OSError when the files cannot be used.

    `readiness` names the files while they cannot be used.
    """
    loaded = _reloaded(files, _grpc_certificate, readiness)
    used = loaded.current()

    def fetch() -> grpc.ServerCertificateConfiguration:
        """Return the certificate for a new connection, or None if it is that of the connection before."""
        nonlocal used
        before, used = used, loaded.current()
        # The type information lacks the None, which spares gRPC parsing the certificate for each connection.
        return used if used is not before else None  # type: ignore[return-value]

    # In gRPC for Python a client certificate is either required or not asked for.
    return grpc.dynamic_ssl_server_credentials(used, fetch, require_client_authentication=files.client_ca is not None)


def _reloaded(files: F, load: Callable[[F], T], readiness: Readiness | None = None) -> Reloaded[T]:
    loaded = Reloaded(files.paths, partial(load, files), "TLS files", _log, OSError)
    if readiness is not None:
        want_usable(readiness, f"{files.settings}…", loaded)
    return loaded


def server_context(files: ServerTls, readiness: Readiness) -> ssl.SSLContext:
    """Return the context of an HTTP server. Raises OSError when the files cannot be used.

    `readiness` names the files while they cannot be used.
    """
    return _ReloadingContext(ssl.PROTOCOL_TLS_SERVER, _reloaded(files, _server_context, readiness))


def client_context(files: ClientTls, readiness: Readiness | None = None) -> ssl.SSLContext:
    """Return the context of a client. Raises OSError when the files cannot be used.

    `readiness` names the files while they cannot be used.
    """
    return _ReloadingContext(ssl.PROTOCOL_TLS_CLIENT, _reloaded(files, _client_context, readiness))


class _ReloadingContext(ssl.SSLContext):
    """Makes each connection with the context of the files as they are then."""

    def __init__(self, _protocol: int, loaded: Reloaded[ssl.SSLContext]) -> None:
        self._loaded = loaded

    def wrap_socket(self, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        """See ssl.SSLContext."""
        return self._loaded.current().wrap_socket(*args, **kwargs)

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        """See ssl.SSLContext."""
        return self._loaded.current().wrap_bio(*args, **kwargs)


def _server_context(files: ServerTls) -> ssl.SSLContext:
    context = _new_context(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    _load_pair(context, files.settings, files.cert, files.key)
    if files.client_ca is not None:
        _load_ca(context, f"{files.settings}CLIENT_CA", files.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _client_context(files: ClientTls) -> ssl.SSLContext:
    context = _new_context(ssl.PROTOCOL_TLS_CLIENT)
    _load_ca(context, f"{files.settings}CA", files.ca)
    if files.cert is not None and files.key is not None:
        _load_pair(context, files.settings, files.cert, files.key)
    return context


def _new_context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _load_ca(context: ssl.SSLContext, setting: str, path: Path) -> None:
    try:
        context.load_verify_locations(path)
    except OSError as error:  # ssl.SSLError is one
        raise OSError(f"{setting} {path} cannot be used: {error}") from error


def _load_pair(context: ssl.SSLContext, settings: str, cert: Path, key: Path) -> None:
    try:
        # Raises for a key of another certificate.
        context.load_cert_chain(cert, key, password=_NO_PASSWORD)
    except OSError as error:
        raise OSError(f"{settings}CERT {cert} with {settings}KEY {key} cannot be used: {error}") from error


def _grpc_certificate(files: ServerTls) -> grpc.ServerCertificateConfiguration:
    pem = [path.read_bytes() for path in files.paths]
    # gRPC itself checks them when a connection needs them, and reports no reason.
    _server_context(files)
    if pem != [path.read_bytes() for path in files.paths]:
        raise OSError(f"files of {files.settings}… have changed while they were read")
    cert, key, *client_ca = pem
    return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca[0] if client_ca else None)
