"""A schedule in Temporal's form: its times, its policies, and the workflow that it starts."""

from typing import Final

from google.protobuf.duration_pb2 import Duration
from temporalio.client import (
    Schedule,
    ScheduleActionStartWorkflow,
    ScheduleCalendarSpec,
    ScheduleIntervalSpec,
    ScheduleOverlapPolicy,
    SchedulePolicy,
    ScheduleRange,
    ScheduleSpec,
    ScheduleState,
)

from jobs import cron, names
from jobs.pipelines import name_of
from jobs.schedule_rules import to_datetime
from jobs.search import AboutUser
from llm_pb import internal_pb2, schedule_pb2

_DEFAULT_CATCH_UP: Final = Duration(seconds=3600)
OVERLAPS: Final = {
    schedule_pb2.OVERLAP_POLICY_SKIP: ScheduleOverlapPolicy.SKIP,
    schedule_pb2.OVERLAP_POLICY_BUFFER_ONE: ScheduleOverlapPolicy.BUFFER_ONE,
    schedule_pb2.OVERLAP_POLICY_BUFFER_ALL: ScheduleOverlapPolicy.BUFFER_ALL,
    schedule_pb2.OVERLAP_POLICY_CANCEL_OTHER: ScheduleOverlapPolicy.CANCEL_OTHER,
    schedule_pb2.OVERLAP_POLICY_ALLOW_ALL: ScheduleOverlapPolicy.ALLOW_ALL,
}
"""Temporal's name of each policy. Its TERMINATE_OTHER would leave the job of the run that it terminates running."""


def to_temporal(
    action: internal_pb2.ScheduledAction, id_: str, queue: str, about: AboutUser, state: ScheduleState
) -> Schedule:
    """Return the schedule to create under an id. It has passed all checks.

    `queue` is the task queue of the workflows. `about` is what its runs hold of its user.
    """
    schedule = action.schedule
    window = schedule.catch_up_window if schedule.HasField("catch_up_window") else _DEFAULT_CATCH_UP
    return Schedule(
        action=ScheduleActionStartWorkflow(
            names.SCHEDULED_WORKFLOW_TYPE,
            action,
            id=id_,
            task_queue=queue,
            typed_search_attributes=about.search_attributes,
            memo=about.memo,
            static_summary=schedule.job.model or name_of(schedule.pipeline),
        ),
        spec=_times(schedule.times),
        policy=SchedulePolicy(
            overlap=OVERLAPS[schedule.overlap or schedule_pb2.OVERLAP_POLICY_SKIP],
            catchup_window=window.ToTimedelta(),
            pause_on_failure=schedule.pause_on_failure,
        ),
        state=state,
    )


def _times(times: schedule_pb2.ScheduleTimes) -> ScheduleSpec:
    return ScheduleSpec(
        calendars=[_calendar(cron.parse(expression)) for expression in times.cron],
        intervals=[
            ScheduleIntervalSpec(every=interval.every.ToTimedelta(), offset=interval.offset.ToTimedelta())
            for interval in times.intervals
        ],
        time_zone_name=times.time_zone or None,
        start_at=to_datetime(times.start_time) if times.HasField("start_time") else None,
        end_at=to_datetime(times.end_time) if times.HasField("end_time") else None,
        jitter=times.jitter.ToTimedelta() if times.HasField("jitter") else None,
    )


def _calendar(parsed: cron.Cron) -> ScheduleCalendarSpec:
    return ScheduleCalendarSpec(
        minute=_ranges(parsed.minutes),
        hour=_ranges(parsed.hours),
        day_of_month=_ranges(parsed.days_of_month),
        month=_ranges(parsed.months),
        day_of_week=_ranges(parsed.days_of_week),
    )


def _ranges(values: tuple[int, ...]) -> list[ScheduleRange]:
    """Return ascending values as ranges."""
    ranges: list[ScheduleRange] = []
    for value in values:
        if ranges and ranges[-1].end == value - 1:
            ranges[-1] = ScheduleRange(ranges[-1].start, value)
        else:
            ranges.append(ScheduleRange(value, value))
    return ranges
