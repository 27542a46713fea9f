"""The live feed on NATS JetStream.

One subject for each job gives one order. Output is published without an acknowledgement: JetStream stores what one
connection sends in the order it was sent, so the acknowledgement of the last record (`sync`) covers all before it.

The reports of workers use the same connection, without JetStream: nobody needs an old one.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Final, Self
from urllib.parse import quote

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.errors import NoStreamResponseError, NotFoundError

from feed.feed import FeedSettings, RecordHandler, ignore
from feed.nats_consumers import Consumers, Position, reraise_cancel
from feed.nats_stream import create_stream
from feed.worker_reports import MAX_REPORT_BYTES, ReportHandler
from llm_pb import internal_pb2
from runtime.health import Readiness
from runtime.nats_client import connect_options, new_client

_log = logging.getLogger(__name__)
_PENDING_BYTES: Final = 4 * 1024 * 1024
"""Maximum size of the records in flight to the broker, in bytes. Further records are lost, as without a connection."""
_RETRY_SECONDS: Final = 1
_PENDING_REPORTS: Final = 4096
"""Maximum number of reports that wait for their handler. Further ones are dropped."""


class NatsFeed:
    """A Feed on a JetStream stream, which it creates when there is none, and the WorkerReports on its connection."""

    def __init__(self, settings: FeedSettings, role: str = "", readiness: Readiness | None = None) -> None:
        """`role` names the inbox of the process, `readiness` files while they cannot be used.

        Raises OSError or ValueError where TLS or the NKey cannot be used.
        """
        self._settings = settings
        self._new_options = partial(connect_options, settings, role, readiness=readiness)
        self._new_options()
        self._client = new_client(settings.url, settings.tls)
        self._stream = self._client.jetstream(timeout=settings.timeout.total_seconds())
        self._ready = asyncio.Event()
        self._stream_unsure = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._consumers = Consumers(settings.stream)
        self._losing = False
        self._storing = True
        self._recoveries = 0
        # Two words: the stream takes one word after the prefix.
        self._reports_subject = f"{settings.subject_prefix}.workers.reports"
        self._on_report: ReportHandler | None = None
        self._subscribed: Client | None = None
        self._reports_refused = False

    @property
    def recoveries(self) -> int:
        """See Feed."""
        return self._recoveries

    @property
    def available(self) -> bool:
        """See Feed."""
        return self._ready.is_set()

    @property
    def storing(self) -> bool:
        """See Feed."""
        return self._storing

    @property
    def client(self) -> Client:
        """The present connection, for what shares it."""
        return self._client

    def start(self) -> None:
        """Connect in the background, and try until it succeeds: a service starts without its feed."""
        self._tasks = [asyncio.create_task(self._stay_ready()), asyncio.create_task(self._consumers.end_silent())]

    async def wait_ready(self) -> None:
        """Wait until the stream exists."""
        await self._ready.wait()

    def of_tenant(self, tenant: str) -> Self:  # one key is one job's, whoever its tenant is
        """See Feed."""
        return self

    async def append(self, key: str, record: internal_pb2.FeedRecord) -> None:
        """See Feed."""
        if not self._ready.is_set() or self._client.pending_data_size > _PENDING_BYTES:
            self._losing = True
            return
        if self._losing:
            self._losing = False
            self._recoveries += 1
        try:
            await self._client.publish(self._subject(key), record.SerializeToString())
        except (NatsError, OSError) as error:
            self._losing = True
            _log.warning("the feed lost a record: %s: %s", type(error).__name__, error)

    async def sync(self, key: str, record: internal_pb2.FeedRecord) -> bool:
        """See Feed."""
        if not self._ready.is_set():
            return False
        try:
            await reraise_cancel(self._stream.publish(self._subject(key), record.SerializeToString()))
        except (NatsError, OSError, TimeoutError) as error:
            _log.warning("the feed did not store a record: %s: %s", type(error).__name__, error)
            # What waited while the connection ended says nothing of the next one.
            self._storing = not self._ready.is_set()
            self._note_failure(error)
            return False
        self._storing = True
        return True

    async def read(self, key: str, on_record: RecordHandler, caught_up: Callable[[], None] = ignore) -> None:
        """See Feed."""
        last: Position | None = None
        failure: Exception | None = None

        def on_message(position: Position, data: bytes) -> bool | None:
            nonlocal last, failure
            if last is not None and position <= last:
                return False
            last = position
            try:
                return on_record(internal_pb2.FeedRecord.FromString(data))
            except Exception as error:  # noqa: BLE001  # it is the reader's, not the broker's
                failure = error
                return True

        enough = False
        while not enough:
            await self._ready.wait()
            try:
                enough = await self._consumers.deliver(
                    self._client, self._stream, self._subject(key), last, on_message, caught_up
                )
            except (NatsError, OSError, TimeoutError) as error:
                _log.warning("the feed cannot be read now: %r", error)
                self._note_failure(error)
                await asyncio.sleep(_RETRY_SECONDS)
        if failure is not None:
            raise failure

    async def remove(self, key: str) -> bool:
        """See Feed."""
        if not self._ready.is_set():
            return False
        try:
            return await reraise_cancel(self._stream.purge_stream(self._settings.stream, subject=self._subject(key)))
        except (NatsError, OSError, TimeoutError) as error:
            _log.warning("the feed did not forget a job: %r", error)
            self._note_failure(error)
            return False

    @property
    def receiving(self) -> bool:
        """See WorkerReports."""
        return self._subscribed is self._client and self._client.is_connected and not self._reports_refused

    async def publish_report(self, report: internal_pb2.WorkerReport) -> bool:
        """See WorkerReports."""
        if not self._client.is_connected or self._client.pending_data_size > _PENDING_BYTES:
            return False
        try:
            await self._client.publish(self._reports_subject, report.SerializeToString())
        except (NatsError, OSError) as error:
            _log.info("a report of the worker is lost: %r", error)
            return False
        return True

    async def receive_reports(self, on_report: ReportHandler) -> None:
        """See WorkerReports."""
        self._on_report = on_report
        if self._client.is_connected:
            await self._subscribe_reports()

    async def close(self) -> None:
        """See Feed."""
        if self._client.is_connected:
            with contextlib.suppress(NatsError, OSError, TimeoutError):
                await self._client.flush(timeout=int(max(1, self._settings.timeout.total_seconds())))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _subject(self, key: str) -> str:
        return f"{self._settings.subject_prefix}.{_subject_token(key)}"

    async def _stay_ready(self) -> None:
        while True:
            try:
                await self._stay_connected()
                # nats-py closes a client for good when the broker refuses it: its credentials were changed, say.
                _log.warning("the feed's broker has ended the connection")
            except (NatsError, OSError) as error:
                _log.warning("the feed cannot connect: %s", error)
            await asyncio.sleep(_RETRY_SECONDS)
            self._client = new_client(self._settings.url, self._settings.tls)
            self._stream = self._client.jetstream(timeout=self._settings.timeout.total_seconds())

    async def _stay_connected(self) -> None:
        """Connect, and create the stream whenever it may be missing, until the client is closed."""
        try:
            await reraise_cancel(self._connect())
            await self._subscribe_reports()
            if self._settings.replicas > 1:
                elected = f"$JS.EVENT.ADVISORY.STREAM.LEADER_ELECTED.{self._settings.stream}"
                await self._client.subscribe(elected, cb=self._note_leader)
            while not self._client.is_closed:
                self._stream_unsure.clear()
                try:
                    await create_stream(self._stream, self._settings)
                except (NatsError, OSError, TimeoutError) as error:
                    _log.warning("the feed's stream cannot be created now: %s: %s", type(error).__name__, error)
                    await asyncio.sleep(_RETRY_SECONDS)
                    continue
                self._ready.set()
                await self._stream_unsure.wait()
        finally:
            await self._client.close()

    async def _connect(self) -> None:
        await self._client.connect(
            max_reconnect_attempts=-1,
            reconnect_time_wait=_RETRY_SECONDS,
            connect_timeout=max(1, round(self._settings.timeout.total_seconds())),
            # Past this nats-py makes a publisher wait; append stays below it.
            pending_size=2 * _PENDING_BYTES,
            error_cb=self._note_error,
            disconnected_cb=self._note_disconnect,
            reconnected_cb=self._note_change,
            closed_cb=self._note_change,
            **self._new_options(),
        )

    async def _subscribe_reports(self) -> None:
        """Subscribe once for each client. nats-py does it again whenever that client reconnects."""
        on_report = self._on_report
        if on_report is None or self._subscribed is self._client:
            return
        self._subscribed = self._client

        async def take(message: Msg) -> None:
            on_report(message.data)

        await self._client.subscribe(
            self._reports_subject,
            cb=take,
            pending_msgs_limit=_PENDING_REPORTS,
            pending_bytes_limit=_PENDING_REPORTS * MAX_REPORT_BYTES,
        )

    async def _note_error(self, error: Exception) -> None:
        _log.info("feed: %r", error)
        if f'subscription to "{self._reports_subject}"'.lower() in str(error).lower():
            # The broker's configuration is of a version without reports. A new connection may find another one.
            self._reports_refused = True

    async def _note_disconnect(self) -> None:
        self._reports_refused = False
        self._ready.clear()
        self._storing = self._losing = True
        self._consumers.end()

    async def _note_leader(self, _: Msg) -> None:
        # What comes while a replicated stream has no leader is lost, and the connection stays.
        self._losing = True

    async def _note_change(self) -> None:
        self._stream_unsure.set()

    def _note_failure(self, error: Exception) -> None:
        if isinstance(error, (NoStreamResponseError, NotFoundError)):
            # Somebody deleted the stream, and what it held and was sent since.
            self._losing = True
            self._stream_unsure.set()


@lru_cache(maxsize=4096)  # it is needed for every record
def _subject_token(key: str) -> str:
    # Of what quote() leaves as it is, only the dot has a meaning in subjects.
    return quote(key, safe="").replace(".", "%2E")
