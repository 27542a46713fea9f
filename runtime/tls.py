"""TLS from files that may be replaced while the process runs.

Each new connection is made with the files as they are then; connections that are open stay as they are. Files that
cannot be used, such as a certificate whose key has not been written yet, are logged once and the last good ones are
used on. gRPC servers take their credentials from grpc_server_credentials, all others an SSLContext of the standard
library. The least version is TLS 1.2 everywhere.
"""

import logging
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Generic, Self, TypeVar

import grpc
from pydantic import FilePath, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

_log = logging.getLogger(__name__)
T = TypeVar("T")

_NO_PASSWORD: Final = ""
"""For private keys: OpenSSL asks the terminal for the password of an encrypted one unless there is some."""


@dataclass(frozen=True)
class ServerTls:
    """The files of a server's TLS, all in PEM."""

    cert: Path
    """The certificate, and after it those that lead to its CA's."""
    key: Path
    """The certificate's private key, not encrypted."""
    client_ca: Path | None = None
    """The CAs one of which a client's certificate must be of. None: clients need no certificate."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files."""
        return _set(self.cert, self.key, self.client_ca)


@dataclass(frozen=True)
class ClientTls:
    """The files of a client's TLS, all in PEM."""

    ca: Path
    """The CAs one of which the server's certificate must be of."""
    cert: Path | None = None
    """The client's own certificate. None: it has none."""
    key: Path | None = None
    """The certificate's private key, not encrypted."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files."""
        return _set(self.ca, self.cert, self.key)


def _set(*paths: Path | None) -> tuple[Path, ...]:
    return tuple(path for path in paths if path is not None)


class ServerTlsSettings(BaseSettings):
    """The TLS of a service's listener: a part of the service's settings."""

    model_config = SettingsConfigDict(frozen=True, use_attribute_docstrings=True)

    tls_cert: FilePath | None = None
    """The certificate to serve TLS with, and those that lead to its CA's: a PEM file, read again when it changes.
    Unset: no TLS."""
    tls_key: FilePath | None = None
    """The private key of the certificate: a PEM file, not encrypted."""
    tls_client_ca: FilePath | None = None
    """CAs as a PEM file. If set, clients must have a certificate of one of them."""

    @property
    def tls(self) -> ServerTls | None:
        """The files. None: no TLS."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return ServerTls(self.tls_cert, self.tls_key, self.tls_client_ca)

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        _require_whole(self, "tls_")
        return self


class MetricsTlsSettings(BaseSettings):
    """The TLS of the listener for metrics and health: a part of the service's settings."""

    model_config = SettingsConfigDict(frozen=True, use_attribute_docstrings=True)

    metrics_tls_cert: FilePath | None = None
    """The certificate to serve metrics and health with, by HTTPS: a PEM file, read again when it changes.
    Unset: HTTP."""
    metrics_tls_key: FilePath | None = None
    """The private key of the certificate for metrics: a PEM file, not encrypted."""
    metrics_tls_client_ca: FilePath | None = None
    """CAs as a PEM file. If set, who reads metrics or health must have a certificate of one of them."""

    @property
    def metrics_tls(self) -> ServerTls | None:
        """The files. None: no TLS."""
        if self.metrics_tls_cert is None or self.metrics_tls_key is None:
            return None
        return ServerTls(self.metrics_tls_cert, self.metrics_tls_key, self.metrics_tls_client_ca)

    @model_validator(mode="after")
    def _metrics_tls_is_whole(self) -> Self:
        _require_whole(self, "metrics_tls_")
        return self


def _require_whole(settings: BaseSettings, prefix: str) -> None:
    """Raise ValueError when only a part of a listener's TLS is set: without TLS it would be open by mistake."""
    cert, key, client_ca = (getattr(settings, prefix + name) for name in ("cert", "key", "client_ca"))
    if (cert is None) != (key is None) or (client_ca is not None and cert is None):
        name = f"{settings.model_config.get('env_prefix', '')}{prefix}".upper()
        raise ValueError(f"{name}CERT and {name}KEY must be set together, and both with {name}CLIENT_CA")


def client_tls(settings: BaseSettings, prefix: str = "") -> ClientTls | None:
    """Return the files of the settings `<prefix>tls_ca`, `<prefix>tls_cert` and `<prefix>tls_key`; None without a CA.

    Raises ValueError when only a part is set: what should go by TLS would go in clear.
    """
    ca, cert, key = (getattr(settings, f"{prefix}tls_{name}") for name in ("ca", "cert", "key"))
    if (cert is None) != (key is None) or (cert is not None and ca is None):
        name = f"{settings.model_config.get('env_prefix', '')}{prefix}tls_".upper()
        raise ValueError(f"{name}CERT and {name}KEY must be set together, and {name}CA with them")
    return ClientTls(ca, cert, key) if ca is not None else None


def grpc_server_credentials(files: ServerTls) -> grpc.ServerCredentials:
    """Return a gRPC server's credentials. Raises OSError when the files cannot be used (ssl.SSLError is one)."""
    loaded = _Reloaded(files.paths, partial(_grpc_certificate, files))
    used = loaded.current()

    def fetch() -> grpc.ServerCertificateConfiguration:
        """Return the certificate for a new connection; None if it is that of the connection before."""
        nonlocal used
        before, used = used, loaded.current()
        # The type information lacks the None, which spares gRPC reading the certificate for each connection.
        return used if used is not before else None  # type: ignore[return-value]

    # gRPC for Python knows no certificates that clients may have and need not.
    return grpc.dynamic_ssl_server_credentials(used, fetch, require_client_authentication=files.client_ca is not None)


def server_context(files: ServerTls) -> ssl.SSLContext:
    """Return the context of an HTTP server. Raises OSError when the files cannot be used (ssl.SSLError is one)."""
    return _ReloadingContext(ssl.PROTOCOL_TLS_SERVER, _Reloaded(files.paths, partial(_server_context, files)))


def client_context(files: ClientTls) -> ssl.SSLContext:
    """Return the context of a client. Raises OSError when the files cannot be used (ssl.SSLError is one)."""
    return _ReloadingContext(ssl.PROTOCOL_TLS_CLIENT, _Reloaded(files.paths, partial(_client_context, files)))


class FileStamps:
    """Tells whether files have been replaced or written."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._seen = self._stamps()

    def changed(self) -> bool:
        """Return whether they are others than at the last call, or at first."""
        before, self._seen = self._seen, self._stamps()
        return before != self._seen

    def _stamps(self) -> list[tuple[int, ...] | None]:
        return [_stamp(path) for path in self._paths]


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


class _Reloaded(Generic[T]):
    """What files hold, loaded again once they have changed. For any thread."""

    def __init__(self, paths: Sequence[Path], load: Callable[[], T]) -> None:
        """Load for the first time. Raises OSError, which names the files, when `load` does."""
        self._names, self._load = ", ".join(map(str, paths)), load
        # Before they are read: what changes meanwhile is read again.
        self._stamps = FileStamps(paths)
        try:
            self._loaded = load()
        except OSError as error:
            raise OSError(f"TLS files cannot be used: {self._names}: {error}") from error
        self._lock = threading.Lock()

    def current(self) -> T:
        """Return what the files hold, or held when they could last be used."""
        with self._lock:
            if self._stamps.changed():
                try:
                    self._loaded = self._load()
                    _log.info("changed TLS files are in use: %s", self._names)
                except OSError as error:
                    _log.error("changed TLS files cannot be used, the last good ones stay: %s: %s", self._names, error)
            return self._loaded


class _ReloadingContext(ssl.SSLContext):
    """Makes each connection with the context that the files make then."""

    def __init__(self, _protocol: int, loaded: _Reloaded[ssl.SSLContext]) -> None:
        self._loaded = loaded

    def wrap_socket(self, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        """See ssl.SSLContext."""
        return self._loaded.current().wrap_socket(*args, **kwargs)

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        """See ssl.SSLContext."""
        return self._loaded.current().wrap_bio(*args, **kwargs)


def _server_context(files: ServerTls) -> ssl.SSLContext:
    context = _context(ssl.PROTOCOL_TLS_SERVER, files.client_ca, files.cert, files.key)
    context.set_alpn_protocols(["http/1.1"])
    if files.client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _client_context(files: ClientTls) -> ssl.SSLContext:
    return _context(ssl.PROTOCOL_TLS_CLIENT, files.ca, files.cert, files.key)


def _context(protocol: int, ca: Path | None, cert: Path | None, key: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca is not None:
        context.load_verify_locations(ca)
    if cert is not None:
        # Raises for a key that is not the certificate's.
        context.load_cert_chain(cert, key, password=_NO_PASSWORD)
    return context


def _grpc_certificate(files: ServerTls) -> grpc.ServerCertificateConfiguration:
    # For what it raises: gRPC says no more than that it failed.
    _server_context(files)
    roots = files.client_ca.read_bytes() if files.client_ca is not None else None
    pair = files.key.read_bytes(), files.cert.read_bytes()
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=roots)
