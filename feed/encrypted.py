"""The encrypted live feed: a Feed around another one. Records in clear are delivered as they are."""

import asyncio
import logging
from collections.abc import Callable
from typing import Final, NamedTuple

from encryption import Encryption, KeysUnavailable, Unreadable
from encryption.cipher import KeyId
from feed.answers import Answers
from feed.feed import Feed, FeedSettings, RecordHandler, ignore
from feed.nats import NatsFeed
from feed.nats_answers import NatsAnswers
from feed.worker_reports import WorkerReports
from llm_pb import internal_pb2
from runtime.health import Readiness

_log = logging.getLogger(__name__)
_RETRY_SECONDS: Final = 1


class OpenFeed(NamedTuple):
    """A feed, and what shares its connection."""

    feed: Feed
    reports: WorkerReports
    answers: Answers


def open_feed(
    settings: FeedSettings, role: str, encryption: Encryption | None, readiness: Readiness | None = None
) -> OpenFeed:
    """Return the feed of the settings, which begins to connect, with the reports of workers and the cache of answers.

    Feed and answers are encrypted unless `encryption` is None. `readiness` names files of the connection while they
    cannot be used.
    """
    feed = NatsFeed(settings, role, readiness)
    feed.start()
    answers = Answers(NatsAnswers(feed, settings), encryption)
    return OpenFeed(feed if encryption is None else EncryptedFeed(feed, encryption), feed, answers)


class EncryptedFeed:
    """A Feed whose records are encrypted with a tenant's data keys.

    The records of each job have a key of their own, derived for the job's key in the feed. The broker and its disk see
    the length of each record, its time, its tenant, and the job's key in the feed.
    """

    def __init__(self, feed: Feed, encryption: Encryption, tenant: str = "") -> None:
        self._feed = feed
        self._encryption = encryption
        self._tenant = tenant
        self._losing = False
        self._recoveries = 0

    @property
    def recoveries(self) -> int:
        """See Feed."""
        return self._feed.recoveries + self._recoveries

    @property
    def available(self) -> bool:
        """See Feed."""
        return self._feed.available and not self._losing

    @property
    def storing(self) -> bool:
        """See Feed."""
        return self._feed.storing

    def of_tenant(self, tenant: str) -> "EncryptedFeed":
        """See Feed."""
        return self if tenant == self._tenant else EncryptedFeed(self._feed, self._encryption, tenant)

    async def append(self, key: str, record: internal_pb2.FeedRecord) -> None:
        """See Feed. Waits, a bounded time, for a data key: once a month, and for a moment every few seconds."""
        if (encrypted := await self._encrypted(key, record)) is not None:
            await self._feed.append(key, encrypted)

    async def sync(self, key: str, record: internal_pb2.FeedRecord) -> bool:
        """See Feed."""
        encrypted = await self._encrypted(key, record)
        return encrypted is not None and await self._feed.sync(key, encrypted)

    async def read(self, key: str, on_record: RecordHandler, caught_up: Callable[[], None] = ignore) -> None:
        """See Feed. Skips a record that can never be decrypted again, which its reader detects as a gap."""
        reading = _Reading(self._encryption, key, on_record)
        while True:
            await self._feed.read(key, reading.on_record, lambda: None if reading.missing else caught_up())
            if reading.missing is None:
                return
            await reading.fetch_key()

    async def remove(self, key: str) -> bool:
        """See Feed."""
        return await self._feed.remove(key)

    async def close(self) -> None:
        """See Feed."""
        await self._feed.close()

    async def _encrypted(self, key: str, record: internal_pb2.FeedRecord) -> internal_pb2.FeedRecord | None:
        """Return the record as it is stored, None while no data key is available."""
        if not self._encryption.write:
            return record
        try:
            data_key = await self._encryption.keys.current(self._tenant)
        except KeysUnavailable as error:
            if not self._losing:
                _log.warning("the feed loses records: %s", error)
            self._losing = True
            return None
        if self._losing:
            self._losing = False
            self._recoveries += 1
        return internal_pb2.FeedRecord(
            encrypted=internal_pb2.EncryptedRecord(
                tenant=data_key.key_id.tenant,
                key=data_key.key_id.name,
                data=data_key.cipher(_purpose(key)).encrypt(record.SerializeToString()),
            )
        )


class _Reading:
    """The decryption for one reader. It ends at a key that is not in memory, and begins again once the key is."""

    def __init__(self, encryption: Encryption, key: str, on_record: RecordHandler) -> None:
        self.missing: KeyId | None = None
        """The key at which the reading ended."""
        self._keys = encryption.keys
        self._purpose = _purpose(key)
        self._on_record = on_record
        self._seen = 0
        self._taken = 0
        self._unreadable: set[KeyId] = set()

    def on_record(self, record: internal_pb2.FeedRecord) -> bool | None:
        """Deliver a record that no earlier reading has delivered; return True once the reader needs no more."""
        self._seen += 1
        if self._seen <= self._taken:
            return False
        if record.HasField("encrypted"):
            try:
                opened = self._decrypted(record.encrypted)
            except Unreadable as error:
                _log.warning("a record of the feed is skipped: %s", error)
                opened = None
            if self.missing is not None:
                return True
        else:
            opened = record
        self._taken = self._seen
        return opened is not None and self._on_record(opened)

    async def fetch_key(self) -> None:
        """Load the missing key into memory, or note that it was deleted. Waits while it is unavailable."""
        key_id, self.missing, self._seen, logged = self.missing, None, 0, False
        while key_id is not None:
            try:
                await self._keys.get(key_id)
            except Unreadable as error:
                _log.warning("records of the feed are skipped: %s", error)
                self._unreadable.add(key_id)
            except KeysUnavailable as error:
                if not logged:
                    _log.warning("the feed cannot be read now: %s", error)
                logged = True
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            return

    def _decrypted(self, encrypted: internal_pb2.EncryptedRecord) -> internal_pb2.FeedRecord | None:
        """Return the record; None if its key was deleted or is missing. Raises Unreadable."""
        key_id = KeyId.parse(encrypted.tenant, encrypted.key)
        if key_id in self._unreadable:
            return None
        key = self._keys.cached(key_id)
        if key is None:
            self.missing = key_id
            return None
        return internal_pb2.FeedRecord.FromString(key.cipher(self._purpose).decrypt(encrypted.data))


def _purpose(key: str) -> str:
    return f"feed {key}"
