"""How the roles of the suite connect to NATS: by TLS, with an NKey, each with its own inbox."""

from pathlib import Path
from typing import Any, Final

from nats.aio.client import Client
from nats.aio.transport import TcpTransport
from pydantic import SecretStr

from runtime.tls import ClientTls, client_context

_USERS_SEED: Final = "SU"
"""What the NKey seed of a user begins with."""


def connect_options(url: SecretStr, role: str, tls: ClientTls | None, nkey_seed: Path | None) -> dict[str, Any]:
    """Return arguments for nats-py's Client.connect.

    Answers and deliveries come to `_INBOX.<role>.…`, so that permissions can keep a role from reading another's. An
    empty `role` has nats-py's own inbox.

    With `tls` a connection begins with the handshake, as `handshake_first` of nats-server has it. NATS by default sends
    a line in clear before, in which whoever is between can say that the server knows no TLS.

    Raises OSError when a file cannot be used, ValueError when `nkey_seed` holds no seed of a user.
    """
    options: dict[str, Any] = {"servers": url.get_secret_value()}
    if role:
        options["inbox_prefix"] = f"_INBOX.{role}"
    if tls is not None:
        options |= {"tls": client_context(tls), "tls_handshake_first": not _is_websocket(url)}
    if nkey_seed is not None:
        if not nkey_seed.read_text().strip().startswith(_USERS_SEED):
            raise ValueError(f"{nkey_seed} holds no NKey seed of a user, which begins with {_USERS_SEED}")
        options["nkeys_seed"] = str(nkey_seed)
    return options


def new_client(url: SecretStr) -> Client:
    """Return a client for a server that is not connected, and goes on after a TLS handshake that fails."""
    client = Client()
    if not _is_websocket(url):
        # There is no public way: nats-py makes its own where there is none.
        client._transport = _Transport()  # type: ignore[no-untyped-call]
    return client


def _is_websocket(url: SecretStr) -> bool:
    return url.get_secret_value().startswith(("ws:", "wss:"))


class _Transport(TcpTransport):
    """nats-py's, without a wait that never ends: that for the end of a connection whose TLS handshake has failed.

    The client would neither connect again nor close. See https://github.com/nats-io/nats.py/issues/718.
    """

    _failed = False

    def __bool__(self) -> bool:
        """Return True: the client replaces one that is not."""
        return True

    async def connect(self, *args: Any, **kwargs: Any) -> None:
        """See Transport."""
        if self._bare_io_writer is not None:
            # That of an earlier connection, which the client leaves open when a try fails after the handshake.
            self._bare_io_writer.transport.abort()
        self._failed = False
        await super().connect(*args, **kwargs)

    async def connect_tls(self, *args: Any, **kwargs: Any) -> None:
        """See Transport."""
        self._failed = True
        try:
            await super().connect_tls(*args, **kwargs)
        except BaseException:
            self.close()
            raise
        self._failed = False

    def close(self) -> None:
        """See Transport."""
        super().close()  # type: ignore[no-untyped-call]

    async def wait_closed(self) -> None:
        """See Transport."""
        if not self._failed:
            await super().wait_closed()  # type: ignore[no-untyped-call]
