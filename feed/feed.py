"""The live feed of a job: an ordered log of FeedRecords, fast, resumable and disposable.

Nothing durable depends on it. Records may be lost with the broker, but they are never reordered. TokensMade carries the
offset of its text, so a reader detects a gap and asks Temporal instead.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Protocol, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from feed.nats_settings import NatsUrl, StreamName, SubjectPrefix
from llm_pb import internal_pb2
from runtime.files import ReadableFile
from runtime.health import Readiness
from runtime.tls import ClientTls, client_tls

RecordHandler = Callable[[internal_pb2.FeedRecord], bool | None]
"""A reader's callback, called with each record as soon as it arrives. Returns True once the reader needs no more."""


def ignore() -> None:
    """Do nothing: for readers that need not know when they have caught up."""


class Feed(Protocol):
    """The logs of jobs' records. A job's key is any text: RunRequest.feed_key, or the run id of its workflow."""

    @property
    def recoveries(self) -> int:
        """The number of times that the feed has recovered after records may have been lost.

        A writer that sees it change after an append repeats what its readers must not miss.
        """
        ...

    @property
    def available(self) -> bool:
        """Whether the feed accepts and delivers records now, as far as is known."""
        ...

    @property
    def storing(self) -> bool:
        """False once the feed is connected and `sync` has failed, until a record is stored or the connection ends."""
        ...

    def of_tenant(self, tenant: str) -> "Feed":
        """Return the feed to which the jobs of a tenant write. Reading needs no tenant."""

    async def append(self, key: str, record: internal_pb2.FeedRecord) -> None:
        """Append a record without waiting until it is stored. Never raises, never blocks.

        The record is lost if the feed is unavailable, or has more records in flight than it keeps in memory.
        """
        ...

    async def sync(self, key: str, record: internal_pb2.FeedRecord) -> bool:
        """Append a record and wait, a bounded time, until it and all before it are stored; return False if that
        failed."""
        ...

    async def read(self, key: str, on_record: RecordHandler, caught_up: Callable[[], None] = ignore) -> None:
        """Deliver the job's records to `on_record`, from the first one kept, until it returns True.

        Each record is delivered once, in order, as soon as it arrives. `caught_up` is called once `on_record` has had
        all records that were stored when the reading began, and may be called again. While the feed is unavailable,
        this waits, and then continues by itself. An exception of `on_record` ends it.
        """
        ...

    async def remove(self, key: str) -> bool:
        """Delete the job's records; return whether they are deleted.

        Never raises: records that remain are deleted at the end of their retention.
        """
        ...

    async def close(self) -> None:
        """Flush the buffered records, within a bounded time, and disconnect."""
        ...


class Fence:
    """Decides which records count: those of the attempt that took the feed over last, until the job ends."""

    def __init__(self) -> None:
        self._writer = ""
        self._attempt = 0
        self._over = False

    def admits(self, record: internal_pb2.FeedRecord) -> bool:
        """Return whether the record counts. Call it for each record, in order."""
        if record.HasField("job_ending"):
            self._over = True
        if self._over:
            # An attempt that Temporal has given up may continue to write.
            return False
        if record.HasField("attempt_started"):
            if record.attempt_started.attempt < self._attempt:
                # Temporal has given that attempt up, and a newer one has taken the feed over.
                return False
            self._writer, self._attempt = record.writer, record.attempt_started.attempt
        return record.writer == self._writer


def want_feed(readiness: Readiness, feed: Feed, without: str) -> None:
    """Report a feed that is not connected or stores nothing as degraded. `without` says what watchers see then."""

    def check() -> bool | str:
        return feed.available and (feed.storing or f"is connected and stores nothing: {without}")

    readiness.want("feed", f"is not connected: {without}", check)


class FeedSettings(BaseSettings):
    """The live feed. Gateway and worker use the same values."""

    model_config = SettingsConfigDict(
        env_prefix="FEED_", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True
    )

    url: NatsUrl = SecretStr("nats://127.0.0.1:4222")
    """URL of the NATS server, with JetStream. It may hold a user and password. Those of several servers of one cluster
    are separated by commas."""
    tls_ca: ReadableFile | None = None
    """PEM file of the CAs that may have issued the NATS server's certificate. If set, the connection begins with the
    TLS handshake, so the server needs handshake_first. Unset: the connection is in clear, unless the server requires
    TLS."""
    tls_cert: ReadableFile | None = None
    """PEM file of the certificate to present to the NATS server."""
    tls_key: ReadableFile | None = None
    """PEM file of the private key of FEED_TLS_CERT, not encrypted."""
    nkey_seed: ReadableFile | None = None
    """File of the NKey seed with which the process authenticates to the NATS server."""
    stream: StreamName = "LLM_FEED"
    """Name of the JetStream stream that holds the records."""
    subject_prefix: SubjectPrefix = "llm.feed"
    """Prefix of the subjects. A dot and the job's key follow, by default its run id."""
    max_age: timedelta = Field(timedelta(hours=24), gt=timedelta(0))
    """Maximum age of records. Older ones are deleted."""
    max_bytes: int = Field(1 << 30, gt=0)
    """Maximum disk space of all records, in bytes. The oldest are deleted first."""
    cache_stream: StreamName = "LLM_CACHE"
    """Name of the JetStream stream that holds the cache of answers. The first worker that uses the cache creates it."""
    cache_subject_prefix: SubjectPrefix = "llm.cache"
    """Prefix of the subjects of the cache of answers."""
    cache_max_bytes: int = Field(256 << 20, gt=0)
    """Maximum disk space of the cache of answers, in bytes. The oldest are deleted first."""
    max_readers: int = Field(100_000, gt=0)
    """Maximum number of readers of the feed at the same time: one for each job that is watched at a gateway, in all
    gateways together. NATS takes about 45 KB for each. Watchers of further jobs see progress without tokens."""
    replicas: int = Field(1, ge=1, le=5)
    """Number of servers of a NATS cluster that hold the stream. With 3 it outlives the loss of one of them. A server
    that is in no cluster takes 1 alone."""
    timeout: timedelta = Field(timedelta(seconds=2), gt=timedelta(0))
    """Maximum wait for the broker's answer."""

    @property
    def tls(self) -> ClientTls | None:
        """The files of TLS. None: no CA is set."""
        return client_tls(self)

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        client_tls(self)
        return self
