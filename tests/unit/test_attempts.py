"""The list of a job's attempts is bounded, and survives the loss of the feed as far as Temporal has it."""

from datetime import UTC, datetime, timedelta

from feed.memory import MemoryFeed
from feed.output import GeneratedOutput
from feed.writer import FeedWriter
from jobs import attempts
from jobs.errors import QueueTimeout, RunTimeout, WorkerLost
from jobs.heartbeat import from_details, to_details
from llm_pb import internal_pb2, llm_pb2

BEGAN = datetime(2026, 1, 2, tzinfo=UTC)
ENDED = BEGAN + timedelta(hours=1)


def started(number: int, worker: str = "w") -> internal_pb2.AttemptStarted:
    event = internal_pb2.AttemptStarted(attempt=number, worker=worker)
    event.start_time.FromDatetime(BEGAN + timedelta(minutes=number))
    return event


def listed(number: int, end: "llm_pb2.AttemptEnd.ValueType" = llm_pb2.ATTEMPT_END_FAILED) -> llm_pb2.JobAttempt:
    attempt = llm_pb2.JobAttempt(attempt=number, worker="w", end=end)
    attempt.start_time.FromDatetime(BEGAN + timedelta(minutes=number))
    return attempt


def numbers(found: GeneratedOutput) -> list[int]:
    return [attempt.attempt for attempt in found.attempts]


def test_the_first_and_the_last_of_many_are_listed() -> None:
    log = GeneratedOutput()
    for number in range(1, 41):
        log.add(internal_pb2.FeedRecord(attempt_started=started(number)))
    assert numbers(log) == [*range(1, 6), *range(26, 41)]
    assert {attempt.end for attempt in log.attempts[:-1]} == {llm_pb2.ATTEMPT_END_WORKER_LOST}
    assert not attempts.has_ended(log.attempts[-1])
    assert attempts.merged([listed(7)], log.attempts) == attempts.merged(log.attempts, [listed(7)])


def test_attempts_of_an_earlier_version_are_not_listed() -> None:
    """Its records name no worker, and do not say how the attempt ended."""
    log = GeneratedOutput()
    for event in (
        {"attempt_started": started(1, "")},
        {"progress": llm_pb2.JobProgress(worker="old")},
        {"attempt_ended": internal_pb2.AttemptEnded(finish_reason=llm_pb2.FINISH_REASON_STOP)},
    ):
        log.add(internal_pb2.FeedRecord(**event))  # type: ignore[arg-type]
    assert not log.result().attempts


async def test_attempts_that_the_feed_has_lost_come_from_the_heartbeat() -> None:
    """It names the attempt that sent it. How that one ended is not known."""
    heartbeat = internal_pb2.RunHeartbeat(attempts=[listed(1), listed(2, llm_pb2.ATTEMPT_END_UNSPECIFIED)])
    heartbeat.metadata.attempts = 2
    writer = FeedWriter(MemoryFeed(), "key", started(3))
    writer.restore(from_details(to_details(heartbeat)))
    await writer.take_over()
    assert numbers(writer.output) == [1, 2, 3]
    assert writer.output.attempts[:2] == [*heartbeat.attempts]


async def test_the_heartbeat_of_a_first_attempt_names_it_by_its_metadata() -> None:
    heartbeat = internal_pb2.RunHeartbeat(metadata=llm_pb2.ResultMetadata(attempts=1, worker="w"))
    heartbeat.metadata.start_time.CopyFrom(started(1).start_time)
    assert len(to_details(heartbeat)) == 2, "most heartbeats must cost no more"
    (attempt,) = from_details(to_details(heartbeat)).attempts
    assert (attempt.attempt, attempt.worker, attempt.start_time) == (1, "w", started(1).start_time)


async def test_the_feed_knows_more_than_the_heartbeat() -> None:
    feed = MemoryFeed()
    first = FeedWriter(feed, "key", started(1))
    await first.begin()
    ended = internal_pb2.AttemptEnded(attempt=listed(1))
    await first.write(internal_pb2.FeedRecord(attempt_ended=ended))
    writer = FeedWriter(feed, "key", started(2))
    writer.restore(internal_pb2.RunHeartbeat(attempts=[listed(1, llm_pb2.ATTEMPT_END_UNSPECIFIED)]))
    await writer.take_over()
    assert writer.output.attempts[0] == listed(1)


def test_temporal_says_how_an_attempt_ended_that_could_not() -> None:
    silent, failed = listed(2, llm_pb2.ATTEMPT_END_UNSPECIFIED), listed(2)
    for last, error, end, reason in (
        (silent, WorkerLost("gone"), llm_pb2.ATTEMPT_END_WORKER_LOST, True),
        (silent, RunTimeout("late"), llm_pb2.ATTEMPT_END_TIMED_OUT, True),
        (silent, QueueTimeout("no next worker"), llm_pb2.ATTEMPT_END_WORKER_LOST, False),
        (failed, WorkerLost("gone"), llm_pb2.ATTEMPT_END_FAILED, False),
    ):
        result = llm_pb2.JobResult(attempts=[last])
        attempts.settle(result, [listed(1, llm_pb2.ATTEMPT_END_HANDED_OVER)], error, ENDED)
        before, after = result.attempts
        assert before.end == llm_pb2.ATTEMPT_END_HANDED_OVER
        assert (after.end, after.HasField("error")) == (end, reason)
        assert after.HasField("end_time") == isinstance(error, RunTimeout)


def test_an_error_of_many_attempts_takes_little_room() -> None:
    attempt = listed(1, llm_pb2.ATTEMPT_END_UNSPECIFIED)
    attempts.close(attempt, WorkerLost("é" * 5000))
    assert attempt.ByteSize() < 1024
