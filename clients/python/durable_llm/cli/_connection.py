"""From the settings in force to a client."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from durable_llm.cli._exits import CommandError
from durable_llm.cli._profiles import Profiles, config_path, settings_of, warn_if_others_may_read

if TYPE_CHECKING:
    from durable_llm import Client

DEFAULT_ADDRESS = "127.0.0.1:50051"
_LOOPBACK = ("127.", "localhost:", "[::1]:", "unix:")


@dataclass(frozen=True)
class Connection:
    """Where and as whom a command calls, and the defaults of jobs."""

    settings: dict[str, str]

    @classmethod
    def read(cls, flags: dict[str, str | None], profile: str) -> "Connection":
        """Return the connection that flags, the environment and a profile describe. Raises CommandError."""
        profiles = Profiles(config_path())
        return cls(settings_of(flags, profiles.named.get(profiles.chosen(profile), {})))

    @property
    def address(self) -> str:
        """host:port of the gateway."""
        return self.settings.get("address", DEFAULT_ADDRESS)

    def connect(self) -> "Client":
        """Return a client. Raises CommandError for a file that cannot be used."""
        # gRPC's own log lines say less than its errors.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        import grpc

        from durable_llm import Client

        key = self._api_key()
        files = {
            name: _read_pem(name, self.settings[name])
            for name in ("tls_ca", "tls_cert", "tls_key")
            if name in self.settings
        }
        if ("tls_cert" in files) != ("tls_key" in files):
            raise CommandError("a client certificate needs both tls_cert and tls_key")
        # A key does not cross a network in clear by accident.
        by_default = bool(files) or (bool(key) and not self.address.startswith(_LOOPBACK))
        tls = {"true": True, "false": False}.get(self.settings.get("tls", ""), by_default)
        if files and not tls:
            raise CommandError("tls is false, and a tls_ file is set: leave one of them out")
        credentials = None
        if tls:
            credentials = grpc.ssl_channel_credentials(files.get("tls_ca"), files.get("tls_key"), files.get("tls_cert"))
        metadata = {"authorization": f"Bearer {key}"} if key else {}
        try:
            return Client(self.address, credentials=credentials, metadata=metadata)
        except ValueError as error:
            raise CommandError(f"--address or DURABLE_LLM_ADDRESS: {error}") from error

    def _api_key(self) -> str:
        key = self.settings.get("api_key", "")
        if path := self.settings.get("api_key_file"):
            key = _read("api_key_file", path).decode(errors="replace")
            warn_if_others_may_read(Path(path))
        key = key.strip()
        if not (key.isascii() and key.isprintable()):
            raise CommandError("the API key holds a character that no key has: is it another file?")
        return key


def _read(setting: str, path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise CommandError(f"{setting}: {path} cannot be read: {error.strerror}") from error


def _read_pem(setting: str, path: str) -> bytes:
    content = _read(setting, path)
    if b"-----BEGIN " not in content:
        raise CommandError(f"{setting}: {path} holds nothing in PEM")
    return content
