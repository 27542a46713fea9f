"""The rules that schedule.proto states for the fields of a request, as code. See jobs.rules."""

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from jobs import cron, pipeline_rules
from jobs.field_rules import Violation, check_bounded_duration, check_enum, check_id, check_line, too_large
from jobs.ids import WORKFLOW_ID_PATTERN
from jobs.rules import MAX_PAGE_SIZE, check_submit
from jobs.schedules import CANARY_USER, MAX_REQUEST_ID, as_submitted
from llm_pb import batch_pb2, pipeline_pb2, schedule_pb2

MAX_SCHEDULE_BYTES: Final = 256 * 1024
"""Maximum size of a Schedule: Temporal keeps it in the state of a workflow of its own."""
MAX_CRONS: Final = 16
MAX_INTERVALS: Final = 16
MAX_INTERVAL_SECONDS: Final = 365 * 24 * 3600
MAX_JITTER_SECONDS: Final = 24 * 3600
MIN_CATCH_UP_SECONDS: Final = 10
"""What Temporal itself raises a shorter window to."""
MAX_NOTE_BYTES: Final = 1000
"""Temporal's own limit."""
_NO_TIME: Final = "must be a time of the years 1970 to 9999"


BatchRules = Callable[[batch_pb2.CreateBatchRequest], Iterable[Violation]]


def check_create(request: schedule_pb2.CreateScheduleRequest, batch_rules: BatchRules) -> list[Violation]:
    """Return the violations of a CreateScheduleRequest, apart from those of the operator's models and limits.

    `batch_rules` returns those of a batch.
    """
    return list(_schedule(request.schedule if request.HasField("schedule") else None, batch_rules))


def check_update(request: schedule_pb2.UpdateScheduleRequest, batch_rules: BatchRules) -> list[Violation]:
    """Return the violations of an UpdateScheduleRequest, as check_create() does."""
    schedule = request.schedule if request.HasField("schedule") else None
    return [*check_schedule_id(request), *_schedule(schedule, batch_rules)]


def check_schedule_id(
    request: schedule_pb2.GetScheduleRequest | schedule_pb2.DeleteScheduleRequest | schedule_pb2.UpdateScheduleRequest,
) -> list[Violation]:
    """Return the violations of a request that only names a schedule."""
    return list(_schedule_id(request.schedule_id))


def check_list(request: schedule_pb2.ListSchedulesRequest) -> list[Violation]:
    """Return the violations of a ListSchedulesRequest. The gateway checks the page_token when it opens it."""
    violations = list(check_id("user_id", request.user_id, required=False))
    if not 0 <= request.page_size <= MAX_PAGE_SIZE:
        violations.append(Violation("page_size", f"must be 1 to {MAX_PAGE_SIZE}, or 0 for the default"))
    return violations


def check_pause(
    request: schedule_pb2.PauseScheduleRequest | schedule_pb2.UnpauseScheduleRequest,
) -> list[Violation]:
    """Return the violations of a PauseScheduleRequest or UnpauseScheduleRequest."""
    return [
        *_schedule_id(request.schedule_id),
        *check_line("note", request.note, MAX_NOTE_BYTES, required=False),
    ]


def check_trigger(request: schedule_pb2.TriggerScheduleRequest) -> list[Violation]:
    """Return the violations of a TriggerScheduleRequest."""
    return [*_schedule_id(request.schedule_id), *_overlap("overlap", request.overlap)]


def check_backfill(request: schedule_pb2.BackfillScheduleRequest) -> list[Violation]:
    """Return the violations of a BackfillScheduleRequest."""
    violations = [*_schedule_id(request.schedule_id), *_overlap("overlap", request.overlap)]
    for name in ("start_time", "end_time"):
        if not request.HasField(name):
            violations.append(Violation(name, "is required"))
    violations += _range(request.start_time, request.end_time, request, "")
    return violations


def _schedule(schedule: schedule_pb2.Schedule | None, batch_rules: BatchRules) -> Iterator[Violation]:
    if schedule is None:
        yield Violation("schedule", "is required")
        return
    if schedule.ByteSize() > MAX_SCHEDULE_BYTES:
        # The other checks would take too long.
        yield Violation("schedule", too_large(schedule.ByteSize(), MAX_SCHEDULE_BYTES))
        return
    yield from check_id("schedule.user_id", schedule.user_id, required=True)
    if schedule.user_id == CANARY_USER:
        yield Violation("schedule.user_id", "must be another one: the operator's canaries have it")
    yield from check_id("schedule.request_id", schedule.request_id, required=True)
    if MAX_REQUEST_ID < len(schedule.request_id) <= 128:
        yield Violation("schedule.request_id", f"must have at most {MAX_REQUEST_ID} characters")
    yield from _action(schedule, batch_rules)
    if schedule.HasField("times"):
        yield from _times(schedule.times, "schedule.times.")
    else:
        yield Violation("schedule.times", "is required")
    yield from _overlap("schedule.overlap", schedule.overlap)
    if schedule.HasField("catch_up_window"):
        yield from check_bounded_duration(
            "schedule.catch_up_window", schedule.catch_up_window, MIN_CATCH_UP_SECONDS, MAX_INTERVAL_SECONDS
        )


def _action(schedule: schedule_pb2.Schedule, batch_rules: BatchRules) -> Iterator[Violation]:
    kind = schedule.WhichOneof("action")
    if kind is None:
        yield Violation("schedule.job", "is required, or batch or pipeline: what a run starts")
        return
    if schedule.job.HasField("prompt_file"):
        yield Violation("schedule.job.prompt_file", "must be unset: the job of a schedule has its prompt in itself")
        return
    work, own = getattr(schedule, kind), (f"{kind}.user_id", f"{kind}.request_id")
    for name in own:
        if getattr(work, name.partition(".")[2]):
            yield Violation(f"schedule.{name}", "must be unset: it is made of that of the schedule")
    request = as_submitted(schedule)
    if isinstance(request, batch_pb2.CreateBatchRequest):
        violations = batch_rules(request)
    elif isinstance(request, pipeline_pb2.SubmitPipelineRequest):
        violations = pipeline_rules.check_submit(request)
    else:
        violations = check_submit(request)
    for field, rule in violations:
        if field not in own:
            yield Violation(f"schedule.{field}", rule)


def _times(times: schedule_pb2.ScheduleTimes, path: str) -> Iterator[Violation]:
    if not times.cron and not times.intervals:
        yield Violation(f"{path}cron", "must hold an expression, or intervals one: it would never start anything")
    if len(times.cron) > MAX_CRONS:
        yield Violation(f"{path}cron", f"must hold at most {MAX_CRONS} expressions, not {len(times.cron)}")
    for index, expression in enumerate(times.cron[:MAX_CRONS]):
        try:
            cron.parse(expression)
        except ValueError as error:
            yield Violation(f"{path}cron[{index}]", str(error))
    if len(times.intervals) > MAX_INTERVALS:
        yield Violation(f"{path}intervals", f"must hold at most {MAX_INTERVALS} intervals, not {len(times.intervals)}")
    for index, interval in enumerate(times.intervals[:MAX_INTERVALS]):
        yield from _interval(interval, f"{path}intervals[{index}].")
    yield from _range(times.start_time, times.end_time, times, path)
    yield from _jitter(times, path)


def _interval(interval: schedule_pb2.ScheduleInterval, path: str) -> Iterator[Violation]:
    every, offset = interval.every, interval.offset
    if every.nanos or not 1 <= every.seconds <= MAX_INTERVAL_SECONDS:
        yield Violation(f"{path}every", f"must be 1 s to {MAX_INTERVAL_SECONDS} s, in whole seconds")
    if offset.nanos or offset.seconds < 0 or (offset.seconds and offset.seconds >= every.seconds):
        yield Violation(f"{path}offset", "must be 0 or more and less than every, in whole seconds")


def _jitter(times: schedule_pb2.ScheduleTimes, path: str) -> Iterator[Violation]:
    if not times.HasField("jitter"):
        return
    wrong = list(check_bounded_duration(f"{path}jitter", times.jitter, 0, MAX_JITTER_SECONDS))
    yield from wrong
    shortest = min(_distances(times), default=MAX_JITTER_SECONDS)
    if not wrong and _seconds(times.jitter) > shortest:
        yield Violation(f"{path}jitter", "must be at most the shortest distance of two times")


def _distances(times: schedule_pb2.ScheduleTimes) -> Iterator[float]:
    yield from (_seconds(interval.every) for interval in times.intervals[:MAX_INTERVALS])
    for expression in times.cron[:MAX_CRONS]:
        try:
            minutes = cron.parse(expression).shortest_minutes
        except ValueError:
            # It breaks a rule of its own.
            continue
        yield 60 * minutes


def _range(
    start: Timestamp,
    end: Timestamp,
    holder: schedule_pb2.ScheduleTimes | schedule_pb2.BackfillScheduleRequest,
    path: str,
) -> Iterator[Violation]:
    first, last = to_datetime(start), to_datetime(end)
    if first is None:
        yield Violation(f"{path}start_time", _NO_TIME)
    if last is None:
        yield Violation(f"{path}end_time", _NO_TIME)
    if not (holder.HasField("start_time") and holder.HasField("end_time")) or first is None or last is None:
        return
    if (start.seconds, start.nanos) >= (end.seconds, end.nanos):
        yield Violation(f"{path}end_time", "must be after start_time")


def to_datetime(time: Timestamp) -> datetime | None:
    """Return the time; None for one that no schedule can have."""
    try:
        found = time.ToDatetime(UTC)
    except (ValueError, OverflowError):
        return None
    return found if found.year >= 1970 and 0 <= time.nanos <= 999_999_999 else None


def _overlap(field: str, value: int) -> Iterator[Violation]:
    if value:
        yield from check_enum(field, value, schedule_pb2.OverlapPolicy)


def _schedule_id(value: str) -> Iterator[Violation]:
    if WORKFLOW_ID_PATTERN.fullmatch(value) is None:
        yield Violation("schedule_id", "must be the id that CreateSchedule returned: llmschedule-<user>-<request>")


def _seconds(value: Duration) -> float:
    return value.seconds + value.nanos / 1e9
