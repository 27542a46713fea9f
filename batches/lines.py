"""The lines of a batch's input as jobs, each with all its problems. batch.proto says what a line may be."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Final

from batches.defaults import OF_A_LINE, fill_in
from batches.splitting import RawLine
from jobs.field_rules import Violation, too_large
from jobs.ids import ID_PATTERN
from jobs.limits import MAX_JOB_BYTES
from jobs.parsing import InvalidFields, parse
from jobs.rules import check_job
from jobs.strict_json import NoObject, RepeatedKeys, read_object
from llm_pb import batch_pb2, common_pb2, llm_pb2
from openai_api.asked import NOTE_LABEL
from openai_api.endpoints import READERS
from openai_api.errors import InvalidBody

MAX_CUSTOM_ID: Final = 512
"""Maximum length of a custom_id of OpenAI's form, in characters."""
_NO_TEXT: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, and halves of surrogate pairs, which no file could hold."""
_MAX_PROBLEMS: Final = 100
_MAX_WORDS: Final = 512
"""Maximum length of a path, and of a description, in characters."""
_OPENAI: Final = ("custom_id", "method", "url", "body")
_OF_A_JOB: Final = (
    ("notify",),
    ("notify_options",),
    ("cancel_if_unwatched",),
    ("cache",),
    ("timeouts", "total"),
    ("timeouts", "queue"),
)
"""Fields that only a job of its own has."""

Check = Callable[[llm_pb2.JobRequest], Iterable[Violation]]
"""Returns what the operator refuses of a job: its model, and values beyond bounds."""


@dataclass(frozen=True)
class Line:
    """A line of the input that is not blank."""

    index: int
    """Its number, from 0."""
    offset: int
    """Where it begins in the input, in bytes."""
    length: int
    """Its size in bytes, without the end of the line."""
    custom_id: str = ""
    """Empty for a bad line whose id cannot be read."""
    endpoint: str = ""
    """The path of OpenAI's API that a line in OpenAI's form is for; empty for the other form."""
    openai: bool = False
    """Whether the line has OpenAI's form. A bad line may have it without an endpoint."""
    watch: bool = False
    """Whether the item is a job of its own."""
    job: llm_pb2.JobRequest | None = None
    """The job; None of a bad line."""
    problems: tuple[Violation, ...] = ()
    """What is wrong with it, by paths within the line."""

    def with_problem(self, problem: Violation) -> "Line":
        """Return the line as a bad one."""
        return replace(self, job=None, problems=(*self.problems, problem))


class LineReader:
    """Reads the lines of one batch, each for itself."""

    def __init__(self, batch: batch_pb2.BatchRequest, check: Check | None = None, *, is_planned: bool = False) -> None:
        """`check` adds the operator's rules to those of jobs. A planned batch has passed both: nothing is checked."""
        self._batch = batch
        self._job_class = batch.job_class or common_pb2.JOB_CLASS_BACKGROUND
        self._check = check
        self._is_planned = is_planned

    def read(self, raw: RawLine, max_bytes: int = 0) -> Line:
        """Return a line with its job or with all that is wrong with it. `max_bytes` is named where it is exceeded."""
        place = (raw.index, raw.offset, raw.length)
        if raw.data is None:
            return Line(*place, problems=_bounded([Violation("", too_large(raw.length, max_bytes))]))
        try:
            value = read_object(raw.data)
        except RepeatedKeys as error:
            return Line(*place, problems=_bounded(error.violations))
        except NoObject as error:
            return Line(*place, problems=_bounded([Violation("", str(error))]))
        watch = value.pop("watch", False)
        problems = [] if isinstance(watch, bool) else [Violation("watch", "must be true or false")]
        form: _Form = _OpenAIForm(value) if any(name in value for name in _OPENAI) else _JobForm(value)
        problems += form.problems
        job = form.job
        if job is not None:
            problems += (Violation(form.path(found), found.description) for found in self._finish(job, watch is True))
        return Line(
            *place,
            custom_id=form.custom_id,
            endpoint=form.endpoint,
            openai=isinstance(form, _OpenAIForm),
            watch=watch is True,
            job=None if problems else job,
            problems=_bounded(problems),
        )

    def _finish(self, job: llm_pb2.JobRequest, watch: bool) -> Iterator[Violation]:
        """Fill in what the line leaves to the batch, and yield what is wrong with the whole."""
        batch = self._batch
        if job.user_id not in ("", batch.user_id):
            yield Violation("user_id", "must be that of the batch, or missing")
        if job.job_class not in (common_pb2.JOB_CLASS_UNSPECIFIED, self._job_class):
            yield Violation("job_class", "must be that of the batch, or missing")
        fill_in(job, batch.defaults, without=OF_A_LINE)
        job.user_id, job.job_class = batch.user_id, self._job_class
        job.project_id = job.project_id or batch.project_id
        if self._is_planned:
            return
        if not watch:
            known = {field.name for field, _ in job.ListFields()}
            for name, *rest in _OF_A_JOB:
                if name in known and all(getattr(job, name).HasField(part) for part in rest):
                    yield Violation(".".join((name, *rest)), 'is of a job of its own: it needs "watch": true')
        yield from check_job(job)
        if (size := job.ByteSize()) > MAX_JOB_BYTES:
            yield Violation("", too_large(size, MAX_JOB_BYTES))
        if self._check is not None:
            yield from self._check(job)


class _JobForm:
    """A line that is a JobRequest in proto3 JSON."""

    endpoint = ""

    def __init__(self, value: dict[str, Any]) -> None:
        self.custom_id = _id_of(value, "request_id", "requestId")
        self.job: llm_pb2.JobRequest | None = None
        self.problems: list[Violation] = []
        try:
            self.job = parse(value, llm_pb2.JobRequest())
        except InvalidFields as error:
            self.problems = list(error.violations) or [Violation("", str(error))]

    def path(self, violation: Violation) -> str:
        """Return the path of a violation of the job's within the line."""
        return violation.field


class _OpenAIForm:
    """A line that is a request of OpenAI's batches."""

    def __init__(self, value: dict[str, Any]) -> None:
        self.custom_id = _id_of(value, "custom_id")
        self.endpoint = ""
        self.job: llm_pb2.JobRequest | None = None
        self.problems = [Violation(name, "is not known here") for name in value if name not in _OPENAI]
        if not self.custom_id:
            rule = f"must be a text of 1 to {MAX_CUSTOM_ID} characters without control characters"
            self.problems.append(Violation("custom_id", rule))
        if value.get("method") != "POST":
            self.problems.append(Violation("method", "must be POST"))
        url = value.get("url")
        if not isinstance(url, str) or url not in READERS:
            self.problems.append(Violation("url", f"must be one of {', '.join(READERS)}"))
            return
        self.endpoint = url
        self._read_body(value.get("body"))

    def _read_body(self, body: object) -> None:
        if not isinstance(body, dict):
            self.problems.append(Violation("body", "must be a JSON object"))
            return
        try:
            asked = READERS[self.endpoint](body)
        except InvalidBody as error:
            self.problems += (Violation(f"body.{field}", description) for field, description in error.violations)
            return
        self.problems += (
            Violation(f"body.{name}", "is not supported in a batch")
            for name in ("stream", "background")
            if getattr(asked, name)
        )
        self._violation = asked.violation
        self.job = asked.job
        # The end user, whom the batch need not know.
        self.job.ClearField("user_id")
        asked.store = True
        if (note := str(asked.note(""))) != "{}":
            self.job.labels[NOTE_LABEL] = note
        known = ID_PATTERN.fullmatch(self.custom_id) is not None
        digest = hashlib.sha256(self.custom_id.encode()).hexdigest()
        self.job.request_id = self.custom_id if known else f"sha256-{digest}"

    def path(self, violation: Violation) -> str:
        """Return the path of a violation of the job's within the line."""
        field = self._violation(violation).field
        return f"body.{field}" if field else "body"


_Form = _JobForm | _OpenAIForm


def _bounded(problems: Iterable[Violation]) -> tuple[Violation, ...]:
    """Return the first problems, each once and with few words: the caller wrote some of them."""
    first = islice(dict.fromkeys(problems), _MAX_PROBLEMS)
    return tuple(Violation(cut(field, _MAX_WORDS), cut(description, _MAX_WORDS)) for field, description in first)


def cut(text: str, most: int) -> str:
    """Return the text, cut to this number of characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _id_of(value: dict[str, Any], *names: str) -> str:
    """Return the custom_id of a line; empty if it has none that can be shown."""
    found = next((value[name] for name in names if name in value), "")
    if not isinstance(found, str) or len(found) > MAX_CUSTOM_ID or _NO_TEXT.search(found):
        return ""
    return found
