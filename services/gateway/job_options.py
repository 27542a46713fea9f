"""What the operator's settings are for one job or batch, which keeps them as its options."""

from jobs import names
from jobs.classes import class_of, queue_of
from jobs.options import duration
from llm_pb import internal_pb2, llm_pb2
from services.gateway.models.catalogue import Models
from services.gateway.settings import GatewaySettings


def job_options(
    settings: GatewaySettings, models: Models, job: llm_pb2.JobRequest, *, has_store: bool
) -> internal_pb2.JobOptions:
    """Return the options of a new job. `has_store`: whether a large output may become a file."""
    model, job_class = models.get(job.model), class_of(job)
    chosen = internal_pb2.JobOptions(
        gpu_task_queue=queue_of(model.queue if model else names.GPU_QUEUE, job_class),
        timeouts=llm_pb2.JobTimeouts(
            total=duration(settings.total_timeout_of(job_class)),
            queue=duration(settings.queue_timeout_of(job_class)),
            run=duration(settings.run_timeout),
        ),
        heartbeat_timeout=duration(settings.heartbeat_timeout),
        gpu_retry=internal_pb2.RetryOptions(
            initial_interval=duration(settings.retry_interval),
            backoff_coefficient=settings.retry_backoff,
            maximum_attempts=settings.retry_attempts,
        ),
        default_max_tokens=model.default_max_tokens if model else 0,
        price=model.price.message() if model and model.price else None,
        max_output_bytes=settings.max_output_bytes if has_store else 0,
        cache=job.HasField("cache"),
    )
    chosen.MergeFrom(delivery_options(settings))
    return chosen


def delivery_options(settings: GatewaySettings) -> internal_pb2.JobOptions:
    """Return how outcomes are delivered: options of which the fields notify_… are set."""
    return internal_pb2.JobOptions(
        notify_task_queue=settings.notify_queue,
        notify_retry=internal_pb2.RetryOptions(
            initial_interval=duration(settings.notify_interval),
            backoff_coefficient=settings.notify_backoff,
            maximum_interval=duration(settings.notify_max_interval),
            maximum_attempts=settings.notify_attempts,
            within=duration(settings.notify_max_duration),
        ),
        notify_timeout=duration(settings.notify_timeout),
        notify_hold=duration(settings.notify_hold),
        notify_operator=settings.notify_operator,
    )
