"""Rules that fields of several messages share. Each yields the violations that it finds."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from google.protobuf.duration_pb2 import Duration

from jobs.hosts import is_host
from jobs.ids import ID_PATTERN
from llm_pb import common_pb2, llm_pb2

MAX_URL_BYTES: Final = 2048
MIN_TIMEOUT_MS: Final = 1
MAX_DURATION_SECONDS: Final = 315_576_000_000
"""Maximum of a google.protobuf.Duration: 10,000 years. Code that reads a longer one raises an error."""
DEPTH: Final = "at most 100 messages deep, which are 33 objects of a Struct"
"""What protobuf reads, for the descriptions of violations."""
_ID_FORM: Final = "1 to 128 of A-Z a-z 0-9 . _ : @ = + ~ - and first a letter or digit"
MODEL_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@=+~-]{0,255}")
"""The form of a model's name."""
MAX_MODEL: Final = 255
MAX_IMAGE_SIDE: Final = 8192
"""Maximum length of a model's name in characters: a search attribute on PostgreSQL holds no more."""
MAX_LABELS: Final = 16
MAX_LABEL_KEY: Final = 64
MAX_LABEL_VALUE: Final = 512
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Violation(NamedTuple):
    """A field that breaks a rule."""

    field: str
    """Path from the request, in proto names: job.params.stop[2]."""
    description: str
    """The rule and the fix."""


def too_large(size: int, most: int) -> str:
    """Return the description of a violation by a size of `size` bytes."""
    return f"is {size} bytes; at most {most} fit"


def check_id(field: str, value: str, *, required: bool) -> Iterator[Violation]:
    """Check a user_id, request_id or project_id."""
    if not value:
        if required:
            yield Violation(field, f"is required: {_ID_FORM}")
    elif ID_PATTERN.fullmatch(value) is None:
        yield Violation(field, f"must be {_ID_FORM}")


def check_model(field: str, value: str, *, required: bool, strict: bool = True) -> Iterator[Violation]:
    """Check the name of a model."""
    if not value:
        if required:
            yield Violation(field, "is required: a model name that ListModels returns")
    elif MODEL_PATTERN.fullmatch(value) is None or (strict and len(value) > MAX_MODEL):
        yield Violation(field, "must be a model name that ListModels returns")


def check_line(field: str, value: str, max_bytes: int, *, required: bool) -> Iterator[Violation]:
    """Check one line of text."""
    if required and not value:
        yield Violation(field, "is required")
    elif len(value.encode()) > max_bytes:
        yield Violation(field, f"must be at most {max_bytes} bytes of UTF-8")
    elif _CONTROL.search(value):
        yield Violation(field, "must not hold control characters")


def check_size(field: str, value: str, max_bytes: int) -> Iterator[Violation]:
    """Check a text that must not be empty."""
    if not value:
        yield Violation(field, "must not be empty")
    elif len(value.encode()) > max_bytes:
        yield Violation(field, f"must be at most {max_bytes} bytes of UTF-8")


def check_texts(field: str, values: Iterable[str], max_bytes: int) -> Iterator[Violation]:
    """Check each text of a list."""
    for index, value in enumerate(values):
        yield from check_size(f"{field}[{index}]", value, max_bytes)


def map_path(field: str, key: str) -> str:
    """Return the path of a value of a map: labels["team"]. The key is quoted as in JSON, and cut if it is long."""
    return f"{field}[{json.dumps(key if len(key) <= MAX_LABEL_KEY else f'{key[:MAX_LABEL_KEY]}...')}]"


def check_labels(field: str, labels: Mapping[str, str]) -> Iterator[Violation]:
    """Check the labels of a job. They have the bounds of OpenAI's `metadata`, so that its clients can set any of it."""
    if len(labels) > MAX_LABELS:
        yield Violation(field, f"must hold at most {MAX_LABELS} pairs, not {len(labels)}")
    for key, value in [*labels.items()][:MAX_LABELS]:
        path = map_path(field, key)
        if not 1 <= len(key) <= MAX_LABEL_KEY or _CONTROL.search(key):
            yield Violation(path, f"must have a key of 1 to {MAX_LABEL_KEY} characters without control characters")
        if len(value) > MAX_LABEL_VALUE:
            yield Violation(path, f"must have at most {MAX_LABEL_VALUE} characters, not {len(value)}")


def check_enum(field: str, value: int, enum: type) -> Iterator[Violation]:
    """Check a value of an enum: not 0, and known."""
    names = enum.keys()[1:]  # type: ignore[attr-defined]  # the wrapper's class has no public name
    if value not in enum.values()[1:]:  # type: ignore[attr-defined]
        yield Violation(field, f"must be one of {', '.join(names)}")


def check_duration(field: str, value: Duration) -> Iterator[Violation]:
    """Check a time limit."""
    # Temporal treats a limit that rounds to 0 as no limit.
    too_short = value.seconds == 0 and value.nanos < MIN_TIMEOUT_MS * 1_000_000
    if value.seconds < 0 or not 0 <= value.nanos <= 999_999_999 or too_short:
        yield Violation(field, f"must be a duration of at least {MIN_TIMEOUT_MS} ms")
    elif (value.seconds, value.nanos) > (MAX_DURATION_SECONDS, 0):
        yield Violation(field, f"must be at most {MAX_DURATION_SECONDS} s")


def check_budget(field: str, budget: common_pb2.Budget) -> Iterator[Violation]:
    """Check the limits of a budget."""
    for name in ("output_tokens", "prompt_tokens", "cost_micros"):
        if (value := getattr(budget, name)) < 0:
            yield Violation(f"{field}.{name}", f"must be 0 (no limit) or more, not {value}")
    if budget.HasField("engine_time"):
        yield from check_duration(f"{field}.engine_time", budget.engine_time)


def check_bounded_duration(field: str, value: Duration, least: int, most: int) -> Iterator[Violation]:
    """Check a duration with bounds in seconds."""
    if not (least <= value.seconds + value.nanos / 1e9 <= most and 0 <= value.nanos <= 999_999_999):
        yield Violation(field, f"must be a duration of {least} s to {most} s")


def check_image_size(field: str, size: llm_pb2.ImageSize) -> Iterator[Violation]:
    """Check the size of an image."""
    for name in ("width", "height"):
        if not 1 <= getattr(size, name) <= MAX_IMAGE_SIDE:
            yield Violation(f"{field}.{name}", f"must be 1 to {MAX_IMAGE_SIDE} pixels")


def check_url(field: str, value: str, *, strict: bool = True) -> Iterator[Violation]:
    """Check the URL of a webhook."""
    if not value:
        yield Violation(field, "is required: an absolute http or https URL")
        return
    wrong = list(check_line(field, value, MAX_URL_BYTES, required=True))
    if wrong:
        # urlsplit takes seconds for a long text.
        yield from wrong
        return
    try:
        url = urlsplit(value)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        usable = False
    else:
        if url.username is not None or url.password is not None:
            yield Violation(field, "must not hold a user or password")
        host = url.hostname or ""
        in_brackets = "[" in url.netloc
        if strict and usable and not (is_host(host) and in_brackets == (":" in host)):
            rule = "must name a host that can exist: a DNS name, an IPv4 address of four numbers or an IPv6 address"
            yield Violation(field, rule)
    if not usable or re.search(r"[\s\\]", value):
        yield Violation(field, "must be an absolute http or https URL")
