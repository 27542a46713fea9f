"""What the sink of PostgreSQL promises besides the contract of sinks, on a real server."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from jobs.errors import DeliveryFailed
from llm_pb import llm_pb2
from services.notifier.event import CloudEvent
from services.notifier.settings import NotifierSettings
from services.notifier.sinks.registry import open_sinks
from services.notifier.sinks.sink import Sink
from tests.support.certificates import Authority
from tests.support.postgres_server import PostgresServer, postgres_server

TIMES = [f"2026-11-26T06:00:0{second}Z" for second in range(3)]


@pytest.fixture(scope="module")
async def postgres() -> AsyncIterator[PostgresServer]:
    async with postgres_server() as server:
        yield server


def settings(server: PostgresServer, *tables: str, **changes: Any) -> NotifierSettings:
    return NotifierSettings(**{"postgres_url": SecretStr(server.url), "postgres_tables": tables, **changes})


def event(subject: str, id_: str, time: str = TIMES[1], **data: Any) -> CloudEvent:
    kind = "batch" if subject.startswith("llmbatch") else "job"
    return {"id": id_, "type": f"llm.v1.{kind}.succeeded", "subject": subject, "time": time, "data": data}


async def deliver(sink: Sink, table: str, one: CloudEvent, user_id: str = "user", tenant: str = "") -> None:
    target = llm_pb2.NotifyTarget(postgres=llm_pb2.PostgresTable(table=table))
    assert (await sink.deliver(target, one, user_id, tenant)).error is None


async def test_a_row_is_the_last_event_of_a_job_a_batch_or_a_pipeline(postgres: PostgresServer) -> None:
    """Whatever is delivered again, or late. The row of a repeat is not even touched."""
    subjects = ("llmjob--acme-u-r", "llmbatch--acme-u-r", "llmpipe--acme-u-r")
    async with open_sinks(settings(postgres, "last")) as sinks:
        for subject in subjects:
            await deliver(sinks["postgres"], "last", event(subject, "b", text="\x00 € 😀"), "alice", "acme")
        before = await postgres.query("SELECT * FROM last ORDER BY id")
        for subject in subjects:
            await deliver(sinks["postgres"], "last", event(subject, "b", text="\x00 € 😀"), "alice", "acme")
            await deliver(sinks["postgres"], "last", event(subject, "a", TIMES[0]), "alice", "acme")
        assert await postgres.query("SELECT * FROM last ORDER BY id") == before
        await deliver(sinks["postgres"], "last", event(subjects[0], "c", TIMES[2]), "alice", "acme")
    assert {row["id"] for row in before} == {*subjects}
    assert {(row["tenant"], row["user_id"], row["event_id"]) for row in before} == {("acme", "alice", "b")}
    assert {json.loads(row["event"])["data"]["text"] for row in before} == {"\x00 € 😀"}
    (row,) = await postgres.query("SELECT * FROM last WHERE id = $1", subjects[0])
    assert (row["event_id"], row["event_time"].isoformat()) == ("c", "2026-11-26T06:00:02+00:00")


async def test_an_outcome_replaces_the_progress_that_a_worker_whose_clock_is_ahead_has_reported(
    postgres: PostgresServer,
) -> None:
    progress = {**event("llmjob-u-1", "progress", TIMES[2]), "type": "llm.v1.job.progress"}
    async with open_sinks(settings(postgres, "ahead")) as sinks:
        for one in (progress, event("llmjob-u-1", "outcome", TIMES[1]), {**progress, "id": "late"}):
            await deliver(sinks["postgres"], "ahead", one)
    (row,) = await postgres.query("SELECT * FROM ahead")
    assert (row["type"], row["event_id"]) == ("llm.v1.job.succeeded", "outcome")


async def test_notifiers_that_begin_at_once_make_a_table_once(postgres: PostgresServer) -> None:
    async def one(number: int) -> None:
        async with open_sinks(settings(postgres, "made_once")) as sinks:
            await deliver(sinks["postgres"], "made_once", event(f"llmjob-u-{number}", str(number)))

    await asyncio.gather(*(one(number) for number in range(6)))
    assert len(await postgres.query("SELECT * FROM made_once")) == 6
    done = "SELECT step FROM llm_notifier_migrations WHERE table_name = 'made_once' ORDER BY step"
    steps = await postgres.query(done)
    assert [row["step"] for row in steps] == [1, 2]


async def test_a_killed_connection_loses_nothing(postgres: PostgresServer) -> None:
    async with open_sinks(settings(postgres, "killed")) as sinks:
        await deliver(sinks["postgres"], "killed", event("llmjob-u-1", "1"))
        await postgres.query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'notifier'")
        for _ in range(2):
            try:
                await deliver(sinks["postgres"], "killed", event("llmjob-u-2", "2"))
            except DeliveryFailed:
                continue
            break
    assert len(await postgres.query("SELECT * FROM killed")) == 2


async def test_connections_are_bounded(postgres: PostgresServer) -> None:
    async with open_sinks(settings(postgres, "bounded", postgres_connections=2)) as sinks:
        await asyncio.gather(
            *(deliver(sinks["postgres"], "bounded", event(f"llmjob-u-{number}", str(number))) for number in range(40))
        )
        found = await postgres.query("SELECT count(*) FROM pg_stat_activity WHERE usename = 'notifier'")
    assert found[0][0] <= 2
    assert len(await postgres.query("SELECT * FROM bounded")) == 40


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"postgres_url": "postgresql://notifier:wrong@127.0.0.1:{port}/postgres"}, "refused the login"),
        ({"postgres_url": "postgresql://notifier:secret@127.0.0.1:1/postgres"}, "cannot be reached"),
        ({"postgres_url": "postgresql://notifier:secret@127.0.0.1:{port}/nowhere"}, "SQLSTATE 3D000"),
        ({"postgres_migrate": False}, "has no table missing"),
        ({"postgres_url": "postgresql://poor:secret@127.0.0.1:{port}/postgres"}, "does not let the notifier"),
    ],
)
async def test_a_failure_says_what_went_wrong_without_the_address(
    postgres: PostgresServer, changes: dict[str, Any], says: str
) -> None:
    if not await postgres.query("SELECT 1 FROM pg_roles WHERE rolname = 'poor'"):
        await postgres.query("CREATE ROLE poor LOGIN PASSWORD 'secret'")
    if "postgres_url" in changes:
        changes = {**changes, "postgres_url": SecretStr(changes["postgres_url"].format(port=postgres.port))}
    async with open_sinks(settings(postgres, "missing", **changes)) as sinks:
        with pytest.raises(DeliveryFailed) as failure:
            await deliver(sinks["postgres"], "missing", event("llmjob-u-1", "1"))
    assert says in str(failure.value)
    assert "127.0.0.1" not in str(failure.value)


@pytest.mark.server
async def test_tls_checks_the_server_and_nothing_goes_in_clear(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    ca, other = Authority(tmp_path), Authority(tmp_path / "other")
    async with postgres_server(ca) as server:
        async with open_sinks(settings(server, "sealed", postgres_tls_ca=ca.path)) as sinks:
            await deliver(sinks["postgres"], "sealed", event("llmjob-u-1", "1"))
        for changes in ({"postgres_tls_ca": other.path}, {"postgres_url": SecretStr(f"{server.url}?sslmode=disable")}):
            async with open_sinks(settings(server, "sealed", **changes)) as sinks:
                with pytest.raises(DeliveryFailed):
                    await deliver(sinks["postgres"], "sealed", event("llmjob-u-2", "2"))
        assert len(await server.query("SELECT * FROM sealed")) == 1


def test_an_url_of_another_form_is_refused_without_repeating_it() -> None:
    with pytest.raises(ValidationError, match="postgresql://user:password@host/database") as error:
        NotifierSettings(postgres_url=SecretStr("mysql://user:hunter2@host/db"))
    assert "hunter2" not in str(error.value)
