"""How tests delete jobs, and look whether anything is left of them: in Temporal, in its database, on the feed."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import Any

import nats
from nats.js import JetStreamContext
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from deploy.local.stack import Stack
from feed.feed import FeedSettings
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub

PATIENCE = 240
"""Seconds. Temporal takes some seconds to delete a workflow that has just closed, and longer on a busy machine."""
FEED = FeedSettings()


async def delete(stub: LlmServiceStub, workflow_id: str) -> llm_pb2.Deletion:
    """Delete a job, and return the deletion once it has ended."""
    response = await stub.DeleteJob(llm_pb2.DeleteJobRequest(workflow_id=workflow_id), timeout=PATIENCE)
    return await until_ended(stub, response.deletion.deletion_id)


async def until_ended(stub: LlmServiceStub, deletion_id: str) -> llm_pb2.Deletion:
    """Return the deletion once it has ended."""
    async with asyncio.timeout(PATIENCE):
        while True:
            request = llm_pb2.GetDeletionRequest(deletion_id=deletion_id)
            deletion = (await stub.GetDeletion(request, timeout=PATIENCE)).deletion
            if deletion.state != llm_pb2.DELETION_STATE_IN_PROGRESS:
                return deletion
            await asyncio.sleep(0.1)


async def run_exists(temporal: Client, workflow_id: str, run_id: str | None = None) -> bool:
    """Return whether Temporal describes the run."""
    try:
        await temporal.get_workflow_handle(workflow_id, run_id=run_id).describe()
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise
        return False
    return True


@asynccontextmanager
async def feed_of(stack: Stack) -> AsyncIterator[JetStreamContext]:
    """Connect to the stack's broker."""
    connection = await nats.connect(f"nats://{stack.address('nats')}")
    try:
        yield connection.jetstream()
    finally:
        await connection.close()


async def feed_messages(stack: Stack, run_id: str) -> int:
    """Return the number of messages that the feed holds of a job."""
    async with feed_of(stack) as feed:
        info = await feed.stream_info(FEED.stream, subjects_filter=f"{FEED.subject_prefix}.{run_id}")
        return sum((info.state.subjects or {}).values())


async def feed_holds(stack: Stack, marker: str) -> bool:
    """Return whether a message of the feed, of any job, holds the marker."""
    async with feed_of(stack) as feed:
        info = await feed.stream_info(FEED.stream)
        if not info.state.messages:
            return False
        reader = await feed.subscribe(f"{FEED.subject_prefix}.*", ordered_consumer=True)
        for _ in range(info.state.messages):
            message = await reader.next_msg(timeout=PATIENCE)
            if marker.encode() in message.data:
                return True
            if message.metadata.num_pending == 0:
                return False
    return False


def rows_with(stack: Stack, marker: str) -> dict[str, int]:
    """Return the number of rows of Temporal's database that hold the marker in any column, by table."""
    found: dict[str, int] = {}
    with closing(sqlite3.connect(f"file:{stack.state_dir / 'temporal.db'}?mode=ro", uri=True, timeout=30)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
            holds = " OR ".join(f'instr("{column}", ?)' for column in columns)
            for kind in (marker, marker.encode()):
                arguments: list[Any] = [kind] * len(columns)
                (count,) = database.execute(f"SELECT count(*) FROM {table} WHERE {holds}", arguments).fetchone()
                if count:
                    found[table] = found.get(table, 0) + count
    return found


async def until_no_rows(stack: Stack, marker: str) -> None:
    """Return once no row of Temporal's database holds the marker: Temporal removes rows a while after it was asked."""
    async with asyncio.timeout(PATIENCE):
        while await asyncio.to_thread(rows_with, stack, marker):  # noqa: ASYNC110
            await asyncio.sleep(0.5)
