"""Settings of the gateway."""

from collections.abc import Mapping
from datetime import timedelta
from enum import StrEnum
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, FilePath, SecretStr
from pydantic_settings import SettingsConfigDict

from jobs import limits, names
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
from models import DOCSTRINGS
from runtime.grpc_server import PING_INTERVAL
from runtime.tls import MetricsTlsSettings, ServerTlsSettings


class Role(StrEnum):
    """Which halves of the gateway a process runs."""

    ALL = "all"
    API = "api"
    WORKFLOWS = "workflows"


class Model(BaseModel):
    """A model that jobs may name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    context_tokens: int = Field(gt=0)
    max_output_tokens: int = Field(gt=0)
    default_max_tokens: int = Field(gt=0)
    queue: str = Field(names.GPU_QUEUE, min_length=1, max_length=limits.MAX_TEMPORAL_ID)
    """Task queue of its workers: one of its own when several models are served."""
    tokenizer: FilePath | None = None
    """Its tokenizer.json; with it the gateway refuses a prompt that cannot fit and a message that holds a special
    token. Without, the worker does."""
    structured_output: bool = False
    special_tokens_in_messages: bool = False
    """Whether a chat message may hold special tokens of the tokenizer. Set GPU_WORKER_SPECIAL_TOKENS_IN_MESSAGES, too:
    the worker decides for itself."""


EMBEDDED_MODEL = Model(
    name="docstrings",
    context_tokens=2048,
    max_output_tokens=2048,
    default_max_tokens=256,
    tokenizer=DOCSTRINGS / "tokenizer.json",
)


class GatewaySettings(ServerTlsSettings, MetricsTlsSettings):
    """The gateway: the gRPC API, and the worker that runs the workflows."""

    RENAMED: ClassVar[Mapping[str, str]] = {"notify_within": "notify_max_duration"}
    """Settings by the name that they had in the release before. It works for one release, with a warning."""

    model_config = SettingsConfigDict(
        env_prefix="GATEWAY_", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True
    )

    role: Role = Role.ALL
    """`all`, or `api` or `workflows` to scale the halves apart."""
    host: str = "127.0.0.1"
    """Address to listen on; loopback unless set."""
    port: int = Field(50051, ge=0, le=65535)
    """Port to listen on; 0 takes a free one and logs it."""
    metrics_host: str = "127.0.0.1"
    """Address to serve Prometheus metrics on; loopback unless set."""
    metrics_port: int = Field(9464, ge=0, le=65535)
    """Port to serve Prometheus metrics on; 0 takes a free one and logs it."""
    models: tuple[Model, ...] = Field((EMBEDDED_MODEL,), min_length=1)
    """The models as JSON: name, context_tokens, max_output_tokens, default_max_tokens; queue, tokenizer (a path),
    structured_output, special_tokens_in_messages."""
    workflow_queue: str = Field(names.WORKFLOW_QUEUE, min_length=1, max_length=limits.MAX_TEMPORAL_ID)
    """Task queue of the workflows."""
    notify_queue: str = Field(names.NOTIFY_QUEUE, min_length=1, max_length=names.MAX_NOTIFY_QUEUE)
    """Task queue of the notifiers."""
    max_message_bytes: int = Field(4 * 1024 * 1024, gt=0)
    """Largest gRPC message taken or sent."""
    max_job_bytes: int = Field(limits.MAX_JOB_BYTES, gt=0, le=limits.MAX_JOB_BYTES)
    """Largest job; Temporal's payload limit bounds it."""
    highest_priority: int = Field(DEFAULT_PRIORITY, ge=1, le=DEFAULT_PRIORITY)
    """The highest priority that a job may ask for: 1 (first) to 3, the priority of a job that asks for none. Jobs of a
    higher priority go before all others. By default none do, and users take fair turns."""
    total_timeout: timedelta = DEFAULT_TOTAL_TIMEOUT
    """A job's whole life, when it does not say."""
    queue_timeout: timedelta = DEFAULT_QUEUE_TIMEOUT
    """Wait for a worker, when the job does not say."""
    run_timeout: timedelta = DEFAULT_RUN_TIMEOUT
    """Run of one attempt, when the job does not say."""
    max_total_timeout: timedelta = timedelta(hours=24)
    """Most that a job may ask for."""
    max_queue_timeout: timedelta = timedelta(hours=12)
    """Most that a job may ask for."""
    max_run_timeout: timedelta = timedelta(hours=12)
    """Most that a job may ask for."""
    heartbeat_timeout: timedelta = DEFAULT_HEARTBEAT_TIMEOUT
    """Silence after which a worker is lost."""
    retry_interval: timedelta = DEFAULT_RETRY_INTERVAL
    """Wait before an activity's second attempt."""
    retry_backoff: float = Field(DEFAULT_RETRY_BACKOFF, ge=1)
    """Each further wait is this many times longer."""
    retry_attempts: int = Field(DEFAULT_RETRY_ATTEMPTS, ge=1)
    """Attempts of RunLLMOnGPU in all."""
    notify_operator: bool | None = None
    """Whether the operator's endpoint (NOTIFIER_DEFAULT_WEBHOOK_URL, NOTIFIER_USERS) is notified of jobs that name no
    target. `false` spares such a job an activity. Unset: the notifier is asked for each of them."""
    notify_hold: timedelta = DEFAULT_NOTIFY_HOLD
    """How long an ended job stays open for its deliveries; after that they go on without it."""
    notify_interval: timedelta = Field(DEFAULT_NOTIFY_INTERVAL, gt=timedelta(0))
    """Wait before a delivery's second attempt."""
    notify_backoff: float = Field(DEFAULT_NOTIFY_BACKOFF, ge=1, le=10)
    """Each further wait is this many times longer."""
    notify_max_interval: timedelta = DEFAULT_NOTIFY_MAX_INTERVAL
    """Longest wait between two attempts of a delivery, also when the receiver asks for a longer one."""
    notify_max_duration: timedelta = DEFAULT_NOTIFY_MAX_DURATION
    """How long a delivery is tried."""
    notify_attempts: int = Field(DEFAULT_NOTIFY_ATTEMPTS, ge=1, le=50)
    """Attempts of a delivery in all, at most."""
    notify_timeout: timedelta = Field(DEFAULT_NOTIFY_TIMEOUT, gt=timedelta(0))
    """Longest attempt of a delivery; more than NOTIFIER_WEBHOOK_TIMEOUT."""
    redeliver_interval: timedelta = Field(timedelta(minutes=1), ge=timedelta(0))
    """Minimum time between two calls of Redeliver for one job, at all gateways. Earlier ones get RESOURCE_EXHAUSTED."""
    list_timeout: timedelta = Field(timedelta(seconds=10), gt=timedelta(0))
    """Maximum duration of List. Temporal has half of it to list the jobs, or the call is UNAVAILABLE; open jobs that
    cannot be described in the rest are shown as JOB_STATE_RUNNING."""
    page_token_key: SecretStr | None = Field(None, min_length=16)
    """What the page tokens of List are signed with, the same at every gateway: at least 16 random characters. Unset: a
    key of the process's own, with which they hold at this gateway alone, and until it ends."""
    max_calls: int = Field(6000, gt=0)
    """Calls at once, streams among them, until their answers are read; more get RESOURCE_EXHAUSTED."""
    max_calls_per_connection: int = Field(2000, gt=0, le=2**31 - 1)
    """Calls at once on one connection; more wait at the client, unseen by the gateway."""
    request_timeout: timedelta = Field(timedelta(seconds=20), ge=timedelta(milliseconds=100))
    """Maximum wait for a call's request. A call without one is ended then."""
    unread_bytes: int = Field(64 * 1024 * 1024, ge=1024 * 1024)
    """Memory for answers that clients have not read yet, an eighth of it for streams; half as much again for requests.
    Beyond it, streams go on in messages of 4 KiB, calls with larger answers wait, or get RESOURCE_EXHAUSTED, and calls
    with larger requests get it at once."""
    stall_timeout: timedelta = Field(timedelta(minutes=2), ge=timedelta(milliseconds=100))
    """Maximum time in which a client may take none of its unread messages, or leave one of them. That one may wait
    as long again for each 2 MB of others that its connection carries meanwhile, ten times as long at most. The
    connection is closed then."""
    connection_idle: timedelta = Field(timedelta(minutes=15), ge=timedelta(0))
    """A connection without calls is closed after this time. PT0S: never."""
    connection_age: timedelta = Field(timedelta(hours=1), ge=timedelta(0))
    """A client is asked to open a new connection after about this time; its running calls go on. PT0S: never."""
    max_watchers: int = Field(5000, gt=0)
    """StreamStatus calls at once; more get RESOURCE_EXHAUSTED."""
    max_watchers_per_user: int = Field(1000, gt=0)
    """StreamStatus calls at once for the jobs of one user; more get RESOURCE_EXHAUSTED."""
    keepalive: timedelta = timedelta(seconds=15)
    """A quiet stream sends a message this often."""
    ping_interval: timedelta = PING_INTERVAL
    """How often a client may send HTTP/2 pings, with calls or without; one that pings more often is cut off."""
    poll: timedelta = timedelta(seconds=1)
    """How often Temporal is asked about a watched job whose feed is silent."""
    open_jobs_interval: timedelta = Field(timedelta(seconds=15), ge=timedelta(0))
    """How often the jobs that have not ended are counted, for metrics: one request to Temporal's visibility for each
    model, one a second at most. PT0S: never."""
    max_concurrent_workflow_tasks: int = Field(100, gt=1)
    """Workflow tasks processed at once."""
    shutdown_grace: timedelta = timedelta(seconds=10)
    """What running calls get to end on SIGTERM."""
