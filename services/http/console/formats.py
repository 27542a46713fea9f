"""How values are written in pages."""

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import quote

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from markupsafe import Markup, escape

from durable_llm._enums import name_of
from durable_llm._prices import amount
from llm_pb import batch_pb2, common_pb2, llm_pb2
from openai_api.asked import NOTE_LABEL


def moment(value: Timestamp) -> Markup:
    """Return a time as people read it, with the exact one in its title. Modules keep it up to date."""
    time = value.ToDatetime(UTC)
    exact = time.isoformat(timespec="milliseconds")
    ago = (datetime.now(UTC) - time).total_seconds()
    words = "just now" if abs(ago) < 5 else f"{_about(ago)} ago" if ago > 0 else f"in {_about(-ago)}"
    title = f"{time:%Y-%m-%d %H:%M:%S} UTC"
    return Markup('<time datetime="{}" title="{}" data-relative>{}</time>').format(exact, title, words)


def _about(seconds: float) -> str:
    """Return a duration in one unit."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size * (2 if unit == "days" else 1):
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def clock(value: Timestamp) -> Markup:
    """Return the time of the day, with the whole one in its title."""
    time = value.ToDatetime(UTC)
    exact = time.isoformat(timespec="milliseconds")
    return Markup('<time datetime="{}" title="{:%Y-%m-%d %H:%M:%S} UTC">{:%H:%M:%S}</time>').format(exact, time, time)


def minute(value: Timestamp) -> str:
    """Return a time to the minute."""
    return f"{value.ToDatetime(UTC):%Y-%m-%d %H:%M} UTC"


def duration(seconds: float | Duration) -> str:
    """Return a duration in one or two units."""
    if isinstance(seconds, Duration):
        seconds = seconds.ToTimedelta().total_seconds()
    if seconds < 1:
        return f"{max(0, round(seconds * 1000))} ms"
    if seconds < 60:
        return f"{math.floor(seconds * 10) / 10:.1f} s" if seconds < 10 else f"{int(seconds)} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes < 10 and rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} days"


def between(start: Timestamp, end: Timestamp) -> str:
    """Return the time from one moment to another."""
    return duration((end.ToDatetime() - start.ToDatetime()).total_seconds())


def number(value: float) -> str:
    """Return a number with its thousands parted."""
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def size(count: int) -> str:
    """Return a number of bytes in one unit."""
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return f"{count / 1000**power:.1f} {unit}"
    return f"{count} B"


def as_path(value: str) -> str:
    """Return an id as it stands in a path: one segment."""
    return quote(value, safe="")


def verbatim(value: str) -> Markup:
    """Return a text for a `pre`, whose characters a browser then has all: HTML drops a first line break and CR."""
    # NUL cannot stand in HTML.
    text = str(escape(value)).replace("\r", "&#13;").replace("\0", "\N{REPLACEMENT CHARACTER}")
    return Markup("\n" + text)  # noqa: S704  # it is escaped


def words_of(enum: Any, value: int, prefix: str) -> str:
    """Return the name of an enum's value in words. That of a later version is a number."""
    return name_of(enum, value, prefix).replace("_", " ").capitalize()


def state(value: int) -> str:
    """Return the name of a JobState in words."""
    return words_of(llm_pb2.JobState, value, "JOB_STATE_")


def batch_state(value: int) -> str:
    """Return the name of a BatchState in words."""
    return words_of(batch_pb2.BatchState, value, "BATCH_STATE_")


def worker_state(value: int) -> str:
    """Return the name of a WorkerState in words."""
    return words_of(llm_pb2.WorkerState, value, "WORKER_STATE_")


def job_class(value: int) -> str:
    """Return the name of a JobClass in words."""
    return words_of(common_pb2.JobClass, value, "JOB_CLASS_")


def own_labels(labels: Mapping[str, str]) -> Sequence[tuple[str, str]]:
    """Return the labels that a caller has set, by name. The front's own notes are left out."""
    return sorted((name, value) for name, value in labels.items() if name != NOTE_LABEL)


FILTERS: Final[dict[str, Callable[..., Any]]] = {
    "amount": amount,
    "as_path": as_path,
    "between": between,
    "clock": clock,
    "duration": duration,
    "job_class": job_class,
    "minute": minute,
    "moment": moment,
    "number": number,
    "own_labels": own_labels,
    "size": size,
    "state": state,
    "verbatim": verbatim,
    "worker_state": worker_state,
}
"""The filters of the templates, by name."""
