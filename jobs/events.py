"""What is said of a job to its receivers: the events of its life, and how their deliveries stand."""

from jobs import limits
from llm_pb import internal_pb2, llm_pb2


def base_event(
    job: llm_pb2.JobRequest, event: "llm_pb2.NotifyEvent.ValueType", status: llm_pb2.JobStatus
) -> internal_pb2.NotifyRequest:
    """Return an event of a job's, without what is different for each target."""
    return internal_pb2.NotifyRequest(
        event=event,
        status=status,
        user_id=job.user_id,
        request_id=job.request_id,
        model=job.model,
        project_id=job.project_id,
    )


def event_type(event: internal_pb2.NotifyRequest) -> str:
    """Return the CloudEvent's type."""
    match event.event:
        case llm_pb2.NOTIFY_EVENT_STARTED:
            name = "started"
        case llm_pb2.NOTIFY_EVENT_PROGRESS:
            name = "progress"
        case _:
            name = llm_pb2.JobState.Name(event.status.state).removeprefix("JOB_STATE_").lower()
    return f"llm.v1.job.{name}"


def outcome_event(
    job: llm_pb2.JobRequest, outcome: llm_pb2.JobStatus, result: llm_pb2.JobResult | None
) -> internal_pb2.NotifyRequest:
    """Return the event of a job's end: with the whole result where the job asks for it and an event has room for it."""
    event = base_event(job, llm_pb2.NOTIFY_EVENT_FINISHED, outcome)
    if result is not None:
        whole = job.notify_options.include_output and result.ByteSize() <= limits.MAX_NOTIFY_RESULT_BYTES
        event.output_omitted = not whole and bool(result.output or result.logprobs)
        event.result.CopyFrom(
            result if whole else llm_pb2.JobResult(finish_reason=result.finish_reason, metadata=result.metadata)
        )
    return event


def targets_of(job: llm_pb2.JobRequest, options: internal_pb2.JobOptions) -> list[llm_pb2.NotifyTarget]:
    """Return who is notified of the job: its targets, or else the operator's endpoint as a target without a kind.

    Nobody, where the job names no target and its options say that the operator is not notified.
    """
    if job.notify:
        return [*job.notify]
    if options.HasField("notify_operator") and not options.notify_operator:
        return []
    return [llm_pb2.NotifyTarget()]


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
