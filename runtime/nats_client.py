"""How the roles of the suite connect to NATS: with TLS, an NKey and an inbox of their own."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import nkeys
from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport
from nats.errors import Error as NatsError
from pydantic import SecretStr
from pydantic_settings import BaseSettings

from runtime.addresses import servers_of
from runtime.files import Reloaded, want_usable
from runtime.health import Readiness
from runtime.tls import ClientTls, client_context

_log = logging.getLogger(__name__)

DirectHandler = Callable[[str, bytes, Mapping[str, str] | None], Awaitable[None]]
"""Called with the reply subject, the data and the headers of each message. Must neither raise nor wait for the
connection's next message."""

_PING_SECONDS: Final = 5
"""Interval of pings. A connection on which the server does not answer is given up after three of them. By default
nats-py needs six minutes."""
_CLOSE_SECONDS: Final = 1.0
"""Maximum wait for a server to take what is left, before its connection is closed without that."""
_WITHOUT_SEED: Final = "the next connection to NATS will fail"
_USER_SEED: Final = b"SU"
"""The beginning of every NKey seed of a user."""


def connect_options(
    settings: BaseSettings, role: str, prefix: str = "", readiness: Readiness | None = None
) -> dict[str, Any]:
    """Return arguments for nats-py's Client.connect, by the settings `<prefix>url`, `<prefix>tls`, `<prefix>nkey_seed`.

    Replies and deliveries arrive at `_INBOX.<role>.…`, so that permissions can keep a role from reading another's. With
    an empty `role` the inbox is nats-py's own.

    With TLS a connection begins with the handshake, as `handshake_first` of nats-server has it. With a URL of the
    scheme `tls` the server first says that it offers TLS, as nats-server does by default.

    `readiness` names files while they cannot be used.

    Raises OSError when a file cannot be used, and ValueError when TLS is set and the URL's scheme is `ws`.
    """
    url, tls, nkey_seed = (getattr(settings, prefix + name) for name in ("url", "tls", "nkey_seed"))
    name = f"{settings.model_config.get('env_prefix', '')}{prefix}".upper()
    options: dict[str, Any] = {"servers": servers_of(url), "ping_interval": _PING_SECONDS}
    if role:
        options["inbox_prefix"] = f"_INBOX.{role}"
    if tls is not None:
        if _scheme(url) == "ws":
            raise ValueError(f"{name}TLS_CA is set, but {name}URL is in clear: its scheme must be wss")
        options |= {"tls": client_context(tls, readiness), "tls_handshake_first": _scheme(url) not in ("tls", "wss")}
    if nkey_seed is not None:
        _follow_seed(f"{name}NKEY_SEED", nkey_seed, readiness)
        options["nkeys_seed"] = str(nkey_seed)
    return options


def _follow_seed(setting: str, path: Path, readiness: Readiness | None) -> None:
    """Raises OSError for a seed that cannot be used. Names it at `readiness` while it cannot be used later."""
    seed = Reloaded(
        [path], partial(_require_user_seed, setting, path), "NKey seed", _log, OSError, meanwhile=_WITHOUT_SEED
    )
    if readiness is not None:
        want_usable(readiness, setting, seed, _WITHOUT_SEED)


def _require_user_seed(setting: str, path: Path) -> None:
    seed = bytearray(path.read_bytes().strip())
    try:
        if not seed.startswith(_USER_SEED):
            raise nkeys.ErrInvalidSeed
        nkeys.from_seed(seed).wipe()
    except nkeys.NkeysError as error:
        raise OSError(
            f"{setting} {path} holds no NKey seed of a user, which begins with {_USER_SEED.decode()}"
        ) from error


def new_client(url: SecretStr, tls: ClientTls | None) -> "DirectClient":
    """Return a client that is not connected yet. With `tls` or a URL of the scheme `tls` it sends nothing in clear."""
    client = DirectClient()
    if not _is_websocket(url):
        # nats-py has no public way to set a transport. It creates its own where there is none.
        client._transport = _Transport(tls is not None or _scheme(url) == "tls")
    return client


def _scheme(url: SecretStr) -> str:
    return urlsplit(servers_of(url)[0]).scheme


def _is_websocket(url: SecretStr) -> bool:
    return _scheme(url) in ("ws", "wss")


class DirectClient(Client):
    """nats-py's, which reads the NKey seed again for each connection. nats-py's own public key stays the first one.

    It can deliver the messages of a subscription without nats-py's queue and task for each, which cost more than
    everything else that a gateway does with a token.
    """

    def __init__(self) -> None:
        super().__init__()
        self._handlers: dict[int, DirectHandler] = {}

    async def subscribe_directly(self, subject: str, on_message: DirectHandler) -> Subscription:
        """Subscribe with a handler that the connection's reader calls. It gets what arrives after this has returned.

        Raises as Client.subscribe does.
        """
        subscription = await self.subscribe(subject)
        self._handlers[subscription._id] = on_message
        return subscription

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        if (on_message := self._handlers.get(sid)) is None:
            await super()._process_msg(sid, subject, reply, data, headers)
        else:
            await on_message(reply.decode(), data, await self._process_headers(headers) if headers else None)

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        self._handlers.pop(sid, None)
        super()._remove_sub(sid, max_msgs)

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        # nats-py first sends what is left, and waits for ever for a server whose host was lost.
        transport = self._transport
        abort = asyncio.get_running_loop().call_later(
            _CLOSE_SECONDS, transport.abort if isinstance(transport, _Transport) else lambda: None
        )
        try:
            await super()._close(status, do_cbs)
        finally:
            abort.cancel()

    async def _process_connect_init(self) -> None:
        try:
            if self._nkeys_seed is not None:
                self._setup_nkeys_connect()
            await super()._process_connect_init()
        except nkeys.NkeysError as error:
            # Tried again like any failure to connect. nats-py would give up and report nothing.
            raise NatsError(f"{self._nkeys_seed} holds no NKey seed: {error}") from error


class _Transport(TcpTransport):
    """nats-py's, without its plaintext fallback and without waits that never end.

    nats-py sends the password in clear to a server that does not offer TLS, even where the URL's scheme is `tls`. After
    a failed TLS handshake it waits forever for the end of the connection, so the client would neither connect again nor
    close. See https://github.com/nats-io/nats.py/issues/718. It does the same with the connection to a server
    whose host has lost its power, until the system gives the unsent bytes up: after 15 minutes.
    """

    def __init__(self, require_tls: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._require_tls = require_tls
        self._secure = False
        self._failed = False

    def __bool__(self) -> bool:
        """Return True: the client replaces a transport that is not."""
        return True

    async def connect(self, *args: Any, **kwargs: Any) -> None:
        """See Transport."""
        if self._bare_io_writer is not None:
            # The client leaves an earlier connection open when a try fails after the handshake.
            self._bare_io_writer.transport.abort()
        self._secure = self._failed = False
        await super().connect(*args, **kwargs)

    async def connect_tls(self, *args: Any, **kwargs: Any) -> None:
        """See Transport."""
        self._failed = True
        try:
            await super().connect_tls(*args, **kwargs)
        except BaseException:
            self.close()
            raise
        self._secure, self._failed = True, False

    def write(self, payload: bytes) -> None:
        """See Transport. Raises ConnectionError for a server that does not offer the TLS that is asked for."""
        if self._require_tls and not self._secure:
            raise ConnectionError("the NATS server does not offer TLS")
        super().write(payload)  # type: ignore[no-untyped-call]

    def writelines(self, payload: list[bytes]) -> None:
        """See Transport. The client calls it when it is closed, with what it has not sent."""
        if self._secure or not self._require_tls:
            super().writelines(payload)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """See Transport."""
        super().close()  # type: ignore[no-untyped-call]
        if (writer := self._io_writer) is not None:
            asyncio.get_running_loop().call_later(_CLOSE_SECONDS, writer.transport.abort)

    def abort(self) -> None:
        """Close the connection at once. What was not sent is lost."""
        if (writer := self._io_writer) is not None:
            writer.transport.abort()

    async def wait_closed(self) -> None:
        """See Transport."""
        if not self._failed:
            await super().wait_closed()  # type: ignore[no-untyped-call]
