"""The audit log: one record for each call of the API, of who asked for what and whether it was let through.

A record is a line of JSON. It holds nothing of a request but ids, and nothing of a credential but its public id. The
record of a write, and of a refusal, is stored before the call is answered; a write that cannot be recorded is not
done. The records of reads are stored soon after.

Records that come while others are being stored are stored together (group commit), so that a store which syncs a disk
does so a few times a second, however many calls there are.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Protocol

import grpc
from opentelemetry import trace
from opentelemetry.metrics import Counter

from runtime.grpc_interceptor import OWN_SERVICES, Handler, Interceptor, behavior_of, with_behavior

_log = logging.getLogger(__name__)
_MAX_QUEUED: Final = 10_000
"""Maximum number of records that wait to be stored. Beyond it the log is unavailable."""
_MAX_BATCH: Final = 1000
_WRITE_INTERVAL: Final = timedelta(milliseconds=10)
"""Minimum time between two writes, in which records gather. The first record after a pause does not wait."""
_STORE_TIMEOUT: Final = timedelta(seconds=5)
"""Maximum wait until a record is stored, and for the queue at the end of the process."""


class AuditUnavailable(Exception):
    """A record could not be stored, or not in time."""


class AuditStore(Protocol):
    """Where records are stored."""

    async def write(self, records: Sequence[bytes]) -> None:
        """Append records, each with its line feed, and return once they are stored. Raises AuditUnavailable."""
        ...

    async def close(self) -> None:
        """Release what it holds."""
        ...


class AuditLog:
    """Stores records in the order in which they come."""

    def __init__(self, store: AuditStore, lost: Counter, timeout: timedelta = _STORE_TIMEOUT) -> None:
        """Start to store. Must be closed. `lost` counts the records that could not be stored."""
        self._store = store
        self._timeout = timeout.total_seconds()
        self._queue: deque[tuple[bytes, asyncio.Future[None] | None]] = deque()
        self._filled = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._lost = lost
        self._failure: AuditUnavailable | None = None
        """Why the last record that came to an end was not stored; None if it was."""
        self._writing = asyncio.create_task(self._keep_writing())

    @property
    def available(self) -> bool:
        """Whether the last record was stored. Before the first one, True."""
        return self._failure is None

    async def put(self, record: bytes) -> None:
        """Store a record. Raises AuditUnavailable; the record may be stored nevertheless."""
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._enqueue(record, stored)
        try:
            async with asyncio.timeout(self._timeout):
                await stored
        except TimeoutError:
            self._failure = AuditUnavailable(f"not stored within {self._timeout:g} s")
            raise self._failure from None

    def require_available(self) -> None:
        """Raise AuditUnavailable if the last record could not be stored. The next one may be."""
        if self._failure is not None:
            raise AuditUnavailable(str(self._failure))

    def add(self, record: bytes) -> None:
        """Store a record soon. One that cannot be stored is counted."""
        try:
            self._enqueue(record, None)
        except AuditUnavailable as error:
            self._note_lost(1, error)

    async def close(self) -> None:
        """Store what waits and close the store, within a bounded time: a store that hangs stays open."""
        try:
            async with asyncio.timeout(self._timeout):
                await self._empty.wait()
        except TimeoutError:
            self._note_lost(len(self._queue), AuditUnavailable("the process ends"))
        self._writing.cancel()
        await asyncio.gather(self._writing, return_exceptions=True)
        try:
            async with asyncio.timeout(self._timeout):
                await self._store.close()
        except TimeoutError:
            _log.error("the store of the audit log does not close")

    def _enqueue(self, record: bytes, stored: asyncio.Future[None] | None) -> None:
        if len(self._queue) >= _MAX_QUEUED:
            raise AuditUnavailable(f"{_MAX_QUEUED} records wait to be stored")
        self._queue.append((record, stored))
        self._filled.set()
        self._empty.clear()

    async def _keep_writing(self) -> None:
        now, begun = asyncio.get_running_loop().time, 0.0
        while True:
            await self._filled.wait()
            await asyncio.sleep(begun + _WRITE_INTERVAL.total_seconds() - now())
            begun = now()
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), _MAX_BATCH))]
            failure: AuditUnavailable | None = None
            try:
                await self._store.write([record for record, _ in batch])
            except AuditUnavailable as error:
                failure = error
            except Exception as error:  # noqa: BLE001  # whatever it was, the log has to go on
                _log.exception("the audit log has failed")
                failure = AuditUnavailable(repr(error))
            self._failure = failure
            if failure is not None:
                self._note_lost(len(batch), failure)
            for _, stored in batch:
                if stored is None or stored.done():
                    continue
                if failure is None:
                    stored.set_result(None)
                else:
                    stored.set_exception(AuditUnavailable(str(failure)))
            if not self._queue:
                self._filled.clear()
                self._empty.set()

    def _note_lost(self, count: int, error: AuditUnavailable) -> None:
        if count:
            self._lost.add(count)
            _log.error("%d audit records are lost: %s", count, error)


class _Entry:
    """The record of the call that is being handled."""

    def __init__(self, log: AuditLog, method: str, peer: str) -> None:
        self.decided = False
        self._log = log
        self._fields: dict[str, str] = {"method": method, "peer": peer}

    def describe(self, fields: Mapping[str, str]) -> None:
        self._fields.update({name: value for name, value in fields.items() if value})

    def require_available(self) -> None:
        if not self.decided:
            self._log.require_available()

    async def allow(self) -> None:
        if not self.decided:
            await self._log.put(self._record("allowed"))
            self.decided = True

    async def refuse(self, code: str, reason: str) -> None:
        if self.decided:
            return
        self.decided = True
        try:
            await self._log.put(self._record("refused", code=code, reason=reason))
        except AuditUnavailable as error:
            # A refusal is no less one.
            _log.warning("the record of a refusal is lost: %s", error)

    def add(self, decision: str, **more: str) -> None:
        if not self.decided:
            self.decided = True
            self._log.add(self._record(decision, **more))

    def _record(self, decision: str, **more: str) -> bytes:
        context = trace.get_current_span().get_span_context()
        fields = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "decision": decision,
            **self._fields,
            **more,
            "trace_id": f"{context.trace_id:032x}" if context.is_valid else "",
        }
        return json.dumps({name: value for name, value in fields.items() if value}).encode() + b"\n"


_entry: ContextVar[_Entry | None] = ContextVar("audit_entry", default=None)


def recording() -> bool:
    """Return whether the call that is being handled is recorded."""
    return _entry.get() is not None


def describe(**fields: str) -> None:
    """Add fields to the record of the call that is being handled: ids, no content.

    An empty one changes nothing: the later messages of a stream do not repeat what its first one says.
    """
    if (entry := _entry.get()) is not None:
        entry.describe(fields)


def require_available() -> None:
    """Raise AuditUnavailable if allow() will probably fail. To be called before what an abandoned write would hold."""
    if (entry := _entry.get()) is not None:
        entry.require_available()


async def allow() -> None:
    """Store that the call is let through, unless it was decided before. To be called before a write has an effect.

    Raises AuditUnavailable: the write must not be done.
    """
    if (entry := _entry.get()) is not None:
        await entry.allow()


async def refuse(code: str, reason: str) -> None:
    """Store that the call is refused, unless it was decided before: by a gRPC status and a reason of ErrorInfo."""
    if (entry := _entry.get()) is not None:
        await entry.refuse(code, reason)


def note_allowed() -> None:
    """Store soon that a read is let through, unless it was decided before."""
    if (entry := _entry.get()) is not None:
        entry.add("allowed")


class AuditInterceptor(Interceptor):
    """Makes one record for each call, but for those of health and reflection.

    Belongs behind the telemetry, whose trace the record names, and before the interceptors that refuse calls. What
    decides about a call says so by allow(), refuse() or note_allowed(). A call that ends without is recorded with its
    status.
    """

    def __init__(self, log: AuditLog) -> None:
        self._log = log

    def wrap(self, handler: Handler, call: grpc.HandlerCallDetails) -> Handler:
        """Wrap the handler of a call, a coroutine function."""
        if call.method.startswith(OWN_SERVICES):
            return handler
        method, handle = call.method.rpartition("/")[2], behavior_of(handler)

        async def audited(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            entry = _Entry(self._log, method, context.peer())
            _entry.set(entry)
            code = "OK"
            try:
                return await handle(requests, context)
            except asyncio.CancelledError:
                code = "CANCELLED"
                raise
            except BaseException:
                code = "UNKNOWN"
                raise
            finally:
                # None, despite its type, while nothing has set it.
                chosen: Any = context.code()
                code = chosen.name if chosen is not None else code
                if code == "OK":
                    entry.add("allowed")
                else:
                    # A client that has left before anything was decided was not refused.
                    entry.add("ended" if code == "CANCELLED" else "refused", code=code)

        return with_behavior(handler, audited)
