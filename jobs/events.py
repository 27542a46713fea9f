"""The events of jobs, batches and pipelines that receivers are notified of, and the state of their deliveries."""

from jobs import limits
from jobs.outcome import without_output
from llm_pb import batch_pb2, internal_pb2, llm_pb2, pipeline_pb2


def base_event(
    job: llm_pb2.JobRequest, event: "llm_pb2.NotifyEvent.ValueType", status: llm_pb2.JobStatus
) -> internal_pb2.NotifyRequest:
    """Return an event of the job, without the fields that differ for each target."""
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
    if event.HasField("pipeline"):
        state = llm_pb2.JobState.Name(event.pipeline.state)
        return f"llm.v1.pipeline.{state.removeprefix('JOB_STATE_').lower()}"
    if event.HasField("batch"):
        return f"llm.v1.batch.{batch_pb2.BatchState.Name(event.batch.state).removeprefix('BATCH_STATE_').lower()}"
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
    """Return the event of the job's end. It holds the whole result if the job asks for it and it fits an event."""
    event = base_event(job, llm_pb2.NOTIFY_EVENT_FINISHED, outcome)
    if result is not None:
        whole = job.notify_options.include_output and result.ByteSize() <= limits.MAX_NOTIFY_RESULT_BYTES
        is_file = result.HasField("output_file")
        event.output_omitted = is_file or (not whole and bool(result.output or result.logprobs))
        event.result.CopyFrom(result if whole and not is_file else without_output(result))
    return event


def batch_event(
    batch: batch_pb2.BatchRequest, outcome: batch_pb2.BatchStatus, run_id: str
) -> internal_pb2.NotifyRequest:
    """Return the event of the end of a batch. `run_id` is that of the last run of its workflow."""
    return internal_pb2.NotifyRequest(
        event=llm_pb2.NOTIFY_EVENT_FINISHED,
        # By these the deliveries are found again, as those of a job.
        status=llm_pb2.JobStatus(workflow_id=outcome.batch_id, run_id=run_id),
        batch=outcome,
        user_id=batch.user_id,
        request_id=batch.request_id,
        project_id=batch.project_id,
    )


def pipeline_event(
    pipeline: pipeline_pb2.PipelineRequest, outcome: pipeline_pb2.PipelineStatus, run_id: str
) -> internal_pb2.NotifyRequest:
    """Return the event of the end of a pipeline. `run_id` is that of its workflow."""
    return internal_pb2.NotifyRequest(
        event=llm_pb2.NOTIFY_EVENT_FINISHED,
        # By these the deliveries are found again, as those of a job.
        status=llm_pb2.JobStatus(workflow_id=outcome.pipeline_id, run_id=run_id),
        pipeline=outcome,
        user_id=pipeline.user_id,
        request_id=pipeline.request_id,
        project_id=pipeline.project_id,
    )


def targets_of(
    job: llm_pb2.JobRequest | batch_pb2.BatchRequest | pipeline_pb2.PipelineRequest, options: internal_pb2.JobOptions
) -> list[llm_pb2.NotifyTarget]:
    """Return the targets to notify: those of a job, batch or pipeline, or else the operator's as one without a kind.

    The list is empty if it names no target and the options exclude the operator.
    """
    if job.notify:
        return [*job.notify]
    if options.HasField("notify_operator") and not options.notify_operator:
        return []
    return [llm_pb2.NotifyTarget()]


def takes_progress(target: llm_pb2.NotifyTarget) -> bool:
    """Return whether a target is notified of more than the outcome. OpenAI's webhooks have no other event."""
    return target.webhook.format != llm_pb2.WEBHOOK_FORMAT_OPENAI


def wants(job: llm_pb2.JobRequest, *events: "llm_pb2.NotifyEvent.ValueType") -> bool:
    """Return whether the job's targets are to be notified of one of these events."""
    asked = [*job.notify_options.events] or [llm_pb2.NOTIFY_EVENT_FINISHED]
    return any(event in asked for event in events)


def notification(delivery: llm_pb2.Delivery) -> llm_pb2.NotifyStatus:
    """Return the state of a delivery, as the job's status shows it."""
    shown = llm_pb2.NotifyStatus(target=delivery.target, state=delivery.state)
    if delivery.attempts and delivery.attempts[-1].HasField("error"):
        shown.error.CopyFrom(delivery.attempts[-1].error)
    if delivery.HasField("next_attempt_time"):
        shown.next_attempt_time.CopyFrom(delivery.next_attempt_time)
    return shown
