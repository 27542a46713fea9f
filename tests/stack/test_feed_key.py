"""RunLLMOnGPU with a feed key that its workflow chooses, as a workflow with several generations does."""

import uuid
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from pydantic import SecretStr
from temporalio import workflow
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from deploy.local.stack import Stack
from feed.feed import FeedSettings
from feed.nats import NatsFeed
from jobs import names
from llm_pb import internal_pb2
from services.gateway.left_output import recovered_output
from services.gateway.workflow_worker import LocalActivities
from tests.support.jobs import new_job
from workflows import activities

TIMEOUT = timedelta(minutes=1)


@workflow.defn
class TwoGenerations:
    """Workflow that runs two jobs concurrently, removes the first one's feed, and returns outputs and feed contents."""

    @workflow.run
    async def run(self, keys: list[str]) -> list[str]:
        requests = [
            internal_pb2.RunRequest(job=new_job(f"Say {key}.", params={"max_tokens": 20}), feed_key=key) for key in keys
        ]
        for request in requests:
            request.create_time.FromDatetime(workflow.now())
        running = [
            workflow.start_activity(
                activities.run_llm_on_gpu,
                request,
                task_queue=names.GPU_QUEUE,
                schedule_to_close_timeout=TIMEOUT,
                heartbeat_timeout=TIMEOUT,
            )
            for request in requests
        ]
        results = [await run for run in running]
        for key in keys:
            results.append(
                await workflow.execute_local_activity(activities.recover_output, key, start_to_close_timeout=TIMEOUT)
            )
        await workflow.execute_local_activity(activities.forget_feed, keys[0], start_to_close_timeout=TIMEOUT)
        return [result.output for result in results]


@pytest.fixture
async def feed(stack: Stack) -> AsyncIterator[NatsFeed]:
    feed = NatsFeed(FeedSettings(url=SecretStr(f"nats://{stack.address('nats')}")))
    feed.start()
    await feed.wait_ready()
    yield feed
    await feed.close()


async def test_a_workflow_chooses_the_keys_of_its_generations(temporal: Client, feed: NatsFeed) -> None:
    """Records of two keys do not mix. Reading back and removing use the same key."""
    id_, queue = uuid.uuid4().hex, uuid.uuid4().hex
    keys = [f"{id_}/write", f"{id_}/v1.2 > *"]
    local = LocalActivities(temporal, feed, None)
    async with Worker(
        temporal,
        task_queue=queue,
        workflows=[TwoGenerations],
        activities=[local.recover_output, local.forget_feed],
        workflow_runner=UnsandboxedWorkflowRunner(),
    ):
        handle = await temporal.start_workflow(
            TwoGenerations.run, keys, id=id_, task_queue=queue, execution_timeout=TIMEOUT
        )
        first, second, *recovered = await handle.result()
    assert first != second
    assert recovered == [first, second]
    left = [await recovered_output(feed, key, None, "") for key in (*keys, handle.first_execution_run_id or "")]
    assert [result and result.output for result in left] == ["", second, ""]
