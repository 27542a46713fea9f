"""The worker in the gateway that runs the workflows."""

from datetime import timedelta

from temporalio import activity
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from feed.feed import Feed
from jobs import names
from llm_pb import internal_pb2, llm_pb2
from runtime.temporal import RPC_TIMEOUT
from services.gateway.left_output import close_feed
from services.gateway.settings import GatewaySettings
from workflows.llm_delivery import LLMDeliveryWorkflow
from workflows.llm_job import LLMJobWorkflow
from workflows.llm_redelivery import LLMRedeliveryWorkflow


class LocalActivities:
    """The local activities of a job's workflow: see workflows.llm_job."""

    def __init__(self, client: Client, feed: Feed) -> None:
        self._client = client
        self._feed = feed

    @activity.defn(name=names.ACTIVITY_REQUEST_CANCEL)
    async def request_cancel(self) -> None:
        """Request the cancellation of the workflow from Temporal."""
        info = activity.info()
        if info.workflow_id is not None:
            handle = self._client.get_workflow_handle(info.workflow_id, run_id=info.workflow_run_id)
            await handle.cancel(rpc_timeout=RPC_TIMEOUT)

    @activity.defn(name=names.ACTIVITY_RECOVER_OUTPUT)
    async def recover_output(self, feed_key: str = "") -> llm_pb2.JobResult:
        """Close the job's feed and return the output that it holds. What an attempt writes later does not count.

        `feed_key` is that of the RunRequest.
        """
        result = await close_feed(self._feed, _key_of(feed_key))
        return result if result is not None else llm_pb2.JobResult()

    @activity.defn(name=names.ACTIVITY_FORGET_FEED)
    async def forget_feed(self, feed_key: str = "") -> None:
        """Notify the job's watchers at all gateways that it is about to end, then remove its feed.

        `feed_key` is that of the RunRequest.
        """
        key = _key_of(feed_key)
        await self._feed.sync(key, internal_pb2.FeedRecord(job_ending=internal_pb2.JobEnding()))
        await self._feed.remove(key)


def _key_of(feed_key: str) -> str:
    """Return the job's key in the feed, by the same rule as RunLLMOnGPU: see RunRequest."""
    info = activity.info()
    return feed_key or info.workflow_run_id or info.activity_id


def workflow_worker(client: Client, feed: Feed, settings: GatewaySettings) -> Worker:
    """Return the worker for the queue of workflows."""
    local = LocalActivities(client, feed)
    return Worker(
        client,
        task_queue=settings.workflow_queue,
        workflows=[LLMJobWorkflow, LLMDeliveryWorkflow, LLMRedeliveryWorkflow],
        activities=[local.request_cancel, local.recover_output, local.forget_feed],
        # The sandbox imports the workflow's module anew for each job, which takes half of this worker's time. It finds
        # code that is not deterministic, so tests/contract/test_replay.py uses it.
        workflow_runner=UnsandboxedWorkflowRunner(),
        no_remote_activities=True,
        # Maximum wait of a job's next step for a gateway that is gone, before another one takes it.
        sticky_queue_schedule_to_start_timeout=timedelta(seconds=2),
        max_concurrent_workflow_tasks=settings.max_concurrent_workflow_tasks,
        graceful_shutdown_timeout=settings.shutdown_grace,
    )
