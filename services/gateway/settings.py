"""Settings of the gateway."""

from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from enum import StrEnum
from typing import ClassVar, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from jobs import limits, names
from jobs.cache_rules import MAX_TTL_SECONDS
from jobs.classes import BACKGROUND_QUEUE_SUFFIX
from jobs.options import (
    DEFAULT_HEARTBEAT_TIMEOUT,
    DEFAULT_NOTIFY_ATTEMPTS,
    DEFAULT_NOTIFY_BACKOFF,
    DEFAULT_NOTIFY_HOLD,
    DEFAULT_NOTIFY_INTERVAL,
    DEFAULT_NOTIFY_MAX_DURATION,
    DEFAULT_NOTIFY_MAX_INTERVAL,
    DEFAULT_NOTIFY_TIMEOUT,
    DEFAULT_PRIORITY,
    DEFAULT_QUEUE_TIMEOUT,
    DEFAULT_RETRY_ATTEMPTS,
    DEFAULT_RETRY_BACKOFF,
    DEFAULT_RETRY_INTERVAL,
    DEFAULT_RUN_TIMEOUT,
    DEFAULT_TOTAL_TIMEOUT,
)
from llm_pb import common_pb2
from runtime.auth_settings import AuthSettings
from runtime.grpc_server import PING_INTERVAL
from runtime.metrics_settings import MetricsSettings
from runtime.tenants import TenantName
from services.gateway.audit_settings import AuditSettings
from services.gateway.class_settings import Classes
from services.gateway.models.settings import EMBEDDED_MODEL, Canary, Model
from services.gateway.pipeline_settings import PipelineDefaults
from services.gateway.tenants import TenantSettings


class Role(StrEnum):
    """Which halves of the gateway a process runs."""

    ALL = "all"
    API = "api"
    WORKFLOWS = "workflows"


class GatewaySettings(AuthSettings, AuditSettings, MetricsSettings):
    """The gateway: the gRPC API, and the worker that runs the workflows."""

    RENAMED: ClassVar[Mapping[str, str]] = {"notify_within": "notify_max_duration"}
    """Settings by the name that they had in the release before. It works for one release, with a warning."""

    model_config = SettingsConfigDict(
        env_prefix="GATEWAY_", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True
    )

    role: Role = Role.ALL
    """Which halves the process runs: `all`, or `api` or `workflows` to scale them apart."""
    port: int = Field(50051, ge=0, le=65535)
    """Port to listen on; 0 takes a free one and logs it."""
    mtls_port: int | None = Field(None, ge=0, le=65535)
    """Second port to listen on, for clients with a certificate of GATEWAY_TLS_CLIENT_CA. If set, clients of
    GATEWAY_PORT need no certificate. 0 takes a free one and logs it."""
    tenants: dict[TenantName, TenantSettings] = Field(default_factory=dict)
    """Tenants with settings of their own, as JSON by name: weight, the tenant's share of the GPUs while others wait,
    0.1 to 100, 1 unless set. Its users share it. And its quotas, none unless set: requests_per_second and
    request_burst, for each gateway; max_open_jobs, at most 5000, max_output_tokens_per_day, max_files and
    max_file_bytes, the size of all files together, for all gateways together."""
    classes: Classes = Field(default_factory=Classes)
    """Classes of jobs with settings of their own, as JSON by name: HIGH, STANDARD, BACKGROUND, SCHEDULED. What is left
    out keeps its default. weight, the turns at the GPU relative to other classes of the same queue: 100, 50, 10, 5.
    rate, the Submits a second that each gateway accepts: 100, null, 10, null; null is not limited. queue_timeout and
    total_timeout, the defaults of JobTimeouts: null, which is GATEWAY_QUEUE_TIMEOUT and GATEWAY_TOTAL_TIMEOUT, for HIGH
    and STANDARD; PT12H and P1D for BACKGROUND and SCHEDULED. One above its GATEWAY_MAX_... is lowered to that."""
    reflection: bool = False
    """Whether clients may ask for the contract by server reflection, as grpcurl and buf do without the proto file. It
    asks for no credential."""
    metrics_port: int = Field(9464, ge=0, le=65535)
    """Port to serve Prometheus metrics on; 0 takes a free one and logs it."""
    models: tuple[Model, ...] = Field((EMBEDDED_MODEL,), min_length=1)
    """The models that jobs may name, as JSON. Each has name, context_tokens, max_output_tokens and default_max_tokens,
    and may have queue, tokenizer (a path), structured_output, special_tokens_in_messages, tenant, the only one that may
    name the model, and price: an object of currency ("EUR", the same for all models), prompt_per_million and
    output_per_million ("0.15"), the prices of a million tokens. A changed price is for the jobs submitted from then on.
    """
    canary: Canary | None = None
    """Runs a job of 8 tokens for each model again and again, as JSON: interval, a duration of 5 s to 5 min, PT1M unless
    set; and models, a list of names, all models unless set. The gateways keep a schedule for each: see
    docs/schedules.md. Unset: there are none, and those of before are deleted."""
    workflow_queue: str = Field(names.WORKFLOW_QUEUE, min_length=1, max_length=names.MAX_WORKFLOW_QUEUE)
    """Task queue of the workflows."""
    notify_queue: str = Field(names.NOTIFY_QUEUE, min_length=1, max_length=names.MAX_NOTIFY_QUEUE)
    """Task queue of the notifiers."""
    max_message_bytes: int = Field(4 * 1024 * 1024, gt=0)
    """Maximum size of a gRPC message in either direction, in bytes."""
    max_job_bytes: int = Field(limits.MAX_JOB_BYTES, gt=0, le=limits.MAX_JOB_BYTES)
    """Maximum size of a job, in bytes. Temporal's limit for a payload bounds it."""
    highest_priority: int = Field(DEFAULT_PRIORITY, ge=1, le=DEFAULT_PRIORITY)
    """The highest priority that a job may have: 1 (first) to 3, which is the priority of a job that names none. Jobs of
    a higher priority go before all others. With 3 there are none, and users take fair turns."""
    total_timeout: timedelta = Field(DEFAULT_TOTAL_TIMEOUT, gt=timedelta(0))
    """Default of JobTimeouts.total: the maximum time from Submit to the end of a job."""
    queue_timeout: timedelta = Field(DEFAULT_QUEUE_TIMEOUT, gt=timedelta(0))
    """Default of JobTimeouts.queue: the maximum wait for a worker."""
    run_timeout: timedelta = Field(DEFAULT_RUN_TIMEOUT, gt=timedelta(0))
    """Default of JobTimeouts.run: the maximum duration of one attempt."""
    max_total_timeout: timedelta = Field(timedelta(hours=24), gt=timedelta(0))
    """Maximum value of JobTimeouts.total."""
    max_queue_timeout: timedelta = Field(timedelta(hours=12), gt=timedelta(0))
    """Maximum value of JobTimeouts.queue."""
    max_run_timeout: timedelta = Field(timedelta(hours=12), gt=timedelta(0))
    """Maximum value of JobTimeouts.run."""
    heartbeat_timeout: timedelta = Field(DEFAULT_HEARTBEAT_TIMEOUT, gt=timedelta(0))
    """Maximum time between two heartbeats of an attempt. An attempt that exceeds it is lost, and the next one
    follows."""
    retry_interval: timedelta = Field(DEFAULT_RETRY_INTERVAL, gt=timedelta(0))
    """Wait before the second attempt of RunLLMOnGPU."""
    retry_backoff: float = Field(DEFAULT_RETRY_BACKOFF, ge=1)
    """Factor of each further wait between attempts of RunLLMOnGPU."""
    retry_attempts: int = Field(DEFAULT_RETRY_ATTEMPTS, ge=1)
    """Maximum number of attempts of RunLLMOnGPU."""
    notify_operator: bool = False
    """Whether the operator's endpoint (NOTIFIER_DEFAULT_WEBHOOK_URL, NOTIFIER_USERS, NOTIFIER_TENANTS) is notified of
    jobs that name no target. `true`: the notifier looks for an endpoint, which costs each of these jobs an activity.
    `false`: nobody is notified of them."""
    notify_hold: timedelta = Field(DEFAULT_NOTIFY_HOLD, ge=timedelta(0))
    """Maximum time for which an ended job stays open for its deliveries. They continue without it after that.
    PT0S: it closes at once."""
    notify_interval: timedelta = Field(DEFAULT_NOTIFY_INTERVAL, gt=timedelta(0))
    """Wait before the second attempt of a delivery."""
    notify_backoff: float = Field(DEFAULT_NOTIFY_BACKOFF, ge=1, le=10)
    """Factor of each further wait between attempts of a delivery."""
    notify_max_interval: timedelta = Field(DEFAULT_NOTIFY_MAX_INTERVAL, gt=timedelta(0))
    """Maximum wait between two attempts of a delivery, also when the receiver asks for a longer one."""
    notify_max_duration: timedelta = Field(DEFAULT_NOTIFY_MAX_DURATION, gt=timedelta(0))
    """Maximum time for which a delivery is attempted."""
    notify_attempts: int = Field(DEFAULT_NOTIFY_ATTEMPTS, ge=1, le=50)
    """Maximum number of attempts of a delivery."""
    notify_timeout: timedelta = Field(DEFAULT_NOTIFY_TIMEOUT, gt=timedelta(0))
    """Maximum duration of an attempt of a delivery. It must be longer than NOTIFIER_WEBHOOK_TIMEOUT."""
    redeliver_interval: timedelta = Field(timedelta(minutes=1), ge=timedelta(0))
    """Minimum time between two calls of Redeliver for one job, at all gateways. An earlier call gets
    RESOURCE_EXHAUSTED. PT0S: there is no limit, and the log may lack an attempt of two calls in the same moment."""
    delete_grace: timedelta = Field(timedelta(minutes=1), ge=timedelta(0))
    """Maximum time for a job that is deleted to close after its cancel. It is terminated then. PT0S: it is terminated
    at once."""
    delete_settle: timedelta = Field(timedelta(seconds=30), gt=timedelta(0))
    """Time for which DeleteJobs and DeleteUser must have found nothing more before they are done. It must be longer
    than Temporal's visibility takes to show a new job."""
    delete_max_open: int = Field(10, ge=1, le=1000)
    """Maximum number of deletions by DeleteJobs and DeleteUser that a tenant has open, at all gateways together.
    Further calls are RESOURCE_EXHAUSTED."""
    max_schedules: int = Field(100, ge=0, le=10_000)
    """Maximum number of schedules of a tenant, at all gateways together. A further CreateSchedule is
    RESOURCE_EXHAUSTED. Schedules that are created within the same second or two may exceed it."""
    schedule_min_interval: timedelta = Field(timedelta(minutes=1), ge=timedelta(seconds=1))
    """Minimum time between two times of an interval or a cron expression of a schedule."""
    max_backfill: int = Field(100, ge=1, le=999)
    """Maximum number of runs that one BackfillSchedule starts: 999 at most."""
    list_timeout: timedelta = Field(timedelta(seconds=10), gt=timedelta(0))
    """Maximum duration of List and ListSchedules. List is UNAVAILABLE when Temporal does not list the jobs in half of
    it. Open jobs that cannot be described in the rest are shown as JOB_STATE_RUNNING."""
    page_token_key: SecretStr | None = Field(None, min_length=16)
    """The key that signs the page tokens of List and ListSchedules, the same at every gateway: at least 16 random
    characters. Unset: the process generates a key, so its tokens are valid at this gateway only, until it ends."""
    max_calls: int = Field(6000, gt=0)
    """Maximum number of concurrent calls, streams among them. A call counts until its answer is read. Further calls get
    RESOURCE_EXHAUSTED."""
    max_calls_per_connection: int = Field(2000, gt=0, le=2**31 - 1)
    """Maximum number of concurrent calls on one connection. Further calls wait at the client, and the gateway does not
    learn of them."""
    request_timeout: timedelta = Field(timedelta(seconds=20), ge=timedelta(milliseconds=100))
    """Maximum wait for the request of a call. The gateway then ends the call."""
    unread_bytes: int = Field(64 * 1024 * 1024, ge=1024 * 1024)
    """Memory for answers that clients have not read, in bytes. An eighth of it is for streams, and requests have half
    as much again. Beyond it streams continue in messages of 4 KiB, calls with larger answers wait and may get
    RESOURCE_EXHAUSTED, and calls with larger requests get it immediately."""
    stall_timeout: timedelta = Field(timedelta(minutes=2), ge=timedelta(milliseconds=100))
    """Maximum time for which a client may take none of its unread messages, or leave one of them unread. One message
    may wait as long again for each 2 MB of others that its connection carries meanwhile, at most ten times as long. The
    gateway then closes the connection."""
    connection_idle: timedelta = Field(timedelta(minutes=15), ge=timedelta(0))
    """Time after which the gateway closes a connection without calls. PT0S: never."""
    connection_age: timedelta = Field(timedelta(hours=1), ge=timedelta(0))
    """Approximate time after which a client is asked to open a new connection. Its running calls continue. PT0S:
    never."""
    max_watchers: int = Field(5000, gt=0)
    """Maximum number of concurrent StreamStatus calls, and as many of StreamBatch and of StreamPipeline. Further calls
    get RESOURCE_EXHAUSTED."""
    max_watchers_per_user: int = Field(1000, gt=0)
    """Maximum number of concurrent StreamStatus calls for the jobs of one user. Further calls get
    RESOURCE_EXHAUSTED."""
    max_watchers_per_tenant: int = Field(2500, gt=0)
    """Maximum number of concurrent StreamStatus calls for the jobs of one tenant, and as many of StreamBatch and of
    StreamPipeline. Further calls get RESOURCE_EXHAUSTED. What has no tenant has no such limit."""
    keepalive: timedelta = Field(timedelta(seconds=15), gt=timedelta(0))
    """Maximum time between two messages of a stream."""
    ping_interval: timedelta = Field(PING_INTERVAL, gt=timedelta(0))
    """Minimum time between two HTTP/2 pings of a client, with calls or without. A client that pings more often loses
    its connection."""
    poll: timedelta = Field(timedelta(seconds=1), gt=timedelta(0))
    """Interval at which the gateway asks Temporal about a watched job whose feed is silent."""
    max_output_bytes: int = Field(limits.DEFAULT_MAX_OUTPUT_BYTES, ge=limits.MAX_INLINE_BYTES, le=1 << 30)
    """Maximum size of a job's output and logprobs, in bytes. A result of more than 1 MiB becomes a file, where gateways
    and GPU workers have a store. Without one a result has at most 1.9 MiB."""
    file_max_bytes: int = Field(512 * 1024 * 1024, ge=1024 * 1024, le=1 << 40)
    """Maximum size of a file, in bytes."""
    file_ttl: timedelta = Field(timedelta(days=30), ge=timedelta(seconds=1), le=timedelta(days=3650))
    """Time for which a file is kept, unless its upload asks for less."""
    file_upload_ttl: timedelta = Field(timedelta(days=1), ge=timedelta(seconds=1), le=timedelta(days=30))
    """Time for which an upload that has not ended is kept after its last commit."""
    max_uploads: int = Field(8, gt=0)
    """Maximum number of concurrent UploadFile calls, half of them of one tenant. Each holds up to 24 MiB. Further calls
    get RESOURCE_EXHAUSTED."""
    upload_stall_timeout: timedelta = Field(timedelta(minutes=2), gt=timedelta(0))
    """Maximum wait for the next 64 KiB of an UploadFile call, or for its end. After it the call ends as if the client
    had ended it: what was sent is committed, and another call may go on there."""
    max_downloads: int = Field(64, gt=0)
    """Maximum number of concurrent DownloadFile calls, and of StreamBatchResults calls: half of them of one tenant.
    Each holds up to 4 MiB. Further calls get RESOURCE_EXHAUSTED."""
    file_sweep_interval: timedelta = Field(timedelta(hours=6), ge=timedelta(0))
    """Interval at which a gateway that runs workflows looks for objects in the store that no file has. PT0S: never."""
    file_sweep_age: timedelta = Field(timedelta(hours=1), ge=timedelta(seconds=1))
    """Minimum age of an object that is removed because no file has it. An object that was written more than half of it
    ago does not become a part of a file any more."""
    batch_max_lines: int = Field(50_000, gt=0, le=10_000_000)
    """Maximum number of lines of a batch."""
    batch_max_bytes: int = Field(200_000_000, ge=1024, le=1 << 40)
    """Maximum size of the input of a batch, in bytes."""
    batch_max_window: timedelta = Field(timedelta(days=7), ge=timedelta(minutes=1), le=timedelta(days=365))
    """Maximum value of BatchRequest.window."""
    pipeline_max_timeout: timedelta = Field(timedelta(days=7), ge=timedelta(seconds=1), le=timedelta(days=365))
    """Maximum of PipelineRequest.total_timeout. A pipeline without one has 24 h, or this if it is less."""
    pipeline_defaults: PipelineDefaults = PipelineDefaults()
    """Defaults of the specs of pipelines that come along, in JSON, by the names of their fields in PipelineRequest:
    {"refine": {"maxRounds": 4}, "world": {"models": {"describe": "llama"}, "imageModel": "painter"}}. What a request
    sets wins. A running pipeline keeps those of its start."""
    batch_chunk_items: int = Field(128, ge=1, le=128)
    """Maximum number of items that a GPU worker takes from a batch at once."""
    batch_max_chunks: int = Field(50, ge=1, le=100)
    """Maximum number of such parts of one batch that run or wait for a worker at the same time."""
    batch_manifest_chunks: int = Field(64, ge=1, le=256)
    """Number of such parts that have ended from which on the workflow of a batch writes what it knows of them into the
    store."""
    batch_run_chunks: int = Field(500, ge=1, le=5000)
    """Number of such parts after which the workflow of a batch continues as a new run, which bounds its history. A part
    takes six events, one that ends without all its items as many again. Temporal may suggest it earlier."""
    batch_max_watched: int = Field(100, ge=4, le=1000)
    """Maximum number of items of one batch with "watch": true that run or wait for a worker at the same time."""
    max_cache_ttl: timedelta = Field(timedelta(days=1), ge=timedelta(0), le=timedelta(seconds=MAX_TTL_SECONDS))
    """Maximum of AnswerCache.ttl, for which answers may be kept for equal jobs. PT0S: no job may use the cache."""
    open_jobs_interval: timedelta = Field(timedelta(seconds=15), ge=timedelta(0))
    """Interval at which the gateway counts what has not ended, for metrics. A count is two requests to Temporal's
    visibility for each model, at most two a second, one for batches and one for pipelines. A gateway whose count
    Temporal refuses counts less often. The quotas of tenants in use are read as often. PT0S: never."""
    max_concurrent_workflow_tasks: int = Field(100, gt=1)
    """Maximum number of concurrent workflow tasks."""
    shutdown_grace: timedelta = Field(timedelta(seconds=10), ge=timedelta(0))
    """Maximum time for running calls to end after SIGTERM. PT0S: they are ended at once."""

    @field_validator("models")
    @classmethod
    def _consistent(cls, models: tuple[Model, ...]) -> tuple[Model, ...]:
        """Return the models. Raises ValueError for two of one name, a default above its maximum, two currencies."""
        for name, number in Counter(model.name for model in models).items():
            if number > 1:
                raise ValueError(f"several models have the name {name!r}")
        for model in models:
            if model.default_max_tokens > model.max_output_tokens:
                raise ValueError(f"default_max_tokens of {model.name!r} is above its max_output_tokens")
        if len({model.price.currency for model in models if model.price is not None}) > 1:
            raise ValueError("the prices of all models must have one currency")
        return models

    def queue_timeout_of(self, job_class: "common_pb2.JobClass.ValueType") -> timedelta:
        """Return the default of JobTimeouts.queue for jobs of a class."""
        own = self.classes.of(job_class).queue_timeout
        return self.queue_timeout if own is None else min(own, self.max_queue_timeout)

    def total_timeout_of(self, job_class: "common_pb2.JobClass.ValueType") -> timedelta:
        """Return the default of JobTimeouts.total for jobs of a class."""
        own = self.classes.of(job_class).total_timeout
        return self.total_timeout if own is None else min(own, self.max_total_timeout)

    @model_validator(mode="after")
    def _canaries_are_models(self) -> Self:
        known = {model.name for model in self.models}
        if self.canary is not None and (unknown := sorted({*(self.canary.models or ())} - known)):
            raise ValueError(f"GATEWAY_CANARY names models that GATEWAY_MODELS does not have: {', '.join(unknown)}")
        return self

    @property
    def listens(self) -> bool:
        """See AuthSettings."""
        return self.role != Role.WORKFLOWS

    @model_validator(mode="after")
    def _queues_differ(self) -> Self:
        queues = {model.queue for model in self.models}
        background = {f"{queue}{BACKGROUND_QUEUE_SUFFIX}" for queue in queues}
        own = {
            self.workflow_queue + suffix for suffix in ("", names.BATCH_STEPS_QUEUE_SUFFIX, names.WATCHED_QUEUE_SUFFIX)
        }
        # The gateway's worker would take activities that it does not have.
        if own & {self.notify_queue, *queues, *background}:
            raise ValueError("GATEWAY_WORKFLOW_QUEUE must differ from GATEWAY_NOTIFY_QUEUE and from the models' queues")
        if mixed := sorted(queues & background):
            raise ValueError(f"the queue {mixed[0]!r} of a model is that of another model's background jobs")
        return self

    @model_validator(mode="after")
    def _mtls_has_a_ca(self) -> Self:
        if self.mtls_port is not None and self.tls_client_ca is None:
            raise ValueError("GATEWAY_MTLS_PORT needs GATEWAY_TLS_CLIENT_CA")
        return self
