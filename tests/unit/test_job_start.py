"""The start of a job: its options are whole, whatever the caller leaves out."""

from datetime import timedelta
from typing import Any

import pytest

from jobs.names import MEMO_OPTIONS
from jobs.options import DEFAULTS, complete, duration, read_memo
from jobs.start import JobStart, job_start
from jobs.times import execution_timeout
from llm_pb import common_pb2, internal_pb2, llm_pb2

MINUTE, HOURS = duration(timedelta(minutes=1)), timedelta(hours=8)


def new_job(**fields: Any) -> llm_pb2.JobRequest:
    return llm_pb2.JobRequest(user_id="u", request_id="r", model="docstrings", prompt="p", **fields)


def options_of(start: JobStart) -> internal_pb2.JobOptions:
    options = read_memo(lambda key, default: start.memo.get(key, default))
    assert options is not None
    return options


def test_options_that_are_unset_have_their_default() -> None:
    start = job_start(new_job(), internal_pb2.JobOptions(notify_operator=False))
    expected = internal_pb2.JobOptions(notify_operator=False)
    expected.MergeFrom(DEFAULTS)
    assert options_of(start) == expected
    assert start.execution_timeout == execution_timeout(HOURS)


@pytest.mark.parametrize(
    ("chosen", "field"),
    [
        (internal_pb2.JobOptions(timeouts=llm_pb2.JobTimeouts(run=MINUTE)), "timeouts.total"),
        (
            internal_pb2.JobOptions(gpu_retry=internal_pb2.RetryOptions(maximum_attempts=1)),
            "gpu_retry.initial_interval",
        ),
        (internal_pb2.JobOptions(notify_retry=internal_pb2.RetryOptions(maximum_attempts=1)), "notify_retry.within"),
    ],
)
def test_a_message_with_one_field_leaves_the_others_at_their_default(
    chosen: internal_pb2.JobOptions, field: str
) -> None:
    options = options_of(job_start(new_job(), chosen))
    outer, inner = field.split(".")
    assert getattr(getattr(options, outer), inner) == getattr(getattr(DEFAULTS, outer), inner)
    (descriptor, value), *_ = getattr(chosen, outer).ListFields()
    assert getattr(getattr(options, outer), descriptor.name) == value


def test_a_chosen_time_replaces_the_default_as_a_whole() -> None:
    """Zero is a time, too. It is not replaced, nor is a fraction of a second added to the seconds of the default."""
    half, zero = duration(timedelta(milliseconds=500)), duration(timedelta(0))
    options = options_of(job_start(new_job(), internal_pb2.JobOptions(heartbeat_timeout=half, notify_hold=zero)))
    assert (options.heartbeat_timeout, options.notify_hold) == (half, zero)


def test_the_options_of_a_background_job_have_the_defaults_of_its_class() -> None:
    job = new_job(job_class=common_pb2.JOB_CLASS_BACKGROUND)
    start = job_start(job, internal_pb2.JobOptions(notify_operator=False))
    options = options_of(start)
    assert options.gpu_task_queue == "llm-gpu-activities.background"
    assert options.timeouts.queue.ToTimedelta() == timedelta(hours=12)
    assert start.execution_timeout == execution_timeout(timedelta(hours=24))
    assert start.priority.fairness_key == f"/BACKGROUND/{job.user_id}"
    assert complete(None, job).gpu_task_queue == options.gpu_task_queue, "a workflow that was started by hand"
    assert complete(None, job).timeouts == options.timeouts
    chosen = internal_pb2.JobOptions(gpu_task_queue="own", timeouts=llm_pb2.JobTimeouts(queue=MINUTE))
    assert options_of(job_start(job, chosen)).gpu_task_queue == "own"
    assert options_of(job_start(job, chosen)).timeouts.queue == MINUTE


def test_a_jobs_own_timeout_bounds_its_workflow() -> None:
    job = new_job(timeouts=llm_pb2.JobTimeouts(total=MINUTE))
    start = job_start(job, internal_pb2.JobOptions(notify_operator=False))
    assert start.execution_timeout == execution_timeout(timedelta(minutes=1))


def test_a_price_travels_beside_the_options() -> None:
    """Version 0.1.0 refuses options with a field that it does not know."""
    price = llm_pb2.ModelPrice(currency="EUR", prompt_micros_per_million=150_000, output_micros_per_million=1)
    start = job_start(new_job(), internal_pb2.JobOptions(price=price))
    assert options_of(start).price == price
    assert "price" not in start.memo[MEMO_OPTIONS]
    assert not options_of(job_start(new_job(), internal_pb2.JobOptions())).HasField("price")
