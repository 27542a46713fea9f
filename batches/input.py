"""The whole input of a batch: read as it comes, within limits, with all that is wrong with it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from batches.custom_ids import CustomIds
from batches.lines import Check, Line, LineReader
from batches.splitting import LineSplitter, RawLine
from jobs.field_rules import Violation
from llm_pb import batch_pb2, internal_pb2

MAX_LINES: Final = 50_000
MAX_BYTES: Final = 200_000_000
MAX_LINE_BYTES: Final = 4 * 1024 * 1024
MAX_VIOLATIONS: Final = 100
"""Maximum number of bad fields that the status of a batch names."""
MAX_VIOLATION_BYTES: Final = 32 * 1024
"""Maximum size of what it says of them, in bytes: a page of batches is one message."""


class InputTooLarge(Exception):
    """The input has more lines or bytes than the operator allows, or none. Nothing of it counts."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(f"{violation.field} {violation.description}")
        self.violation = violation
        """The limit, as a rule of the field `input`."""


class BatchInput:
    """Reads an input once. `violations` and the counts are of the lines so far."""

    def __init__(
        self,
        batch: batch_pb2.BatchRequest,
        limits: internal_pb2.BatchLimits | None = None,
        check: Check | None = None,
        *,
        is_planned: bool = False,
    ) -> None:
        """`check` and `is_planned` are as for LineReader."""
        limits = limits or internal_pb2.BatchLimits()
        self._max_lines = limits.lines or MAX_LINES
        self._max_bytes = limits.bytes or MAX_BYTES
        self._max_line_bytes = limits.line_bytes or MAX_LINE_BYTES
        self._splitter = LineSplitter(self._max_line_bytes)
        self._reader = LineReader(batch, check, is_planned=is_planned)
        self._ids = CustomIds()
        self._openai = False
        self._violation_bytes = 0
        self.count = 0
        """Number of lines."""
        self.bad = 0
        """Number of bad lines."""
        self.violations: list[Violation] = []
        """The first bad fields, as `lines[2].params.top_p`."""

    def feed(self, data: bytes) -> Iterator[Line]:
        """Yield the lines that end in the next bytes of the input. Raises InputTooLarge."""
        for raw in self._splitter.feed(data):
            yield self._read(raw)
        if self._splitter.size > self._max_bytes:
            raise InputTooLarge(Violation("input", f"must have at most {self._max_bytes} bytes"))

    def close(self) -> Iterator[Line]:
        """Yield the last line. Raises InputTooLarge, also for an input without a line."""
        for raw in self._splitter.close():
            yield self._read(raw)
        if not self.count:
            raise InputTooLarge(Violation("input", "must have at least one line"))

    def _read(self, raw: RawLine) -> Line:
        if self.count == self._max_lines:
            raise InputTooLarge(Violation("input", f"must have at most {self._max_lines} lines"))
        self.count += 1
        line = self._reader.read(raw, self._max_line_bytes)
        if line.custom_id and (first := self._ids.add(line.custom_id, line.index)) is not None:
            name = "custom_id" if line.openai else "request_id"
            line = line.with_problem(Violation(name, f"must be unique: it is that of lines[{first}], too"))
        if not line.problems:
            self._openai = line.openai
            return line
        self.bad += 1
        for field, description in line.problems:
            path = f"lines[{line.index}]"
            self._name(Violation(f"{path}.{field}" if field else path, description))
        # A line without a form of its own is reported in the form of the lines before it.
        return line if line.custom_id or line.openai else replace(line, openai=self._openai)

    def _name(self, violation: Violation) -> None:
        """Add a violation, unless there are too many."""
        size = len(violation.field.encode()) + len(violation.description.encode())
        if len(self.violations) < MAX_VIOLATIONS and self._violation_bytes + size <= MAX_VIOLATION_BYTES:
            self.violations.append(violation)
            self._violation_bytes += size
