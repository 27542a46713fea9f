"""The worker in the gateway that runs the workflows."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Final

from temporalio import activity
from temporalio.client import Client
from temporalio.worker import Worker

from encryption import Encryption
from feed.answers import Answers
from feed.feed import Feed
from jobs import names
from jobs.ids import tenant_of
from llm_pb import internal_pb2, llm_pb2
from pipelines.workflow import LLMPipelineWorkflow
from runtime.background import beside
from runtime.temporal import RPC_TIMEOUT
from services.gateway.batches.activities import BatchActivities
from services.gateway.batches.outputs import BatchFiles
from services.gateway.batches.processes import HEARTBEAT, MAX_PROCESSES
from services.gateway.batches.reader import BatchReader
from services.gateway.batches.submission import BatchSubmission
from services.gateway.batches.sweeping import BatchSweeper
from services.gateway.batches.watched import RunWatchedChunk
from services.gateway.batches.watched_jobs import WatchedJobs
from services.gateway.cancel import JobCancellation
from services.gateway.deletion.owned import OwnedDeletion
from services.gateway.deletion.steps import DeletionSteps
from services.gateway.delivery_reader import DeliveryReader
from services.gateway.effects import Effects
from services.gateway.files.outputs import JobOutputs, OutputSweeper
from services.gateway.files.produced import ProducedFiles
from services.gateway.files.quotas import FileQuotas
from services.gateway.files.reader import FileReader
from services.gateway.files.removal import FileRemoval, Sweeper
from services.gateway.job_bounds import JobBounds
from services.gateway.job_reader import JobReader
from services.gateway.left_output import recovered_output
from services.gateway.metrics import GatewayMetrics
from services.gateway.models.catalogue import Models
from services.gateway.models.trained import TrainedModels
from services.gateway.page_token import PageTokens
from services.gateway.pipelines.datasets import Datasets
from services.gateway.pipelines.reader import PipelineReader
from services.gateway.pipelines.steps import PipelineSteps
from services.gateway.pipelines.submission import PipelineSubmission
from services.gateway.pipelines.texts import PipelineTexts
from services.gateway.prompt_files import PromptFiles
from services.gateway.quotas.admission import OpenJobQuotas
from services.gateway.quotas.ended_jobs import LedgerActivities
from services.gateway.quotas.ledgers import SlotReleases
from services.gateway.runs import Runs
from services.gateway.schedules.jobs import ScheduledJobs
from services.gateway.settings import GatewaySettings
from services.gateway.submission import JobSubmission
from services.gateway.told import Telling
from services.gateway.unreadable_jobs import ending_unreadable
from services.gateway.waiters import signal_settled
from services.gateway.workflow_runner import ContainedRunner, patient
from store.store import Store
from workflows.llm_batch import LLMBatchWorkflow
from workflows.llm_deletion import LLMBulkDeletionWorkflow, LLMDeletionWorkflow, LLMJobTombstone
from workflows.llm_delivery import LLMDeliveryWorkflow
from workflows.llm_file import LLMFileWorkflow
from workflows.llm_job import LLMJobWorkflow
from workflows.llm_ledger import LLMLedgerWorkflow
from workflows.llm_models import LLMModelsWorkflow
from workflows.llm_redelivery import LLMRedeliveryWorkflow
from workflows.llm_scheduled import LLMScheduledWorkflow
from workflows.llm_user_deletion import LLMUserDeletionWorkflow

_MAX_ACTIVITIES: Final = 40
"""Maximum number of steps of deletions, removals of files and starts of scheduled jobs that run concurrently. All other
activities are local."""
_MAX_WATCHED_CHUNKS: Final = 100
"""Maximum number of chunks of watched items that run concurrently. They wait nearly all the time."""


class LocalActivities:
    """The local activities of a job's workflow: see workflows.llm_job."""

    def __init__(self, client: Client, feed: Feed, store: Store | None) -> None:
        self._client = client
        self._feed = feed
        self._store = store
        self._releases = SlotReleases(client)

    @activity.defn(name=names.ACTIVITY_REQUEST_CANCEL)
    async def request_cancel(self) -> None:
        """Request the cancellation of the workflow from Temporal."""
        info = activity.info()
        if info.workflow_id is not None:
            handle = self._client.get_workflow_handle(info.workflow_id, run_id=info.workflow_run_id)
            await handle.cancel(rpc_timeout=RPC_TIMEOUT)

    @activity.defn(name=names.ACTIVITY_RECOVER_OUTPUT)
    async def recover_output(
        self, feed_key: str = "", max_output_bytes: int = 0, max_inline_bytes: int = 0
    ) -> llm_pb2.JobResult:
        """Close the job's feed and return the output that it holds. What an attempt writes later does not count.

        The arguments are those of the RunRequest: without `max_output_bytes` the output is no file.
        """
        store, job_id = self._store if max_output_bytes else None, activity.info().workflow_id or ""
        result = await recovered_output(self._feed_of_tenant(), _key_of(feed_key), store, job_id, max_inline_bytes)
        return result if result is not None else llm_pb2.JobResult()

    @activity.defn(name=names.ACTIVITY_FORGET_FEED)
    async def forget_feed(
        self, feed_key: str = "", ledger: str = "", output_tokens: int = 0, waiter: str = "", reservation: int = 0
    ) -> None:
        """Notify the job's watchers at all gateways that it is about to end, then remove its feed.

        `feed_key` is that of the RunRequest. `ledger` is the ledger that holds a slot for the job, which is released;
        the job has used `output_tokens`, and `reservation` is as in ReserveRequest.reservations. It is released here
        because a local activity of its own would cost each job an event, and because a job whose outcome is settled
        uses no GPU any more. `waiter` is the workflow that waits for the job. It is signalled, and finds out by itself
        if it is not.
        """
        job_id = activity.info().workflow_id
        if ledger and job_id:
            await self._releases.release(ledger, job_id, output_tokens, reservation)
        if waiter:
            await signal_settled(self._client, waiter)
        key, feed = _key_of(feed_key), self._feed_of_tenant()
        await feed.sync(key, internal_pb2.FeedRecord(job_ending=internal_pb2.JobEnding()))
        await feed.remove(key)

    def _feed_of_tenant(self) -> Feed:
        return self._feed.of_tenant(tenant_of(activity.info().workflow_id or ""))


def _key_of(feed_key: str) -> str:
    """Return the job's key in the feed, by the same rule as RunLLMOnGPU: see RunRequest."""
    info = activity.info()
    return feed_key or info.workflow_run_id or info.activity_id


@asynccontextmanager
async def running_workflows(
    client: Client,
    feed: Feed,
    answers: Answers,
    settings: GatewaySettings,
    metrics: GatewayMetrics,
    encryption: Encryption | None,
    store: Store | None,
) -> AsyncIterator[None]:
    """Run workflows, and sweep the store, while the context is open."""
    async with AsyncExitStack() as stack:
        if store is not None:
            reader = FileReader(client, PageTokens(None), encryption, knows_tenants=False)
            jobs = JobReader(client, Models(settings.models), DeliveryReader(client, Telling(client)), feed)
            files = Sweeper(store, reader, OutputSweeper(store, jobs, settings), settings)
            batches = BatchSweeper(client, store, settings)
            await stack.enter_async_context(beside(files.keep_sweeping(), batches.keep_sweeping()))
        await stack.enter_async_context(workflow_worker(client, feed, answers, settings, metrics, encryption, store))
        await stack.enter_async_context(batch_steps_worker(client, feed, settings, encryption, store))
        await stack.enter_async_context(watched_worker(client, feed, settings, metrics, encryption, store))
        yield


def _batch_activities(
    client: Client, feed: Feed, settings: GatewaySettings, encryption: Encryption | None, store: Store | None
) -> BatchActivities:
    jobs = JobReader(client, Models(settings.models), DeliveryReader(client, Telling(client)), feed)
    outputs = JobOutputs(store, jobs) if store is not None else None
    reader = FileReader(client, PageTokens(None), encryption, outputs, knows_tenants=False)
    files = BatchFiles(ProducedFiles(client, reader, settings, encryption))
    return BatchActivities(client, store, feed, reader, files, SlotReleases(client))


def batch_steps_worker(
    client: Client, feed: Feed, settings: GatewaySettings, encryption: Encryption | None, store: Store | None
) -> Worker:
    """Return the worker for the steps of batches that take a core for minutes. Further ones wait in their queue."""
    batches = _batch_activities(client, feed, settings, encryption, store)
    return Worker(
        client,
        task_queue=f"{settings.workflow_queue}{names.BATCH_STEPS_QUEUE_SUFFIX}",
        activities=[batches.plan_batch, batches.merge_batch],
        max_concurrent_activities=MAX_PROCESSES,
        max_concurrent_activity_task_polls=1,
        # The SDK would send one each 24 s, and a gateway that is late by 6 s would lose the step.
        max_heartbeat_throttle_interval=HEARTBEAT,
        graceful_shutdown_timeout=settings.shutdown_grace,
    )


def watched_worker(
    client: Client,
    feed: Feed,
    settings: GatewaySettings,
    metrics: GatewayMetrics,
    encryption: Encryption | None,
    store: Store | None,
) -> Worker:
    """Return the worker for the items of batches that are jobs of their own."""
    models = Models(settings.models)
    reader = JobReader(client, models, DeliveryReader(client, Telling(client)), feed)
    watched = RunWatchedChunk(store, WatchedJobs(client, reader, models, settings, encryption), metrics)
    return Worker(
        client,
        task_queue=settings.workflow_queue + names.WATCHED_QUEUE_SUFFIX,
        activities=[watched.__call__],
        max_concurrent_activities=_MAX_WATCHED_CHUNKS,
        max_concurrent_activity_task_polls=1,
        graceful_shutdown_timeout=settings.shutdown_grace,
    )


def workflow_worker(
    client: Client,
    feed: Feed,
    answers: Answers,
    settings: GatewaySettings,
    metrics: GatewayMetrics,
    encryption: Encryption | None = None,
    store: Store | None = None,
) -> Worker:
    """Return the worker for the queue of workflows."""
    batches = _batch_activities(client, feed, settings, encryption, store)
    local, of_ledgers = LocalActivities(client, feed, store), LedgerActivities(client)
    telling = Telling(client)
    deliveries = DeliveryReader(client, telling)
    models = Models(settings.models)
    reader = JobReader(client, models, deliveries, feed)
    outputs = JobOutputs(store, reader) if store is not None else None
    file_reader = FileReader(client, PageTokens(None), encryption, outputs, knows_tenants=False)
    effects = Effects(client, settings.workflow_queue)
    open_jobs = OpenJobQuotas(client, settings.workflow_queue, settings.tenants, metrics)
    has_store = store is not None
    submission = JobSubmission(effects, models, reader, open_jobs, settings, metrics, encryption, has_store=has_store)
    bounds = JobBounds(models, settings, PromptFiles(file_reader, store, models))
    batch_reader, pipeline_reader = BatchReader(client, deliveries), PipelineReader(client, deliveries, telling)
    datasets, trained = Datasets(file_reader, has_store=has_store), TrainedModels(client, effects)
    scheduled = ScheduledJobs(
        submission,
        bounds,
        JobCancellation(effects, reader),
        reader,
        (BatchSubmission(effects, batch_reader, file_reader, open_jobs, settings, encryption), batch_reader),
        (
            PipelineSubmission(effects, pipeline_reader, open_jobs, settings, encryption, datasets, trained),
            pipeline_reader,
        ),
    )
    in_pipelines = PipelineSteps(models, settings, bounds, file_reader, feed, reader, Runs(client), has_store=has_store)
    produced = ProducedFiles(client, file_reader, settings, encryption)
    file_quotas = FileQuotas(client, settings.workflow_queue, file_reader, settings.tenants, metrics)
    texts, files = PipelineTexts(file_reader, produced, file_quotas, store), FileRemoval(store, file_quotas)
    steps = DeletionSteps(client, feed, answers, reader, deliveries, settings, encryption, store)
    owned = OwnedDeletion(client, encryption)
    worker = Worker(
        ending_unreadable(client),
        task_queue=settings.workflow_queue,
        workflows=[
            LLMJobWorkflow,
            LLMDeliveryWorkflow,
            LLMRedeliveryWorkflow,
            LLMLedgerWorkflow,
            LLMDeletionWorkflow,
            LLMBulkDeletionWorkflow,
            LLMUserDeletionWorkflow,
            LLMJobTombstone,
            LLMScheduledWorkflow,
            LLMFileWorkflow,
            LLMBatchWorkflow,
            LLMPipelineWorkflow,
            LLMModelsWorkflow,
        ],
        activities=[
            *(local.request_cancel, local.recover_output, local.forget_feed),
            *(of_ledgers.find_ended_jobs, open_jobs.lease),
            *(steps.stop_job, steps.inspect_job, steps.keep_job_id, steps.remove_job, steps.find_jobs),
            *(owned.delete_schedules, owned.delete_files),
            files.remove_file,
            *(scheduled.start, scheduled.check),
            *(batches.collect_chunks, batches.write_manifest, batches.clean_batch),
            # Batches of earlier versions have these steps here.
            *(batches.plan_batch, batches.merge_batch),
            *(in_pipelines.admit_step, in_pipelines.admit_steps, in_pipelines.admit_batch),
            *(in_pipelines.recall_step, in_pipelines.left_usage, in_pipelines.publish_pipeline),
            *(texts.read_text, texts.write_text),
        ],
        # The sandbox imports the workflow's module again for each job, which takes half of this worker's time. It finds
        # code that is not deterministic, so tests/contract/test_replay.py uses it.
        workflow_runner=ContainedRunner(),
        max_concurrent_activities=_MAX_ACTIVITIES,
        max_concurrent_activity_task_polls=1,
        # Maximum wait of a job's next step for a gateway that is gone, before another one takes it.
        sticky_queue_schedule_to_start_timeout=timedelta(seconds=2),
        max_concurrent_workflow_tasks=settings.max_concurrent_workflow_tasks,
        graceful_shutdown_timeout=settings.shutdown_grace,
    )
    return patient(worker)
