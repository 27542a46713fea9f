"""The operator's settings of deliveries, as the options that a job or batch keeps."""

from jobs.options import duration
from llm_pb import internal_pb2
from services.gateway.settings import GatewaySettings


def delivery_options(settings: GatewaySettings) -> internal_pb2.JobOptions:
    """Return options of which the fields notify_… are set."""
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
