"""The audit log in a JetStream stream that refuses to delete messages."""

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Sequence
from datetime import timedelta
from typing import Final

from nats.errors import Error as NatsError
from nats.js.api import DiscardPolicy, StorageType, StreamConfig
from nats.js.errors import BadRequestError, NoStreamResponseError
from pydantic_settings import BaseSettings

from runtime.audit import AuditUnavailable
from runtime.health import Readiness
from runtime.nats_client import connect_options, new_client

_log = logging.getLogger(__name__)
_RETRY_SECONDS: Final = 1
_TIMEOUT: Final = timedelta(seconds=2)
_SUBJECT: Final = "llm.audit"
_OTHER_CONFIG: Final = 10058
"""JetStream's error for a stream that exists with other settings."""


class AuditStream:
    """An AuditStore in a JetStream stream, which it creates when there is none: it denies deletes and purges.

    A full stream takes no more records; it drops none. A message is stored as soon as the broker has acknowledged it,
    and on its disk when the broker syncs that (every two minutes, unless its `sync_interval` is `always`).
    """

    def __init__(self, settings: BaseSettings, role: str, stream: str, readiness: Readiness | None = None) -> None:
        """Connect by the settings `audit_url`, `audit_tls` and `audit_nkey_seed`, as connect_options() has it.

        `readiness` names the files while they cannot be used.

        Raises OSError and ValueError like connect_options().
        """
        self._stream = stream
        self._subject = f"{_SUBJECT}.{self._stream}"
        self._options = connect_options(settings, role, "audit_", readiness)
        self._client = new_client(*(getattr(settings, name) for name in ("audit_url", "audit_tls")))
        self._jetstream = self._client.jetstream(timeout=_TIMEOUT.total_seconds())
        self._problem = "the broker cannot be reached"
        self._ready = self._begin(self._connect())

    async def write(self, records: Sequence[bytes]) -> None:
        """See AuditStore."""
        if not self._ready.done() or not self._client.is_connected:
            raise AuditUnavailable(f"stream {self._stream}: {self._problem}")
        sent = (self._jetstream.publish(self._subject, record.rstrip(b"\n")) for record in records)
        for outcome in await asyncio.gather(*sent, return_exceptions=True):
            if isinstance(outcome, NoStreamResponseError) and self._ready.done():
                _log.error("the audit log's stream %s is gone, with its records; it is created again", self._stream)
                self._problem = "it is gone"
                self._ready = self._begin(self._create_stream())
            if isinstance(outcome, (NatsError, OSError, TimeoutError)):
                raise AuditUnavailable(f"stream {self._stream}: {outcome!r}") from outcome
            if isinstance(outcome, BaseException):
                raise outcome

    async def close(self) -> None:
        """See AuditStore."""
        self._ready.cancel()
        await asyncio.gather(self._ready, return_exceptions=True)
        with contextlib.suppress(NatsError, OSError, TimeoutError):
            await self._client.close()

    def _begin(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(self._log_end)
        return task

    def _log_end(self, ready: asyncio.Task[None]) -> None:
        if not ready.cancelled() and (error := ready.exception()) is not None:
            self._problem = repr(error)
            _log.error("the audit log's stream %s cannot be used: %s", self._stream, self._problem)

    async def _connect(self) -> None:
        """Connect, which takes until the broker is there, and then create the stream."""
        await self._client.connect(
            max_reconnect_attempts=-1,
            reconnect_time_wait=_RETRY_SECONDS,
            connect_timeout=round(_TIMEOUT.total_seconds()),
            error_cb=_log_error,
            **self._options,
        )
        await self._create_stream()

    async def _create_stream(self) -> None:
        """Create the stream, or look that it is one that keeps what it has, until that succeeds."""
        while True:
            try:
                await self._try_to_create_stream()
            except (NatsError, OSError, TimeoutError, AuditUnavailable) as error:
                self._problem = str(error) or repr(error)
                _log.warning("the audit log's stream %s cannot be used now: %s", self._stream, self._problem)
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                self._problem = "the broker cannot be reached"
                return

    async def _try_to_create_stream(self) -> None:
        config = StreamConfig(
            name=self._stream,
            subjects=[self._subject],
            storage=StorageType.FILE,
            discard=DiscardPolicy.NEW,
            deny_delete=True,
            deny_purge=True,
        )
        try:
            await self._jetstream.add_stream(config)
        except BadRequestError as error:
            if error.err_code != _OTHER_CONFIG:
                raise
            found = (await self._jetstream.stream_info(self._stream)).config
            if not (found.deny_delete and found.deny_purge and self._subject in (found.subjects or ())):
                problem = f"it must take {self._subject} and deny deletes and purges"
                raise AuditUnavailable(problem) from error


async def _log_error(error: Exception) -> None:
    _log.info("audit: %r", error)
