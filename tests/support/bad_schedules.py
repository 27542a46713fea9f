"""Requests that break a rule of schedule.proto: one row for each way. See tests.support.bad_requests."""

from collections.abc import Iterator
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from llm_pb import llm_pb2, schedule_pb2
from tests.support.bad_requests import BAD_IDS, BAD_WORKFLOW_IDS, REQUESTS, Row

_DAY: Final = 24 * 3600
_OF_ID: Final = (
    *("GetSchedule", "UpdateSchedule", "PauseSchedule", "UnpauseSchedule"),
    *("TriggerSchedule", "BackfillSchedule", "DeleteSchedule"),
)
_BAD_OVERLAPS: Final = (-1, 6, 99)
_SOMETIME: Final = Timestamp(seconds=1_000_000_000)
_NEVER: Final = Timestamp(seconds=-1)


def schedule(**changes: Any) -> schedule_pb2.Schedule:
    """Return a valid schedule with these changes. None removes a field."""
    values = {
        "user_id": "u",
        "request_id": "r",
        "job": {"model": "docstrings", "prompt": "Hi."},
        "times": {"cron": ["0 0 1 1 *"]},
        **changes,
    }
    return schedule_pb2.Schedule(**{name: value for name, value in values.items() if value is not None})


def valid(rpc: str) -> Any:
    """Return a valid request of a method of ScheduleService, about a schedule that does not exist."""
    request: Any = REQUESTS[rpc]()
    if "schedule_id" in request.DESCRIPTOR.fields_by_name:
        request.schedule_id = "llmschedule-u-none"
    if "schedule" in request.DESCRIPTOR.fields_by_name:
        request.schedule.CopyFrom(schedule())
    if rpc == "BackfillSchedule":
        request.start_time.CopyFrom(_SOMETIME)
        request.end_time.FromSeconds(_SOMETIME.seconds + 60)
    return request


def schedule_rows() -> Iterator[Row]:
    """Yield the table."""
    for rpc in ("CreateSchedule", "UpdateSchedule"):
        for what, changes, *fields in _schedules():
            yield _row(rpc, what, *fields, schedule=schedule(**changes))
        request = valid(rpc)
        request.ClearField("schedule")
        yield Row(rpc, "no schedule", request.SerializeToString(), frozenset({"schedule"}))
        large = schedule(job={"model": "structured", "prompt": "x" * 256 * 1024})
        yield _row(rpc, "a large schedule", "schedule", schedule=large)
    for rpc in _OF_ID:
        for what, value in BAD_WORKFLOW_IDS.items():
            yield _row(rpc, f"schedule_id with {what}", "schedule_id", schedule_id=value)
    for rpc in ("PauseSchedule", "UnpauseSchedule"):
        for note in ("a\nb", "\x1b[31m", "é" * 513):
            yield _row(rpc, f"note {note[:12]!r}", "note", note=note)
    for rpc in ("TriggerSchedule", "BackfillSchedule"):
        for overlap in _BAD_OVERLAPS:
            yield _row(rpc, f"overlap {overlap}", "overlap", overlap=overlap)
    for what, times, *fields in (
        ("no times", (None, None), "start_time", "end_time"),
        ("no end", (_SOMETIME, None), "end_time"),
        ("an end at its start", (_SOMETIME, _SOMETIME), "end_time"),
        ("an end in the future", (_SOMETIME, Timestamp(seconds=250_000_000_000)), "end_time"),
        ("times before 1970", (_NEVER, _NEVER), "start_time", "end_time"),
        ("times of no year", (Timestamp(seconds=2**60), Timestamp(seconds=-(2**60))), "start_time", "end_time"),
    ):
        request = valid("BackfillSchedule")
        for name, time in zip(("start_time", "end_time"), times, strict=True):
            request.ClearField(name)
            if time is not None:
                getattr(request, name).CopyFrom(time)
        yield Row("BackfillSchedule", what, request.SerializeToString(), frozenset(map(str, fields)))
    for what, value in BAD_IDS.items():
        yield _row("ListSchedules", f"user_id with {what}", "user_id", user_id=value)
    for size in (-1, 101, -(2**31), 2**31 - 1):
        yield _row("ListSchedules", f"page_size {size}", "page_size", page_size=size)
    for token in ("!!!!", "AAAA", "a" * 60_000):
        yield _row("ListSchedules", f"page_token {token[:12]!r}", "page_token", page_token=token)


def _schedules() -> Iterator[tuple[Any, ...]]:
    """Yield what is wrong, the changes that make it so, and the fields that the error must name."""
    for field in ("user_id", "request_id"):
        yield f"no {field}", {field: ""}, f"schedule.{field}"
        for what, value in BAD_IDS.items():
            yield f"{field} with {what}", {field: value}, f"schedule.{field}"
    yield "a request_id without room for a time", {"request_id": "a" * 108}, "schedule.request_id"
    yield "no action", {"job": None}, "schedule.job"
    own = {"user_id": "u", "request_id": "r", "model": "docstrings", "prompt": "Hi."}
    yield "a job with ids of its own", {"job": own}, "schedule.job.user_id", "schedule.job.request_id"
    of_file = {"model": "docstrings", "prompt_file": {"file_id": "file-1"}}
    yield "a job with a prompt file", {"job": of_file}, "schedule.job.prompt_file"
    wrong = llm_pb2.JobRequest(model="gpt", priority=9, params={"temperature": 9})
    fields = ("schedule.job.model", "schedule.job.priority", "schedule.job.params.temperature", "schedule.job.prompt")
    yield "a bad job", {"job": wrong}, *fields
    for what, work, *fields_ in (
        ("a batch", {"batch": {"user_id": "u", "request_id": "r", "job_class": 99}}, "input.file_id", "job_class"),
        ("a pipeline", {"pipeline": {"user_id": "u", "request_id": "r"}}, "spec"),
    ):
        (kind,) = work
        names = ("user_id", "request_id", *fields_)
        yield f"{what} with ids of its own", {"job": None, **work}, *(f"schedule.{kind}.{name}" for name in names)
    for overlap in _BAD_OVERLAPS:
        yield f"overlap {overlap}", {"overlap": overlap}, "schedule.overlap"
    for seconds in (-1, 0, 9, 366 * _DAY):
        window = Duration(seconds=seconds)
        yield f"a window of {seconds} s", {"catch_up_window": window}, "schedule.catch_up_window"
    yield "no times", {"times": None}, "schedule.times"
    for what, times, *names in _times():
        yield what, {"times": times}, *(f"schedule.times.{name}" for name in names)


def _times() -> Iterator[tuple[Any, ...]]:
    yield "times without any", {}, "cron"
    yield "17 expressions", {"cron": ["* * * * *"] * 17}, "cron"
    for cron in (
        *("", "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *", "* * * * 8"),
        *("0 0 30 2 *", "0 0 31 4,6,9,11 *", "5-1 * * * *", "*/0 * * * *", "a * * * *", "MON * * * *", "-1 * * * *"),
        *(
            "@reboot",
            "@every 5s",
            "TZ=UTC * * * * *",
            "* * * * * # x",
            "1,,2 * * * *",
            "*" * 200,
            "1" * 99 + " * *",
        ),
    ):
        yield f"cron {cron[:20]!r}", {"cron": ["0 0 * * *", cron]}, "cron[1]"
    for what, every, offset, *names in (
        ("of no length", Duration(), None, "every"),
        ("of half a second", Duration(nanos=500_000_000), None, "every"),
        ("of a part of a second", Duration(seconds=60, nanos=1), None, "every"),
        ("of a negative length", Duration(seconds=-60), None, "every"),
        ("of two years", Duration(seconds=730 * _DAY), None, "every"),
        ("with its own length as offset", Duration(seconds=60), Duration(seconds=60), "offset"),
        ("with a negative offset", Duration(seconds=60), Duration(seconds=-1), "offset"),
        ("with a part of a second as offset", Duration(seconds=60), Duration(nanos=1), "offset"),
    ):
        interval = schedule_pb2.ScheduleInterval(every=every, offset=offset)
        yield f"an interval {what}", {"intervals": [interval]}, *(f"intervals[0].{name}" for name in names)
    yield "17 intervals", {"intervals": [{"every": {"seconds": 60}}] * 17}, "intervals"
    yearly = {"cron": ["0 0 1 1 *"]}
    for zone in ("Mars/Olympus", "../UTC", "/etc/passwd", "Local", "Europe/Berlin\n", "é", "a" * 65, "+01:00"):
        yield f"zone {zone[:12]!r}", {**yearly, "time_zone": zone}, "time_zone"
    for seconds in (-1, _DAY + 1):
        yield f"jitter of {seconds} s", {**yearly, "jitter": {"seconds": seconds}}, "jitter"
    minutely = {"intervals": [{"every": {"seconds": 3600}}, {"every": {"seconds": 60}}]}
    yield "jitter over an interval", {**minutely, "jitter": {"seconds": 61}}, "jitter"
    future = 250_000_000_000
    for what, start, end, *names in (
        ("an end before its start", future, future - 1, "end_time"),
        ("an end in the past", None, 1_000_000_000, "end_time"),
        ("a start before 1970", -1, None, "start_time"),
        ("times of no year", 2**60, -(2**60), "start_time", "end_time"),
    ):
        bounds = {
            name: Timestamp(seconds=value)
            for name, value in (("start_time", start), ("end_time", end))
            if value is not None
        }
        yield what, {**yearly, **bounds}, *names


def _row(rpc: str, what: str, *fields: str, **changes: Any) -> Row:
    request = valid(rpc)
    for name, value in changes.items():
        if name == "schedule":
            request.schedule.CopyFrom(value)
        else:
            setattr(request, name, value)
    return Row(rpc, what, request.SerializeToString(), frozenset(fields))
