"""Outcomes in a table of the operator's PostgreSQL; the only module that imports asyncpg.

A table has one row for each job, batch and pipeline: the last event that came of it, under its id. So an event that is
delivered twice is in the table once, and an earlier one never replaces a later one. An outcome counts as later than
what a worker has reported: their clocks differ.
"""

import asyncio
import json
from typing import Final

import asyncpg

from jobs.errors import DeliveryFailed, DeliveryRefused
from llm_pb import llm_pb2
from runtime.health import Readiness
from runtime.telemetry import current_headers
from runtime.tls import client_context
from services.notifier.event import CloudEvent
from services.notifier.settings import NotifierSettings
from services.notifier.sinks.sink import Answer

_CONNECT_SECONDS: Final = 5
_IDLE_SECONDS: Final = 300
_LOCK: Final = 0x6C6C6D65
"""The key of the advisory lock under which one notifier at a time migrates."""

MIGRATIONS: Final = (
    """
    CREATE TABLE "{table}" (
        id text PRIMARY KEY,
        tenant text NOT NULL,
        user_id text NOT NULL,
        type text NOT NULL,
        event_id text NOT NULL,
        event_time timestamptz NOT NULL,
        event json NOT NULL,
        traceparent text NOT NULL,
        updated_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    'CREATE INDEX "{table}_of_user" ON "{table}" (tenant, user_id, event_time)',
)
"""What makes a table, one step after another. A step that was released is never changed."""
_STEPS_DONE: Final = "SELECT max(step) FROM llm_notifier_migrations WHERE table_name = $1"
_NOTE_STEP: Final = "INSERT INTO llm_notifier_migrations (table_name, step) VALUES ($1, $2)"
_HAS_STEPS: Final = "SELECT to_regclass('llm_notifier_migrations') IS NOT NULL"
_NEW_STEPS: Final = """
    CREATE TABLE IF NOT EXISTS llm_notifier_migrations (
        table_name text, step integer, done_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (table_name, step)
    )
"""
_UPSERT: Final = """
    INSERT INTO "{table}" (id, tenant, user_id, type, event_id, event_time, event, traceparent)
    VALUES ($1, $2, $3, $4, $5, $6::text::timestamptz, $7::text::json, $8)
    ON CONFLICT (id) DO UPDATE SET tenant = EXCLUDED.tenant, user_id = EXCLUDED.user_id, type = EXCLUDED.type,
        event_id = EXCLUDED.event_id, event_time = EXCLUDED.event_time, event = EXCLUDED.event,
        traceparent = EXCLUDED.traceparent, updated_at = now()
    WHERE "{table}".event_id <> EXCLUDED.event_id
        AND ("{table}".type !~ '[.](started|progress)$', "{table}".event_time)
        <= (EXCLUDED.type !~ '[.](started|progress)$', EXCLUDED.event_time)
"""
_FAILURES: Final = (
    *(asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError),
    # A connection that is used while the word of its end is on the way.
    asyncpg.InternalClientError,
)
_EPOCH: Final = "1970-01-01T00:00:00Z"
"""The time of an event without one."""


class PostgresSink:
    """A Sink for NotifyTarget.postgres. It connects with the first delivery, and again after a loss."""

    def __init__(self, settings: NotifierSettings, readiness: Readiness | None = None) -> None:
        """`settings.postgres_url` must be set. Raises OSError where the files of TLS cannot be used."""
        self._settings = settings
        tls = settings.postgres_tls
        self._tls = client_context(tls, readiness) if tls is not None else None
        self._timeout = settings.broker_timeout.total_seconds()
        self._opening: asyncio.Task[asyncpg.Pool] | None = None
        self._migrated: set[str] = set()

    def destination(self, target: llm_pb2.NotifyTarget) -> str:
        """See Sink. It is the database, because all its tables are equally fast."""
        return "postgres"

    async def deliver(self, target: llm_pb2.NotifyTarget, event: CloudEvent, user_id: str, tenant: str = "") -> Answer:
        """Store the event under the id of its job, batch or pipeline, and return once it is committed."""
        table = target.postgres.table
        if table not in self._settings.postgres_tables:
            raise DeliveryRefused(f"the operator allows no events in the table {table}")
        values = (
            *(event["subject"], tenant, user_id, event["type"], event["id"], event.get("time") or _EPOCH),
            *(json.dumps(event, ensure_ascii=True), current_headers().get("traceparent", "")),
        )
        try:
            async with asyncio.timeout(self._timeout):
                pool = await self._pool()
                connection = await pool.acquire()
                try:
                    await self._migrate(connection, table)
                    await connection.execute(_UPSERT.format(table=table), *values)
                except BaseException:
                    # It may be in the middle of an answer, for which nobody waits any more.
                    connection.terminate()
                    raise
                finally:
                    await pool.release(connection)
        except _FAILURES as error:
            raise self._failure(error, table) from error
        return Answer()

    async def close(self) -> None:
        """See Sink."""
        if self._opening is not None:
            opened, self._opening = self._opening, None
            opened.cancel()
            result = (await asyncio.gather(opened, return_exceptions=True))[0]
            if isinstance(result, asyncpg.Pool):
                result.terminate()

    async def _pool(self) -> asyncpg.Pool:
        if self._opening is None or (self._opening.done() and self._opening.exception() is not None):
            self._opening = asyncio.create_task(self._open())
        return await asyncio.shield(self._opening)

    async def _open(self) -> asyncpg.Pool:
        url = self._settings.postgres_url
        if url is None:
            raise ValueError("NOTIFIER_POSTGRES_URL is not set")
        return await asyncpg.create_pool(
            url.get_secret_value(),
            min_size=0,
            max_size=self._settings.postgres_connections,
            max_inactive_connection_lifetime=_IDLE_SECONDS,
            timeout=_CONNECT_SECONDS,
            server_settings={"application_name": "durable-llm-notifier"},
            **({"ssl": self._tls} if self._tls is not None else {}),
        )

    async def _migrate(self, connection: asyncpg.pool.PoolConnectionProxy, table: str) -> None:
        """Bring the table up to date, once for each process."""
        if table in self._migrated or not self._settings.postgres_migrate:
            return
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
            if not await connection.fetchval(_HAS_STEPS):
                await connection.execute(_NEW_STEPS)
            done = await connection.fetchval(_STEPS_DONE, table) or 0
            for step, statement in enumerate(MIGRATIONS[done:], done + 1):
                await connection.execute(statement.format(table=table))
                await connection.execute(_NOTE_STEP, table, step)
        self._migrated.add(table)

    def _failure(self, error: Exception, table: str) -> DeliveryFailed | DeliveryRefused:
        """Return what the error means. The text of most errors names the operator's server, so it is not in it."""
        if isinstance(error, TimeoutError):
            return DeliveryFailed(f"PostgreSQL did not store the event within {self._timeout:g} s")
        if isinstance(error, asyncpg.InvalidAuthorizationSpecificationError):
            return DeliveryFailed("PostgreSQL refused the login of the notifier")
        if isinstance(error, asyncpg.InsufficientPrivilegeError):
            return DeliveryFailed(f"PostgreSQL does not let the notifier create or write the table {table}")
        if isinstance(error, asyncpg.UndefinedTableError):
            self._migrated.discard(table)
            return DeliveryFailed(f"PostgreSQL has no table {table}")
        if isinstance(error, asyncpg.DataError):
            return DeliveryRefused(f"PostgreSQL cannot store the event: {type(error).__name__}")
        if isinstance(error, asyncpg.PostgresError) and not isinstance(
            error, asyncpg.PostgresConnectionError | asyncpg.CannotConnectNowError | asyncpg.OperatorInterventionError
        ):
            return DeliveryFailed(f"PostgreSQL did not accept the event: SQLSTATE {error.sqlstate}")
        return DeliveryFailed("PostgreSQL cannot be reached")
