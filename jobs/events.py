"""What is said of a job to its receivers: the events of its life, and how their deliveries stand."""

from llm_pb import llm_pb2


def base_event(
    job: llm_pb2.JobRequest, event: "llm_pb2.NotifyEvent.ValueType", status: llm_pb2.JobStatus
) -> llm_pb2.NotifyRequest:
    """Return an event of a job's, without what is different for each target."""
    return llm_pb2.NotifyRequest(
        event=event,
        status=status,
        user_id=job.user_id,
        request_id=job.request_id,
        model=job.model,
        project_id=job.project_id,
    )


def event_type(event: llm_pb2.NotifyRequest) -> str:
    """Return the CloudEvent's type."""
    match event.event:
        case llm_pb2.NOTIFY_EVENT_STARTED:
            name = "started"
        case llm_pb2.NOTIFY_EVENT_PROGRESS:
            name = "progress"
        case _:
            name = llm_pb2.JobState.Name(event.status.state).removeprefix("JOB_STATE_").lower()
    return f"llm.v1.job.{name}"


def targets_of(job: llm_pb2.JobRequest) -> list[llm_pb2.NotifyTarget]:
    """Return the job's targets; one without a kind, the operator's default, when it names none."""
    return [*job.notify] or [llm_pb2.NotifyTarget()]


def wants(job: llm_pb2.JobRequest, *events: "llm_pb2.NotifyEvent.ValueType") -> bool:
    """Return whether the job's targets are to be told one of these events."""
    asked = [*job.notify_options.events] or [llm_pb2.NOTIFY_EVENT_FINISHED]
    return any(event in asked for event in events)


def notification(delivery: llm_pb2.Delivery) -> llm_pb2.NotifyStatus:
    """Return how a delivery stands, as the job's status shows it."""
    shown = llm_pb2.NotifyStatus(target=delivery.target, state=delivery.state)
    if delivery.attempts and delivery.attempts[-1].HasField("error"):
        shown.error.CopyFrom(delivery.attempts[-1].error)
    if delivery.HasField("next_attempt_time"):
        shown.next_attempt_time.CopyFrom(delivery.next_attempt_time)
    return shown
