"""What a job keeps when it is handed over, and when it goes back to the queue because no seat was free."""

from datetime import UTC, datetime, timedelta

import pytest
from google.protobuf.duration_pb2 import Duration
from temporalio.exceptions import TimeoutError as TemporalTimeoutError
from temporalio.exceptions import TimeoutType

from jobs.handover import add_handover, add_reported_times, is_pause, paused_progress, queue_timeout
from jobs.heartbeat import before_handover, to_details
from llm_pb import internal_pb2, llm_pb2

CREATED = datetime(2026, 11, 26, tzinfo=UTC)
LIMIT = timedelta(minutes=5)


def request(**fields: object) -> internal_pb2.RunRequest:
    made = internal_pb2.RunRequest(**fields)  # type: ignore[arg-type]
    made.create_time.FromDatetime(CREATED)
    return made


def left(end: "llm_pb2.AttemptEnd.ValueType", **metadata: object) -> llm_pb2.JobResult:
    return llm_pb2.JobResult(
        output="abc",
        metadata=llm_pb2.ResultMetadata(**metadata),  # type: ignore[arg-type]
        attempts=[llm_pb2.JobAttempt(end=end)],
    )


def test_only_a_return_for_want_of_a_seat_is_a_pause() -> None:
    """Both carry the error of a worker that stops."""
    following = request()
    add_handover(following, left(llm_pb2.ATTEMPT_END_HANDED_OVER))
    assert (following.handovers, following.unseated) == (1, 0)
    add_handover(following, left(llm_pb2.ATTEMPT_END_PAUSED))
    assert (following.handovers, following.unseated) == (2, 1)
    add_handover(following, None)
    assert (following.handovers, following.unseated) == (3, 1)
    assert not is_pause(None)
    assert not is_pause(llm_pb2.JobResult())


def test_pauses_and_engine_time_reach_the_next_attempt() -> None:
    following = request()
    metadata = {"pauses": 2, "engine_time": Duration(seconds=7), "queue_time": Duration(seconds=1)}
    add_handover(following, left(llm_pb2.ATTEMPT_END_PAUSED, **metadata))
    restored = before_handover(following).metadata
    assert (restored.pauses, restored.engine_time, restored.queue_time) == (2, Duration(seconds=7), Duration(seconds=1))


@pytest.mark.parametrize(
    ("fields", "elapsed", "expected"),
    [
        ({}, 240, LIMIT),
        ({"handovers": 1}, 240, LIMIT),
        ({"handovers": 1, "unseated": 1}, 240, timedelta(minutes=1)),
        ({"handovers": 1, "unseated": 1}, 999, timedelta(milliseconds=1)),
        ({"handovers": 1, "unseated": 1, "metadata": {"engine_time": Duration(seconds=1)}}, 999, None),
    ],
    ids=["first", "handed over", "never had a seat", "waited long enough", "had a seat"],
)
def test_a_pause_does_not_begin_the_queue_timeout_again(
    fields: dict[str, object], elapsed: int, expected: timedelta | None
) -> None:
    assert queue_timeout(request(**fields), LIMIT, CREATED + timedelta(seconds=elapsed)) == expected


def test_a_job_that_waits_in_the_queue_shows_what_it_has() -> None:
    job = llm_pb2.JobRequest(params=llm_pb2.SamplingParams(max_tokens=40))
    progress = paused_progress(request(job=job), left(llm_pb2.ATTEMPT_END_PAUSED, output_tokens=10))
    assert (progress.stage, progress.percent, progress.output_tokens) == ("paused", 25, 10)
    assert (progress.output_bytes, progress.worker) == (3, "")
    assert paused_progress(request(), left(llm_pb2.ATTEMPT_END_PAUSED, output_tokens=10)).percent == 0


def test_an_attempt_that_was_lost_leaves_the_times_of_its_last_heartbeat() -> None:
    earlier = request(metadata={"pauses": 1, "engine_time": Duration(seconds=3)})
    beat = internal_pb2.RunHeartbeat(metadata=llm_pb2.ResultMetadata(pauses=4, engine_time=Duration(seconds=9)))
    lost = TemporalTimeoutError("lost", type=TimeoutType.HEARTBEAT, last_heartbeat_details=to_details(beat))
    never = TemporalTimeoutError("no worker", type=TimeoutType.SCHEDULE_TO_START, last_heartbeat_details=[])
    for cause, pauses, seconds in ((lost, 4, 9), (never, 1, 3), (None, 1, 3)):
        result = llm_pb2.JobResult()
        add_reported_times(result, earlier, cause)
        assert (result.metadata.pauses, result.metadata.engine_time.seconds) == (pauses, seconds)
