"""The options of one job. Its gateway chooses them, the workflow's memo carries them, and each has a default.

They are stored with the job, because a workflow must not read the settings of the process that runs it: those may
differ between two workers, and between a run and its replay.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from temporalio.common import Priority, RetryPolicy

from jobs import names
from jobs.classes import class_of, is_background, queue_of
from jobs.memo import from_memo, to_memo
from llm_pb import internal_pb2, llm_pb2


def duration(value: timedelta) -> Duration:
    """Return the protobuf form of a time span."""
    message = Duration()
    message.FromTimedelta(value)
    return message


DEFAULT_PRIORITY: Final = 3
DEFAULT_PROGRESS_INTERVAL: Final = timedelta(seconds=10)

DEFAULT_QUEUE_TIMEOUT: Final = timedelta(minutes=5)
DEFAULT_RUN_TIMEOUT: Final = timedelta(hours=2)
DEFAULT_TOTAL_TIMEOUT: Final = timedelta(hours=8)
# Of work that has to wait for a quiet hour.
DEFAULT_BACKGROUND_QUEUE_TIMEOUT: Final = timedelta(hours=12)
DEFAULT_BACKGROUND_TOTAL_TIMEOUT: Final = timedelta(hours=24)
DEFAULT_HEARTBEAT_TIMEOUT: Final = timedelta(seconds=30)
DEFAULT_RETRY_INTERVAL: Final = timedelta(seconds=10)
DEFAULT_RETRY_BACKOFF: Final = 2.0
DEFAULT_RETRY_ATTEMPTS: Final = 3

# After 5 s, 15 s, 45 s, 2 min, 7 min, 20 min, 1 h, 3 h, 9 h, then every 12 h: about what Standard Webhooks recommends.
DEFAULT_NOTIFY_INTERVAL: Final = timedelta(seconds=5)
DEFAULT_NOTIFY_BACKOFF: Final = 3.0
DEFAULT_NOTIFY_MAX_INTERVAL: Final = timedelta(hours=12)
DEFAULT_NOTIFY_ATTEMPTS: Final = 50
DEFAULT_NOTIFY_MAX_DURATION: Final = timedelta(hours=72)
# A receiver has 30 s. The rest is for the round trip to the notifier.
DEFAULT_NOTIFY_TIMEOUT: Final = timedelta(seconds=40)
DEFAULT_NOTIFY_HOLD: Final = timedelta(seconds=10)

DEFAULTS: Final = internal_pb2.JobOptions(
    gpu_task_queue=names.GPU_QUEUE,
    notify_task_queue=names.NOTIFY_QUEUE,
    timeouts=llm_pb2.JobTimeouts(
        total=duration(DEFAULT_TOTAL_TIMEOUT),
        queue=duration(DEFAULT_QUEUE_TIMEOUT),
        run=duration(DEFAULT_RUN_TIMEOUT),
    ),
    heartbeat_timeout=duration(DEFAULT_HEARTBEAT_TIMEOUT),
    gpu_retry=internal_pb2.RetryOptions(
        initial_interval=duration(DEFAULT_RETRY_INTERVAL),
        backoff_coefficient=DEFAULT_RETRY_BACKOFF,
        maximum_attempts=DEFAULT_RETRY_ATTEMPTS,
    ),
    notify_retry=internal_pb2.RetryOptions(
        initial_interval=duration(DEFAULT_NOTIFY_INTERVAL),
        backoff_coefficient=DEFAULT_NOTIFY_BACKOFF,
        maximum_interval=duration(DEFAULT_NOTIFY_MAX_INTERVAL),
        maximum_attempts=DEFAULT_NOTIFY_ATTEMPTS,
        within=duration(DEFAULT_NOTIFY_MAX_DURATION),
    ),
    notify_timeout=duration(DEFAULT_NOTIFY_TIMEOUT),
    notify_hold=duration(DEFAULT_NOTIFY_HOLD),
)


def complete(chosen: internal_pb2.JobOptions | None, job: llm_pb2.JobRequest) -> internal_pb2.JobOptions:
    """Return the gateway's options, or the defaults without a gateway, with the job's own timeouts applied."""
    options = internal_pb2.JobOptions()
    options.CopyFrom(_defaults(job) if chosen is None else chosen)
    _override(options.timeouts, job.timeouts)
    return options


def with_defaults(chosen: internal_pb2.JobOptions, job: llm_pb2.JobRequest) -> internal_pb2.JobOptions:
    """Return the options with the default of each field that is unset, also inside its messages.

    For the start of a job only: a stored job keeps the options that it has, so that its replays stay the same.
    """
    options = _defaults(job)
    _override(options, chosen)
    return options


def _defaults(job: llm_pb2.JobRequest) -> internal_pb2.JobOptions:
    """Return the defaults for a job of its class."""
    options = internal_pb2.JobOptions()
    options.CopyFrom(DEFAULTS)
    job_class = class_of(job)
    options.gpu_task_queue = queue_of(options.gpu_task_queue, job_class)
    if is_background(job_class):
        options.timeouts.queue.CopyFrom(duration(DEFAULT_BACKGROUND_QUEUE_TIMEOUT))
        options.timeouts.total.CopyFrom(duration(DEFAULT_BACKGROUND_TOTAL_TIMEOUT))
    return options


def _override(message: Message, chosen: Message) -> None:
    """Replace the fields of a message by those that are set in another one of its type."""
    for field, value in chosen.ListFields():
        if field.message_type is None:
            setattr(message, field.name, value)
        elif field.message_type is Duration.DESCRIPTOR:
            # MergeFrom would merge two durations field by field: 2 s over 0.5 s would make 2.5 s.
            getattr(message, field.name).CopyFrom(value)
        else:
            _override(getattr(message, field.name), value)


def memo_of(chosen: internal_pb2.JobOptions) -> dict[str, Any]:
    """Return the options as the part of a workflow's memo that `read_memo` reads.

    `notify_operator`, `ledger`, `price`, `cache` and the sizes have keys of their own, because version 0.1.0 refuses
    options with a field that it does not know.
    """
    options = internal_pb2.JobOptions()
    options.CopyFrom(chosen)
    options.ClearField("notify_operator")
    options.ClearField("ledger")
    options.ClearField("price")
    options.ClearField("max_output_bytes")
    options.ClearField("max_inline_bytes")
    options.ClearField("cache")
    memo: dict[str, Any] = {names.MEMO_OPTIONS: to_memo(options)}
    if chosen.HasField("notify_operator"):
        memo[names.MEMO_NOTIFY_OPERATOR] = chosen.notify_operator
    if chosen.ledger:
        memo[names.MEMO_LEDGER] = chosen.ledger
    if chosen.HasField("price"):
        memo[names.MEMO_PRICE] = to_memo(chosen.price)
    if chosen.max_output_bytes:
        memo[names.MEMO_MAX_OUTPUT_BYTES] = chosen.max_output_bytes
    if chosen.max_inline_bytes:
        memo[names.MEMO_MAX_INLINE_BYTES] = chosen.max_inline_bytes
    if chosen.cache:
        memo[names.MEMO_CACHE] = True
    return memo


def read_memo(value: Callable[[str, Any], Any]) -> internal_pb2.JobOptions | None:
    """Return the options that `value(key, default)` finds in a memo, None where it has none.

    Raises ValueError for a value that is no JobOptions.
    """
    options = from_memo(value(names.MEMO_OPTIONS, None), internal_pb2.JobOptions)
    if options is not None and isinstance(notify := value(names.MEMO_NOTIFY_OPERATOR, None), bool):
        options.notify_operator = notify
    if options is not None and isinstance(ledger := value(names.MEMO_LEDGER, None), str):
        options.ledger = ledger
    if options is not None and (price := from_memo(value(names.MEMO_PRICE, None), llm_pb2.ModelPrice)) is not None:
        options.price.CopyFrom(price)
    if options is not None and isinstance(most := value(names.MEMO_MAX_OUTPUT_BYTES, None), int) and most > 0:
        options.max_output_bytes = most
    if options is not None and isinstance(most := value(names.MEMO_MAX_INLINE_BYTES, None), int) and most > 0:
        options.max_inline_bytes = most
    if options is not None and value(names.MEMO_CACHE, None) is True:
        options.cache = True
    return options


def run_request(
    job: llm_pb2.JobRequest, create_time: Timestamp, options: internal_pb2.JobOptions
) -> internal_pb2.RunRequest:
    """Return the input of a job's first RunLLMOnGPU."""
    return internal_pb2.RunRequest(
        job=job,
        create_time=create_time,
        default_max_tokens=options.default_max_tokens,
        max_output_bytes=options.max_output_bytes,
        max_inline_bytes=options.max_inline_bytes,
        cache=options.cache,
    )


def retry_policy(options: internal_pb2.RetryOptions) -> RetryPolicy:
    """Return Temporal's form of the retry options."""
    return RetryPolicy(
        initial_interval=options.initial_interval.ToTimedelta(),
        backoff_coefficient=options.backoff_coefficient,
        maximum_attempts=options.maximum_attempts,
    )


def gpu_priority(job: llm_pb2.JobRequest, workflow: Priority) -> Priority:
    """Return the priority of the job's activity on the GPU. Its other activities are not prioritised.

    It repeats the workflow's fairness key and weight, because Temporal does not promise that an activity with its own
    priority inherits them.
    """
    return Priority(
        priority_key=job.priority or DEFAULT_PRIORITY,
        fairness_key=workflow.fairness_key,
        fairness_weight=workflow.fairness_weight,
    )
