"""The live feed of a job: an ordered log of FeedRecords, fast, resumable and disposable.

Nothing durable depends on it. Records may be lost with the broker; they are never reordered, and TokensMade carries the
offset of its text, so a reader sees a gap and asks Temporal instead.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Protocol, Self

from pydantic import Field, FilePath, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from llm_pb import internal_pb2
from runtime.tls import ClientTls, client_tls

RecordHandler = Callable[[internal_pb2.FeedRecord], bool | None]
"""Called with each record of a reader's, as soon as it is there; returns True when it wants no more."""


def ignore() -> None:
    """Do nothing: for readers that need not know when they have caught up."""


class Feed(Protocol):
    """Where the records of jobs go. A job's key is the run id of its workflow."""

    @property
    def recoveries(self) -> int:
        """How often so far the feed took records again after some may have been lost.

        A writer that sees it change, after an append, repeats what its readers must not miss.
        """
        ...

    @property
    def available(self) -> bool:
        """Whether records are taken and delivered now, as far as is known."""
        ...

    async def append(self, key: str, record: internal_pb2.FeedRecord) -> None:
        """Hand a record over without waiting until it is stored. Never raises, never blocks.

        A feed that is away, or has more under way than it keeps in memory, loses it.
        """
        ...

    async def sync(self, key: str, record: internal_pb2.FeedRecord) -> bool:
        """Append a record and wait, a bounded time, until it and all before it are stored; False when that failed."""
        ...

    async def read(self, key: str, on_record: RecordHandler, caught_up: Callable[[], None] = ignore) -> None:
        """Hand the job's records to `on_record`, from the first one kept, then each as it comes, until it has enough.

        Calls `caught_up` once `on_record` has had all records that were stored when the reading began; it may do so
        again. Waits while the feed is away, and goes on by itself. Each record comes once, in order. What `on_record`
        raises ends it.
        """
        ...

    async def remove(self, key: str) -> None:
        """Forget the job's records. Never raises: what stays is forgotten at the end of its retention."""
        ...

    async def close(self) -> None:
        """Hand over what is buffered, within a bounded time, and disconnect."""
        ...


class Fence:
    """Tells the records that count: those of the attempt that has taken the feed over last, until the job ends."""

    def __init__(self) -> None:
        self._writer = ""
        self._attempt = 0
        self._over = False

    def admits(self, record: internal_pb2.FeedRecord) -> bool:
        """Return whether the record counts; to be asked of each one, in order."""
        if record.HasField("job_ending"):
            self._over = True
        if self._over:
            # An attempt that Temporal has given up may write on.
            return False
        if record.HasField("attempt_started"):
            if record.attempt_started.attempt < self._attempt:
                # Temporal has given that attempt up before it came so far: a newer one is at work.
                return False
            self._writer, self._attempt = record.writer, record.attempt_started.attempt
        return record.writer == self._writer


class FeedSettings(BaseSettings):
    """The live feed, the same for gateway and worker."""

    model_config = SettingsConfigDict(env_prefix="FEED_", frozen=True, use_attribute_docstrings=True)

    url: SecretStr = SecretStr("nats://127.0.0.1:4222")
    """The NATS server, with JetStream; may hold a user and password."""
    tls_ca: FilePath | None = None
    """CAs as a PEM file: the server must have a certificate of one of them. It must speak TLS from the first byte
    (handshake_first). Unset: the connection is in clear, unless the server asks for TLS."""
    tls_cert: FilePath | None = None
    """A certificate to show to the server: a PEM file."""
    tls_key: FilePath | None = None
    """The private key of the certificate: a PEM file, not encrypted."""
    nkey_seed: FilePath | None = None
    """A file with the seed of an NKey, by which the server knows this process."""
    stream: str = "LLM_FEED"
    """Name of the JetStream stream that holds the records."""
    subject_prefix: str = "llm.feed"
    """Subjects are this, a dot and the job's run id."""
    max_age: timedelta = timedelta(hours=24)
    """How long records are kept."""
    max_bytes: int = Field(1 << 30, gt=0)
    """How much disk the records may take; the oldest go first."""
    timeout: timedelta = timedelta(seconds=2)
    """Longest wait for the broker's answer."""

    @property
    def tls(self) -> ClientTls | None:
        """The files of TLS. None: no CA is set."""
        return client_tls(self)

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        client_tls(self)
        return self
