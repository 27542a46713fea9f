"""Outcomes in PostgreSQL, from a job, batch or pipeline to its row, through the real stack and a real server."""

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from deploy.local.stack import Stack
from llm_pb import batch_pb2, llm_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from tests.support.batches import Stubs, create
from tests.support.jobs import new_job, run_job
from tests.support.pipelines import follow, new_pipeline, submit
from tests.support.postgres_server import PostgresServer, postgres_server
from tests.support.stacks import running

QUEUE = "notifications-postgres"
TARGET = llm_pb2.NotifyTarget(postgres=llm_pb2.PostgresTable(table="llm_results"))


@pytest.fixture(scope="module")
async def stored(stack: Stack) -> AsyncIterator[tuple[PostgresServer, LlmServiceStub, str]]:
    """A server, and a gateway whose notifier writes to it."""
    async with postgres_server() as server:
        notifier = stack.add("notifier", {"NOTIFIER_TASK_QUEUE": QUEUE, "NOTIFIER_POSTGRES_URL": server.url})
        gateway = stack.add("gateway", {"GATEWAY_NOTIFY_QUEUE": QUEUE})
        async with running(stack, notifier, gateway) as stub:
            yield server, stub, stack.address(gateway.name)


async def row_of(server: PostgresServer, id_: str) -> Any:
    (row,) = await server.query("SELECT * FROM llm_results WHERE id = $1", id_)
    return row


async def test_the_outcome_of_a_job_is_a_row(stored: tuple[PostgresServer, LlmServiceStub, str]) -> None:
    server, stub, _ = stored
    options = llm_pb2.NotifyOptions(
        include_output=True, events=[llm_pb2.NOTIFY_EVENT_STARTED, llm_pb2.NOTIFY_EVENT_FINISHED]
    )
    seen = await run_job(stub, new_job(params={"max_tokens": 5}, notify=[TARGET], notify_options=options))
    status = seen.final.status
    (shown,) = status.notifications
    assert (shown.target, shown.state) == ("postgres:llm_results", llm_pb2.NOTIFY_STATE_DELIVERED)
    row = await row_of(server, status.workflow_id)
    assert (row["type"], row["tenant"]) == ("llm.v1.job.succeeded", "")
    assert json.loads(row["event"])["data"]["result"]["output"] == seen.final.result.output
    again = llm_pb2.RedeliverRequest(workflow_id=status.workflow_id)
    await stub.Redeliver(again, timeout=60)
    assert (await row_of(server, status.workflow_id))["event"] == row["event"]


async def test_the_outcomes_of_a_batch_and_of_a_pipeline_are_rows(
    stored: tuple[PostgresServer, LlmServiceStub, str],
) -> None:
    server, _, address = stored
    async with grpc.aio.insecure_channel(address) as channel:
        stubs = Stubs(FileServiceStub(channel), BatchServiceStub(channel))
        ended = await stubs.end((await create(stubs, b"{}\n", notify=[TARGET])).batch_id)
        pipelines: Any = PipelineServiceStub(channel)
        pipeline = new_pipeline("deep", StringValue(value="one"), notify=[TARGET])
        id_ = (await submit(pipelines, pipeline)).pipeline_id
        (shown,) = (await follow(pipelines, id_)).status.notifications
    assert (shown.target, shown.state) == ("postgres:llm_results", llm_pb2.NOTIFY_STATE_DELIVERED)
    row = await row_of(server, id_)
    assert (row["type"], row["user_id"]) == ("llm.v1.pipeline.succeeded", pipeline.user_id)
    assert json.loads(row["event"])["data"]["status"]["root"]["counts"]["total"] == "1"
    assert ended.state == batch_pb2.BATCH_STATE_FAILED
    assert (await row_of(server, ended.batch_id))["type"] == "llm.v1.batch.failed"


async def test_a_table_that_is_not_allowed_is_refused_for_good(
    stored: tuple[PostgresServer, LlmServiceStub, str],
) -> None:
    _, stub, _ = stored
    other = llm_pb2.NotifyTarget(postgres=llm_pb2.PostgresTable(table="pg_authid"))
    seen = await run_job(stub, new_job(params={"max_tokens": 2}, notify=[other]))
    (shown,) = seen.final.status.notifications
    assert shown.state == llm_pb2.NOTIFY_STATE_FAILED
