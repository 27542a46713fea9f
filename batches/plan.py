"""The order in which the items of a batch run, as a file of records of one size that chunks read by range.

Items are grouped by model, in the order in which the models first occur, watched items after all others. Within a
group they are sorted by priority, then by the prefixes of their prompts, so that items with a common prefix run near
one another and share the engine's cache. A prefix counts by a hash of each length of `_ENDS`: items that share a prefix
of such a length stand together, whatever follows it.
"""

import hashlib
import heapq
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import IO, Final

from batches.lines import Line
from llm_pb import internal_pb2, llm_pb2

_MAGIC: Final = b"llmplan1"
_HEADER: Final = struct.Struct("<8sQ")
_RECORD: Final = struct.Struct("<IQI")
_ENDS: Final = (32, 128, 512, 2048, 8192, 32768)
"""Lengths of prefixes, in bytes."""
_KEY: Final = struct.Struct(f">HB{4 * len(_ENDS)}sIQI")
"""Model, priority and hashes, then the record. The order of its bytes is the order of the plan."""
_IN_MEMORY: Final = 65_536
"""Number of items that are sorted in memory: about 6 MB."""
_PIECE: Final = 4096
"""Number of records that are written, or read back, at once."""
_MAX_MODELS: Final = 32_768


@dataclass(frozen=True, slots=True)
class Planned:
    """A record of a plan: where the line of an item is."""

    index: int
    """The number of the line, from 0."""
    offset: int
    """Where the line begins in the input, in bytes."""
    length: int
    """Its size in bytes."""


class PlanWriter:
    """Sorts the good lines of an input. More than `in_memory` of them are sorted in temporary files."""

    def __init__(self, in_memory: int = _IN_MEMORY) -> None:
        self._in_memory = in_memory
        self._groups: dict[tuple[bool, str], int] = {}
        """Number of items of each model, of watched items for themselves."""
        self._numbers: dict[tuple[bool, str], int] = {}
        self._keys: list[bytes] = []
        self._runs: list[IO[bytes]] = []

    def __enter__(self) -> "PlanWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for run in self._runs:
            run.close()

    def add(self, line: Line) -> None:
        """Add a good line. Raises ValueError for one model too many: 32,768 fit."""
        job = line.job
        if job is None:
            raise ValueError("a bad line has no place in a plan")
        group = (line.watch, job.model)
        if group not in self._numbers:
            # Watched items come last.
            number = sum(watched == line.watch for watched, _ in self._numbers)
            if number == _MAX_MODELS:
                raise ValueError(f"a plan holds at most {_MAX_MODELS} models")
            self._numbers[group] = number + _MAX_MODELS * line.watch
        self._groups[group] = self._groups.get(group, 0) + 1
        self._keys.append(
            _KEY.pack(self._numbers[group], job.priority or 3, _prefixes(job), line.index, line.offset, line.length)
        )
        if len(self._keys) == self._in_memory:
            self._spill()

    @property
    def count(self) -> int:
        """Number of items."""
        return sum(self._groups.values())

    @property
    def groups(self) -> list[internal_pb2.PlanGroup]:
        """The part of each model, in the order of the plan. That of its watched items is another one."""
        groups, first = [], 0
        for (watched, model), _ in sorted(self._numbers.items(), key=lambda numbered: numbered[1]):
            count = self._groups[watched, model]
            groups.append(internal_pb2.PlanGroup(model=model, first=first, count=count, watched=watched))
            first += count
        return groups

    def pieces(self) -> Iterator[bytes]:
        """Yield the plan's file. It may be called once, when every line was added."""
        self._keys.sort()
        yield _HEADER.pack(_MAGIC, self.count)
        piece = bytearray()
        for key in heapq.merge(*map(_read_keys, self._runs), self._keys):
            piece += _RECORD.pack(*_KEY.unpack(key)[3:])
            if len(piece) == _PIECE * _RECORD.size:
                yield bytes(piece)
                piece.clear()
        if piece:
            yield bytes(piece)

    def _spill(self) -> None:
        run = TemporaryFile()  # noqa: SIM115  # __exit__ closes it
        self._runs.append(run)
        run.write(b"".join(sorted(self._keys)))
        self._keys.clear()


def plan_range(first: int, count: int) -> tuple[int, int]:
    """Return offset and size, in bytes, of the part of a plan's file that holds these items."""
    return _HEADER.size + first * _RECORD.size, count * _RECORD.size


def read_records(data: bytes) -> list[Planned]:
    """Return the records of a part of a plan's file. Raises ValueError for one that was cut."""
    if len(data) % _RECORD.size:
        raise ValueError("the part of the plan was cut")
    return [Planned(*record) for record in _RECORD.iter_unpack(data)]


def read_count(header: bytes) -> int:
    """Return the number of items, which the first 16 bytes of a plan's file hold. Raises ValueError."""
    magic, count = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise ValueError("this is no plan of a version that is known here")
    return int(count)


def _read_keys(run: IO[bytes]) -> Iterator[bytes]:
    run.seek(0)
    while data := run.read(_PIECE * _KEY.size):
        for start in range(0, len(data), _KEY.size):
            yield data[start : start + _KEY.size]


def _prefixes(job: llm_pb2.JobRequest) -> bytes:
    """Return a hash of each prefix of the prompt. Prefixes that are longer than the prompt have zeros."""
    text = b"".join(_parts(job))
    state, hashes, start = hashlib.blake2b(digest_size=4), bytearray(), 0
    for end in _ENDS:
        if start >= len(text):
            break
        state.update(text[start:end])
        hashes += state.copy().digest()
        start = end
    return bytes(hashes).ljust(4 * len(_ENDS), b"\0")


def _parts(job: llm_pb2.JobRequest) -> Iterable[bytes]:
    """Yield the parts of a prompt, up to the longest prefix that counts and a message more."""
    if job.HasField("prompt_file"):
        yield job.prompt_file.file_id.encode()
    yield job.prompt[: _ENDS[-1]].encode()
    size = 0
    for message in job.messages:
        if size > _ENDS[-1]:
            break
        part = b"\0%d\0%b" % (message.role, message.content[: _ENDS[-1]].encode())
        size += len(part)
        yield part
