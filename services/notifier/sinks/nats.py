"""Events on a subject of NATS JetStream. Apart from the modules of the feed and of runtime, only this one imports nats.

An event is delivered once JetStream has acknowledged it: it is in a stream, which the operator has created. JetStream
drops repeats by Nats-Msg-Id within the stream's duplicate window.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Mapping
from functools import partial
from typing import Final

from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.errors import NoServersError
from nats.js.api import Header
from nats.js.errors import APIError, NoStreamResponseError
from pydantic import SecretStr

from jobs.errors import DeliveryFailed, DeliveryRefused
from llm_pb import llm_pb2
from runtime.health import Readiness
from runtime.nats_client import connect_options, new_client
from runtime.telemetry import current_headers
from services.notifier.event import CloudEvent
from services.notifier.settings import NotifierSettings
from services.notifier.sinks.sink import CONTENT_TYPE, Answer

_log = logging.getLogger(__name__)
_ROLE: Final = "notifier"
"""The name of the inbox at NATS."""
_RETRY_SECONDS: Final = 1
_CONNECT_SECONDS: Final = 5

_OVER_STREAMS_LIMIT: Final = 10054
"""JetStream's error code for a message that is over the stream's max_msg_size."""


class NatsSink:
    """A Sink for NotifyTarget.nats. It connects with the first delivery, and again whenever the connection is lost."""

    def __init__(self, settings: NotifierSettings, readiness: Readiness | None = None) -> None:
        """`settings.nats_url` must be set. Raises OSError or ValueError where TLS or the NKey cannot be
        used."""
        self._url = settings.nats_url or SecretStr("")
        self._tls = settings.nats_tls
        self._new_options = partial(connect_options, settings, _ROLE, "nats_", readiness)
        self._new_options()
        self._prefix = settings.nats_subject_prefix
        self._timeout = settings.broker_timeout.total_seconds()
        self._connecting: asyncio.Task[Client] | None = None

    def destination(self, target: llm_pb2.NotifyTarget) -> str:
        """See Sink. It is the server, because all its subjects are equally fast."""
        return "nats"

    async def deliver(self, target: llm_pb2.NotifyTarget, event: CloudEvent, user_id: str, tenant: str = "") -> Answer:
        """Publish the event in structured mode, and wait until JetStream has it."""
        subject = f"{self._prefix}.{target.nats.subject}"
        body = json.dumps(event, ensure_ascii=False).encode()
        headers = {"content-type": CONTENT_TYPE, Header.MSG_ID.value: event["id"], **current_headers()}
        try:
            async with asyncio.timeout(self._timeout):
                client = await self._connected()
                if len(body) + _header_bytes(headers) > client.max_payload:
                    raise _too_large(body)
                await client.jetstream(timeout=self._timeout).publish(subject, body, headers=headers)
        except APIError as error:
            if error.err_code == _OVER_STREAMS_LIMIT:
                raise _too_large(body) from error
            raise DeliveryFailed(f"JetStream did not accept the event: {error.description}") from error
        except NoStreamResponseError as error:
            raise DeliveryFailed(f"no JetStream stream matches the subject {subject}") from error
        except TimeoutError as error:
            raise DeliveryFailed(f"NATS did not acknowledge the event within {self._timeout:g} s") from error
        except (NoServersError, OSError) as error:
            raise DeliveryFailed("NATS cannot be reached") from error
        except NatsError as error:
            raise DeliveryFailed(f"NATS did not acknowledge the event: {error}") from error
        return Answer()

    async def close(self) -> None:
        """See Sink."""
        if self._connecting is not None:
            self._connecting.cancel()
            with contextlib.suppress(asyncio.CancelledError, NatsError, OSError):
                await (await self._connecting).close()

    async def _connected(self) -> Client:
        """Return the shared client, which reconnects by itself after its first connection."""
        if self._connecting is None or _is_over(self._connecting):
            self._connecting = asyncio.create_task(self._connect())
        # The connection is shared, so a delivery that is cancelled must not cancel it.
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> Client:
        client = new_client(self._url, self._tls)
        try:
            await client.connect(
                connect_timeout=_CONNECT_SECONDS,
                max_reconnect_attempts=-1,
                reconnect_time_wait=_RETRY_SECONDS,
                error_cb=_log_error,
                **self._new_options(),
            )
        except BaseException:
            # nats-py leaves the socket of a server that has not answered open.
            await client.close()
            raise
        return client


def _header_bytes(headers: Mapping[str, str]) -> int:
    """Return the size of headers on the wire. The server closes the connection of a client that sends too much."""
    return len("NATS/1.0\r\n\r\n") + sum(len(f"{name}: {value}\r\n".encode()) for name, value in headers.items())


def _too_large(body: bytes) -> DeliveryRefused:
    return DeliveryRefused(f"the event of {len(body)} bytes is larger than NATS accepts")


async def _log_error(error: Exception) -> None:
    _log.info("NATS: %r", error)


def _is_over(connecting: "asyncio.Task[Client]") -> bool:
    """Return whether connecting failed, or the server ended the connection, after which nats-py closes the client for
    good."""
    return connecting.done() and (
        connecting.cancelled() or connecting.exception() is not None or connecting.result().is_closed
    )
