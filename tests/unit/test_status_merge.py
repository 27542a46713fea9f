"""The status merged from Temporal's answers and the feed's records never goes back, in whatever order they come."""

import itertools
from collections.abc import Sequence

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import example, given
from hypothesis import strategies as st

from jobs import errors
from llm_pb import internal_pb2, llm_pb2
from services.gateway.job_record import FINAL_STATES
from services.gateway.streams.status_merge import with_answer, with_record
from tests.support.examples import examples

QUEUED, RUNNING = llm_pb2.JOB_STATE_QUEUED, llm_pb2.JOB_STATE_RUNNING
NOTIFYING, SUCCEEDED = llm_pb2.JOB_STATE_NOTIFYING, llm_pb2.JOB_STATE_SUCCEEDED

Step = llm_pb2.JobStatus | tuple[internal_pb2.FeedRecord, int]
"""One input of the merge: an answer of Temporal, or a feed record with the number of the attempt that wrote it."""

times = st.integers(0, 9).map(lambda seconds: Timestamp(seconds=seconds))
attempts = st.integers(1, 3)
reports = st.builds(
    llm_pb2.JobProgress,
    worker=st.sampled_from(["a", "b", ""]),
    stage=st.sampled_from(["decode", "paused"]),
    updated_at=times,
    output_tokens=st.integers(0, 9),
)
answers = st.builds(
    llm_pb2.JobStatus,
    run_id=st.just("run"),
    state=st.sampled_from([QUEUED, RUNNING, NOTIFYING, SUCCEEDED]),
    attempt=st.integers(0, 3),
    start_time=st.none() | times,
    progress=st.none() | reports,
    queue=st.none() | st.just(llm_pb2.QueueInfo(backlog=2)),
)
records = st.one_of(
    st.tuples(st.builds(internal_pb2.FeedRecord, progress=reports), attempts),
    st.tuples(
        st.builds(internal_pb2.FeedRecord, tokens_made=st.builds(internal_pb2.TokensMade, made_at=st.none() | times)),
        attempts,
    ),
    st.builds(lambda number, time: (started(number, time), number), attempts, times),
    st.tuples(st.just(internal_pb2.FeedRecord(attempt_ended=internal_pb2.AttemptEnded())), attempts),
)
steps = st.lists(answers | records, max_size=12)


def started(attempt: int, time: Timestamp) -> internal_pb2.FeedRecord:
    return internal_pb2.FeedRecord(attempt_started=internal_pb2.AttemptStarted(attempt=attempt, start_time=time))


def report(tokens: int, worker: str = "a") -> llm_pb2.JobProgress:
    return llm_pb2.JobProgress(worker=worker, updated_at=Timestamp(seconds=tokens), output_tokens=tokens)


def paused(tokens: int, worker: str = "a") -> llm_pb2.JobProgress:
    """Return the report of a job that waits for a seat: at the worker, or in the queue if it names none."""
    progress = report(tokens, worker)
    progress.stage = "paused"
    return progress


def at_worker(progress: llm_pb2.JobProgress) -> llm_pb2.JobStatus:
    """Return the status of a job that has reported this to Temporal and to the feed."""
    state = QUEUED if progress.stage == "paused" else RUNNING
    return status(state, start_time=Timestamp(seconds=1), progress=progress)


def status(state: "llm_pb2.JobState.ValueType", attempt: int = 1, **fields: object) -> llm_pb2.JobStatus:
    return llm_pb2.JobStatus(run_id="run", state=state, attempt=attempt, **fields)  # type: ignore[arg-type]


def after(known: llm_pb2.JobStatus, step: Step, *, started_meanwhile: bool = False) -> llm_pb2.JobStatus:
    if isinstance(step, llm_pb2.JobStatus):
        return with_answer(known, step, started_meanwhile=started_meanwhile)
    return with_record(known, *step, live=True)


def seen(first: llm_pb2.JobStatus, following: Sequence[Step]) -> list[llm_pb2.JobStatus]:
    """Return the statuses that a watcher sees when it begins with the answer `first`."""
    statuses = [with_answer(llm_pb2.JobStatus(), first)]
    for step in following:
        statuses.append(after(statuses[-1], step))
        if statuses[-1].state in FINAL_STATES:
            break
    return statuses


@examples(1000)
@given(answers, steps)
def test_an_open_job_never_goes_back(first: llm_pb2.JobStatus, following: Sequence[Step]) -> None:
    statuses = seen(first, following)
    for before, now in itertools.pairwise(statuses):
        if now.state in FINAL_STATES:
            continue
        assert now.attempt >= before.attempt
        assert before.state != NOTIFYING or now.state == NOTIFYING
        assert now.HasField("progress") or not before.HasField("progress")
        assert now.HasField("first_token_time") or not before.HasField("first_token_time")
        if now.progress.worker == before.progress.worker:
            assert now.progress.updated_at.ToNanoseconds() >= before.progress.updated_at.ToNanoseconds()


@given(answers, steps, answers)
def test_how_the_job_ended_is_temporals_word_alone(
    first: llm_pb2.JobStatus, following: Sequence[Step], last: llm_pb2.JobStatus
) -> None:
    last.state = SUCCEEDED
    known = seen(first, following)[-1]
    assert with_answer(known, last) == last


@given(answers, answers | records)
def test_a_final_status_changes_no_more(final: llm_pb2.JobStatus, step: Step) -> None:
    final.state = SUCCEEDED
    if isinstance(step, llm_pb2.JobStatus):
        step.state = RUNNING
    assert after(final, step) is final


@given(answers, answers | records, st.booleans())
@example(status(RUNNING), status(QUEUED, 0, progress=paused(1)), True)
def test_a_merge_changes_nothing_that_it_is_given(
    known: llm_pb2.JobStatus, step: Step, started_meanwhile: bool
) -> None:
    """A merge without news returns the very message that it was given, by which watchers recognise that."""
    message = step if isinstance(step, llm_pb2.JobStatus) else step[0]
    given_known, given_step = known.SerializeToString(), message.SerializeToString()
    merged = after(known, step, started_meanwhile=started_meanwhile)
    assert (known.SerializeToString(), message.SerializeToString()) == (given_known, given_step)
    assert merged is not step
    assert (merged is known) == (merged == known)
    assert after(merged, step, started_meanwhile=started_meanwhile) is merged


@given(st.lists(st.integers(1, 20), min_size=1).map(sorted), st.sets(st.integers(1, 20)), st.data())
def test_a_heartbeat_that_comes_late_is_as_if_it_had_come_in_time(
    tokens: list[int], pauses: set[int], data: st.DataObject
) -> None:
    """An attempt reports to Temporal and to the feed. The last status is the same wherever Temporal's answer comes.

    So is its state, which shows whether the job is paused.
    """
    start = Timestamp(seconds=1)
    told = [paused(n) if n in pauses else report(n) for n in tokens]
    fed: list[Step] = [(started(1, start), 1), *((internal_pb2.FeedRecord(progress=each), 1) for each in told)]
    beat = at_worker(data.draw(st.sampled_from(told), "heartbeat"))
    place = data.draw(st.integers(0, len(fed)), "place")
    (*_, last) = seen(status(QUEUED, 0), [*fed[:place], beat, *fed[place:]])
    assert last == at_worker(told[-1])


def test_a_job_whose_first_heartbeat_is_under_way_is_paused() -> None:
    """Temporal says only that a worker has the job."""
    known = at_worker(paused(3))
    assert with_answer(known, status(RUNNING, start_time=Timestamp(seconds=1))) is known


@pytest.mark.parametrize("waits", [True, False], ids=["at the worker", "in the queue"])
def test_the_log_of_a_paused_job_does_not_contradict_temporal(*, waits: bool) -> None:
    """A watcher that comes late reads of an earlier pause, and of its end. Temporal's answer is newer."""
    log = [report(1), paused(2), report(3), paused(4)]
    answer = at_worker(paused(5)) if waits else status(QUEUED, progress=paused(5, ""), start_time=Timestamp(seconds=1))
    known = with_answer(llm_pb2.JobStatus(), answer)
    for progress in log:
        known = with_record(known, internal_pb2.FeedRecord(progress=progress), 1, live=False)
        assert known.state == QUEUED
    assert (known.progress.worker == "a") == waits
    assert with_record(known, started(1, Timestamp(seconds=9)), 1, live=False).state == RUNNING


def test_the_log_of_a_lost_attempt_that_had_paused_does_not_run_again() -> None:
    error = errors.to_status(errors.WorkerLost("why"))
    known = status(QUEUED, 1, start_time=Timestamp(seconds=1), error=error)
    for progress in (report(1), paused(2), report(3)):
        known = with_record(known, internal_pb2.FeedRecord(progress=progress), 1, live=False)
        assert known.state == QUEUED


def test_a_paused_job_that_another_worker_has_runs() -> None:
    """That worker has sent no heartbeat yet, and the feed is unavailable."""
    known = status(QUEUED, progress=paused(5, ""))
    assert with_answer(known, status(RUNNING)).state == RUNNING


def test_an_attempt_that_started_while_temporal_was_asked_runs() -> None:
    (*_, known) = seen(status(QUEUED, 0), [(started(1, Timestamp(seconds=5)), 1)])
    answer = status(QUEUED, 0, queue=llm_pb2.QueueInfo(backlog=1))
    assert with_answer(known, answer, started_meanwhile=True) is known


@pytest.mark.parametrize(
    ("error", "number", "start", "runs"),
    [
        (errors.WorkerLost, 1, 5, False),
        (errors.WorkerLost, 2, 9, True),
        (errors.WorkerShutdown, 1, 5, False),
        (errors.WorkerShutdown, 1, 9, True),
    ],
    ids=["the lost one", "the next one", "the one that handed over", "the one that goes on after it"],
)
def test_what_the_log_held_before_does_not_run_again(
    error: type[errors.JobError], number: int, start: int, *, runs: bool
) -> None:
    """A stored record of an attempt that ended does not set a waiting job to RUNNING. One of the next attempt does."""
    known = status(QUEUED, 1, start_time=Timestamp(seconds=5), error=errors.to_status(error("why")))
    record = started(number, Timestamp(seconds=start))
    assert (with_record(known, record, number, live=False).state == RUNNING) == runs
    assert with_record(known, record, number, live=True).state == RUNNING


def test_an_attempt_that_was_lost_runs_no_more() -> None:
    """A killed worker cannot write the end of its attempt to the feed, so Temporal's answer counts."""
    (*_, known) = seen(status(QUEUED, 0), [(started(1, Timestamp(seconds=5)), 1)])
    assert with_answer(known, status(QUEUED, 1)).state == QUEUED


def test_the_heartbeat_of_an_earlier_attempt_is_no_news() -> None:
    """Temporal shows the heartbeat of the last attempt until the new attempt has sent its own."""
    known = status(RUNNING, 2, progress=report(3, "b"))
    assert with_answer(known, status(RUNNING, 1, progress=report(9))) is known


def test_a_worker_whose_clock_is_slow_is_believed() -> None:
    """The report of the running attempt counts, although the earlier attempt's worker had a clock that is ahead."""
    known = status(RUNNING, 2, progress=report(9))
    record = internal_pb2.FeedRecord(progress=report(4, "b"))
    assert with_record(known, record, 2, live=True).progress == report(4, "b")
    assert with_answer(known, status(RUNNING, 2, progress=report(4, "b"))).progress == report(4, "b")


def test_the_first_token_of_an_earlier_attempt_counts() -> None:
    """An attempt that continues has no first token of its own."""
    made = internal_pb2.FeedRecord(tokens_made=internal_pb2.TokensMade(made_at=Timestamp(seconds=4)))
    assert with_record(status(RUNNING, 2), made, 1, live=True).first_token_time == Timestamp(seconds=4)


def test_the_first_token_is_known_also_when_the_next_attempt_comes_from_temporal() -> None:
    """The feed is unavailable, and Temporal's answer has no time of the first token."""
    known = status(RUNNING, 1, first_token_time=Timestamp(seconds=4))
    assert with_answer(known, status(RUNNING, 2)).first_token_time == Timestamp(seconds=4)


def test_a_settled_outcome_is_known_when_temporal_alone_does_not_know_it() -> None:
    """Temporal reports RUNNING while no workflow worker can answer a query."""
    known = status(NOTIFYING, end_time=Timestamp(seconds=7))
    assert with_answer(known, status(RUNNING)) is known


def test_another_run_is_another_job() -> None:
    """After an operator's reset of the workflow no fact of the first run holds."""
    again = llm_pb2.JobStatus(run_id="second", state=QUEUED)
    assert with_answer(status(NOTIFYING, 3, progress=report(9)), again) == again
