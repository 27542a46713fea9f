"""Merges the status of a job from two sources: Temporal, which is polled, and the live feed, which is faster.

The functions are pure: none changes its arguments. Each returns the known status itself when nothing is new.

Temporal's answer may be older than what the feed has reported meanwhile. The feed's records may be older than
Temporal's answer: a reader starts with an answer and then reads the log from its start. So neither counts as the newer
one. The status that a watcher sees never goes back to a lower attempt, to older progress of the same worker, or from
NOTIFYING or a final state to a running job.

While a worker has the job, the state follows the stage of its progress: QUEUED while the job waits for a seat. The
worker of the progress tells that from a job that waits in the queue.
"""

from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from jobs.errors import rule_of
from jobs.stages import waits_for_seat
from llm_pb import internal_pb2, llm_pb2
from services.gateway.job_record import FINAL_STATES

_SETTLED: Final = FINAL_STATES | {llm_pb2.JOB_STATE_NOTIFYING}
"""States in which the outcome is durable."""


def with_answer(
    known: llm_pb2.JobStatus, answer: llm_pb2.JobStatus, *, started_meanwhile: bool = False
) -> llm_pb2.JobStatus:
    """Return the status after Temporal's answer, which is the truth; keep what only the feed knows about an open job.

    `started_meanwhile`: whether the feed has reported an attempt's start since Temporal was asked.
    """
    # A copy, because a part of a message keeps the whole message in memory, here the result.
    merged = llm_pb2.JobStatus()
    merged.CopyFrom(answer)
    if answer.state not in FINAL_STATES and known.run_id == answer.run_id:
        if known.state in _SETTLED and answer.state not in _SETTLED:
            # While no worker runs workflows, Temporal alone does not know that the outcome is settled.
            return known
        if started_meanwhile and answer.state == llm_pb2.JOB_STATE_QUEUED:
            merged.state = known.state
            merged.ClearField("queue")
        if answer.attempt < known.attempt and not known.HasField("progress"):
            # It is of an attempt that is over.
            merged.ClearField("progress")
        elif known.HasField("progress") and not _is_news(known, answer.attempt, answer.progress):
            merged.progress.CopyFrom(known.progress)
            at_worker = answer.state == llm_pb2.JOB_STATE_RUNNING or _waits_at_worker(answer)
            if at_worker and known.progress.worker and answer.progress.worker in ("", known.progress.worker):
                # The heartbeat of the answer, if there is one yet, is older than what the feed has reported.
                _follow_stage(merged)
        if known.attempt >= answer.attempt:
            merged.attempt = known.attempt
            if known.HasField("start_time"):
                merged.start_time.CopyFrom(known.start_time)
        if known.HasField("first_token_time") and not answer.HasField("first_token_time"):
            merged.first_token_time.CopyFrom(known.first_token_time)
    return known if merged == known else merged


def with_record(
    known: llm_pb2.JobStatus, record: internal_pb2.FeedRecord, attempt: int, *, live: bool
) -> llm_pb2.JobStatus:
    """Return the status after a record of the feed that counts, written by the attempt of this number.

    `live`: whether all records that were in the log when the reading began have been read. Until then a record may be
    about an attempt that is over by Temporal's answer.
    """
    event = record.WhichOneof("event")
    if known.state in _SETTLED:
        return known
    merged = llm_pb2.JobStatus()
    # Most records change nothing here, and must not cost a copy.
    if event == "attempt_started" and attempt >= known.attempt:
        if not live and _has_ended(known, attempt, record.attempt_started.start_time):
            return known
        merged.CopyFrom(known)
        merged.attempt = attempt
        merged.start_time.CopyFrom(record.attempt_started.start_time)
        merged.state = llm_pb2.JOB_STATE_RUNNING
        merged.ClearField("queue")
    elif event == "tokens_made" and record.tokens_made.HasField("made_at") and not known.HasField("first_token_time"):
        # The record may be of an earlier attempt: an attempt that continues has no first token.
        merged.CopyFrom(known)
        merged.first_token_time.CopyFrom(record.tokens_made.made_at)
    elif event == "progress" and _is_news(known, attempt, record.progress):
        merged.CopyFrom(known)
        merged.progress.CopyFrom(record.progress)
        if known.state == llm_pb2.JOB_STATE_RUNNING or _waits_at_worker(known):
            _follow_stage(merged)
        elif not live and waits_for_seat(record.progress):
            # By Temporal's answer no worker has the job any more.
            merged.progress.worker = ""
    else:
        return known
    return known if merged == known else merged


def _is_news(known: llm_pb2.JobStatus, attempt: int, progress: llm_pb2.JobProgress) -> bool:
    """Return whether an attempt's progress is newer than the known one, or may be: workers' clocks differ."""
    if attempt < known.attempt or not progress.HasField("updated_at"):
        return False
    if progress.worker != known.progress.worker:
        return True
    return progress.updated_at.ToNanoseconds() >= known.progress.updated_at.ToNanoseconds()


def _follow_stage(status: llm_pb2.JobStatus) -> None:
    """Set the state of a job that a worker has."""
    waits = waits_for_seat(status.progress)
    status.state = llm_pb2.JOB_STATE_QUEUED if waits else llm_pb2.JOB_STATE_RUNNING
    if not waits:
        status.ClearField("queue")


def _waits_at_worker(status: llm_pb2.JobStatus) -> bool:
    progress = status.progress
    return status.state == llm_pb2.JOB_STATE_QUEUED and waits_for_seat(progress) and progress.worker != ""


def _has_ended(known: llm_pb2.JobStatus, attempt: int, start_time: Timestamp) -> bool:
    """Return whether the attempt has ended and the job now waits for a worker."""
    if known.state != llm_pb2.JOB_STATE_QUEUED or attempt != known.attempt:
        return False
    rule = rule_of(known.error)
    handed_over = rule.handed_over if rule is not None else waits_for_seat(known.progress)
    # The attempt after a hand-over has the same number as the one before it.
    return not handed_over or start_time == known.start_time
