"""The half of the gateway that serves the API: its parts joined, from listening to the last call's end."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from opentelemetry import trace
from opentelemetry.metrics import Meter
from temporalio.client import Client

from encryption import Encryption
from feed.feed import Feed
from feed.worker_reports import WorkerReports
from llm_pb import batch_pb2_grpc, file_pb2_grpc, llm_pb2_grpc, pipeline_pb2_grpc, schedule_pb2_grpc
from runtime import temporal
from runtime.answers import Answers
from runtime.audit import AuditInterceptor
from runtime.background import beside
from runtime.grpc_server import GrpcServer, Limits
from runtime.grpc_telemetry import RpcTelemetryInterceptor
from runtime.health import Readiness
from services.gateway.auditing import open_audit
from services.gateway.authentication import auth_interceptor
from services.gateway.batches.listing import BatchListing
from services.gateway.batches.reader import BatchReader
from services.gateway.batches.results import BatchStreams
from services.gateway.batches.servicer import BatchServicer
from services.gateway.batches.submission import BatchSubmission
from services.gateway.cancel import JobCancellation
from services.gateway.deletion.service import DeletionService
from services.gateway.delivery_reader import DeliveryReader
from services.gateway.delivery_service import DeliveryService
from services.gateway.effects import Effects
from services.gateway.files.outputs import JobOutputs
from services.gateway.files.quotas import FileQuotas
from services.gateway.files.reader import FileReader
from services.gateway.files.servicer import FileServicer
from services.gateway.interceptor import RequestInterceptor, refusal
from services.gateway.job_bounds import JobBounds
from services.gateway.job_inputs import JobInputs
from services.gateway.job_reader import JobReader
from services.gateway.listing import JobListing
from services.gateway.methods import SERVICES
from services.gateway.metrics import GatewayMetrics
from services.gateway.models.catalogue import Models
from services.gateway.models.queue_rates import set_queue_rates
from services.gateway.models.trained import TrainedModels
from services.gateway.models.workers import Workers
from services.gateway.open_jobs import OpenJobs
from services.gateway.open_work import OpenWork
from services.gateway.page_token import PageTokens
from services.gateway.pipelines.answers import StepAnswers
from services.gateway.pipelines.datasets import Datasets
from services.gateway.pipelines.listing import PipelineListing
from services.gateway.pipelines.live import LiveSteps
from services.gateway.pipelines.reader import PipelineReader
from services.gateway.pipelines.servicer import PipelineServicer
from services.gateway.pipelines.streams import PipelineStreams
from services.gateway.pipelines.submission import PipelineSubmission
from services.gateway.prompt_files import PromptFiles
from services.gateway.quotas.admission import OpenJobQuotas, RequestQuotas
from services.gateway.quotas.usage import QuotaUsage
from services.gateway.schedules.bounds import ScheduleBounds, WorkBounds
from services.gateway.schedules.listing import ScheduleListing
from services.gateway.schedules.reader import ScheduleReader
from services.gateway.schedules.service import ScheduleService
from services.gateway.schedules.servicer import ScheduleServicer
from services.gateway.scopes import require_all_methods
from services.gateway.servicer import LlmServicer
from services.gateway.settings import GatewaySettings
from services.gateway.streams.streams import Streams
from services.gateway.submission import JobSubmission
from services.gateway.told import Telling
from store.store import Store

_log = logging.getLogger(__name__)


@asynccontextmanager
async def serving_api(
    client: Client,
    feed: Feed,
    reports: WorkerReports,
    settings: GatewaySettings,
    meter: Meter,
    metrics: GatewayMetrics,
    readiness: Readiness,
    encryption: Encryption | None = None,
    store: Store | None = None,
    *,
    knows_tenants: bool,
) -> AsyncIterator[None]:
    """Serve the API while the context is open; then drain: say NOT_SERVING, end streams, give calls their grace.

    `knows_tenants`: whether the namespace has the search attribute TenantId.
    """
    require_all_methods(SERVICES.values())
    auth = await auth_interceptor(settings, readiness)
    models = Models(settings.models, settings.classes)
    telling = Telling(client)
    delivery_reader = DeliveryReader(client, telling)
    reader = JobReader(client, models, delivery_reader, feed)
    workers = Workers(reports, metrics.ignored_reports)
    await reports.receive_reports(workers.take)
    audit = open_audit(settings, metrics.audit_lost, readiness)
    inputs = JobInputs(client)
    streams = Streams(reader, feed, settings, metrics, store)
    if settings.page_token_key is None:
        _log.info(
            "page tokens of List are valid at this gateway only, until it ends: GATEWAY_PAGE_TOKEN_KEY is not set"
        )
    page_tokens = PageTokens(settings.page_token_key)
    requests = RequestQuotas(settings.tenants, metrics)
    open_jobs = OpenJobQuotas(client, settings.workflow_queue, settings.tenants, metrics)
    outputs = JobOutputs(store, reader) if store is not None else None
    file_reader = FileReader(client, page_tokens, encryption, outputs, knows_tenants=knows_tenants)
    file_quotas = FileQuotas(client, settings.workflow_queue, file_reader, settings.tenants, metrics)
    bounds = JobBounds(models, settings, PromptFiles(file_reader, store, models))
    effects = Effects(client, settings.workflow_queue)
    has_store = store is not None
    submission = JobSubmission(effects, models, reader, open_jobs, settings, metrics, encryption, has_store=has_store)
    listing = JobListing(client, reader, page_tokens, settings, encryption, knows_tenants=knows_tenants)
    batch_reader = BatchReader(client, delivery_reader)
    of_pipelines = PipelineReader(client, delivery_reader, telling)
    deliveries = DeliveryService(client, effects, reader, batch_reader, of_pipelines, delivery_reader, settings)
    deletions = DeletionService(client, effects, reader, delivery_reader, settings, encryption)
    answers = Answers(settings.max_calls, settings.unread_bytes)
    metrics.observe_unread(meter, lambda: answers.held_bytes)
    trained = TrainedModels(client, effects)
    service = LlmServicer(
        client,
        submission,
        JobCancellation(effects, reader),
        listing,
        deliveries,
        deletions,
        models,
        trained,
        workers,
        reader,
        inputs,
        streams,
        requests,
        open_jobs,
        file_quotas,
        answers,
        settings.tenants,
    )
    files = FileServicer(effects, file_reader, store, file_quotas, answers, settings, encryption)
    schedule_listing = ScheduleListing(client, page_tokens, settings, encryption, knows_tenants=knows_tenants)
    batch_streams = BatchStreams(batch_reader, store, settings)
    batch_submission = BatchSubmission(effects, batch_reader, file_reader, open_jobs, settings, encryption)
    batch_listing = BatchListing(client, batch_reader, page_tokens, settings, encryption, knows_tenants=knows_tenants)
    batches = BatchServicer(batch_submission, batch_reader, batch_streams, batch_listing, answers)
    live_steps = LiveSteps(batch_reader, client.data_converter)
    pipeline_streams = PipelineStreams(of_pipelines, live_steps, streams, feed, settings)
    datasets = Datasets(file_reader, has_store=has_store)
    pipeline_submission = PipelineSubmission(effects, of_pipelines, open_jobs, settings, encryption, datasets, trained)
    schedules = ScheduleService(
        client, effects, ScheduleReader(client), schedule_listing, settings, encryption, batch_submission
    )
    of_schedules = ScheduleBounds(WorkBounds(bounds, batch_submission, pipeline_submission), settings)
    pipelines = PipelineServicer(
        pipeline_submission,
        of_pipelines,
        live_steps,
        pipeline_streams,
        PipelineListing(client, of_pipelines, page_tokens, settings, encryption, knows_tenants=knows_tenants),
        StepAnswers(effects, of_pipelines),
        answers,
    )
    server = GrpcServer(
        [*SERVICES],
        settings.host,
        settings.port,
        _limits(settings),
        [
            RequestInterceptor(
                requests.take,
                {
                    "Submit": bounds.check,
                    "List": page_tokens.check,
                    "ListFiles": page_tokens.check,
                    "ListSchedules": page_tokens.check,
                    "CreateSchedule": of_schedules.check,
                    "UpdateSchedule": of_schedules.check,
                    "BackfillSchedule": of_schedules.check_backfill,
                    "CreateBatch": batch_submission.check,
                    "ListBatches": page_tokens.check,
                    "SubmitPipeline": pipeline_submission.check,
                    "ListPipelines": page_tokens.check,
                },
                {"Submit": service.submit_refused},
                answers,
                settings.max_job_bytes,
                settings.upload_stall_timeout,
            )
        ],
        refusal,
        RpcTelemetryInterceptor(trace.get_tracer(__package__), meter),
        auth,
        AuditInterceptor(audit) if audit is not None else None,
        settings.tls,
        settings.mtls_port,
        reflection=settings.reflection,
    )
    llm_pb2_grpc.add_LlmServiceServicer_to_server(service, server.server)
    file_pb2_grpc.add_FileServiceServicer_to_server(files, server.server)
    schedule_pb2_grpc.add_ScheduleServiceServicer_to_server(
        ScheduleServicer(schedules, schedule_listing), server.server
    )
    batch_pb2_grpc.add_BatchServiceServicer_to_server(batches, server.server)
    pipeline_pb2_grpc.add_PipelineServiceServicer_to_server(pipelines, server.server)

    try:
        await server.start(readiness)
    except RuntimeError as error:
        raise RuntimeError(
            f"{error}; GATEWAY_HOST, GATEWAY_PORT and GATEWAY_MTLS_PORT choose another address"
        ) from error
    readiness.describe(address=server.address)
    readiness.need("grpc", "is NOT_SERVING", server.serving)
    if audit is not None:
        readiness.want("audit", "does not store records: writes are refused", lambda: audit.available)
    try:
        async with beside(
            server.follow(partial(temporal.answers, client)),
            server.close_stalled(partial(answers.stalled, settings.stall_timeout)),
            OpenJobs(client, models, meter).keep_counting(settings.open_jobs_interval),
            OpenWork(client, meter, "batch").keep_counting(settings.open_jobs_interval),
            OpenWork(client, meter, "pipeline").keep_counting(settings.open_jobs_interval),
            QuotaUsage(open_jobs, meter).keep_counting(settings.open_jobs_interval),
            set_queue_rates(client, settings),
            auth.keep_current(),
        ):
            yield
    finally:
        await server.drain()
        streams.close()
        batch_streams.close()
        pipeline_streams.close()
        await server.stop(settings.shutdown_grace)
        if audit is not None:
            await audit.close()


def _limits(settings: GatewaySettings) -> Limits:
    return Limits(
        max_message_bytes=settings.max_message_bytes,
        max_calls=settings.max_calls,
        max_calls_per_connection=settings.max_calls_per_connection,
        ping_interval=settings.ping_interval,
        request_timeout=settings.request_timeout,
        connection_idle=settings.connection_idle,
        connection_age=settings.connection_age,
    )
