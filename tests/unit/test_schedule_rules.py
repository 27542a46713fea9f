"""The rules of schedules that no server is needed for."""

from typing import Any

import pytest

from jobs import schedule_rules
from jobs.schedule_rules import check_pause
from llm_pb import llm_pb2, schedule_pb2


def fields_of(user_id: str = "alice", **times: Any) -> set[str]:
    schedule = schedule_pb2.Schedule(
        user_id=user_id,
        request_id="nightly",
        job=llm_pb2.JobRequest(model="m", prompt="p"),
        times=schedule_pb2.ScheduleTimes(**times),
    )
    request = schedule_pb2.CreateScheduleRequest(schedule=schedule)
    return {found.field for found in schedule_rules.check_create(request, lambda _: ())}


@pytest.mark.parametrize(
    ("cron", "seconds", "wrong"),
    [("@hourly", 3600, False), ("@hourly", 3601, True), ("0,10 * * * *", 601, True), ("0 0 * * *", 86400, False)],
)
def test_jitter_never_swaps_two_runs(cron: str, seconds: int, wrong: bool) -> None:
    """Two runs would begin in another order than their times."""
    assert fields_of(cron=[cron], jitter={"seconds": seconds}) == ({"schedule.times.jitter"} if wrong else set())


def test_nobody_has_schedules_of_the_canaries_user() -> None:
    """Whoever had, would own or break those of the operator."""
    assert fields_of(user_id="llm.canary", cron=["@daily"]) == {"schedule.user_id"}


@pytest.mark.parametrize(("size", "fields"), [(1000, []), (1001, ["note"])])
def test_a_note_has_the_length_that_temporal_takes(size: int, fields: list[str]) -> None:
    request = schedule_pb2.PauseScheduleRequest(schedule_id="llmschedule-alice-nightly", note="x" * size)
    assert [found.field for found in check_pause(request)] == fields
