"""The segments of a batch become its output and errors, in the process of its own that work.py is."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from tempfile import TemporaryFile
from typing import IO, Final

from google.protobuf import proto

from batches.input import BatchInput
from batches.lines import Line
from batches.objects import folder_of
from batches.results import joined, to_line
from batches.segments import merge as merge_segments
from batches.segments import merged_pieces, read_segment
from llm_pb import batch_pb2, common_pb2, internal_pb2, llm_pb2
from services.gateway.batches.local_files import JSONL, fetch, pieces_of, put, stored
from store.store import Store

_MERGED_AT_ONCE: Final = 64
"""Number of segments that are merged into one run, and of runs into a larger one: so many files are open at a time."""
_COUNT_OF: Final = {
    llm_pb2.JOB_STATE_SUCCEEDED: "succeeded",
    llm_pb2.JOB_STATE_FAILED: "failed",
    llm_pb2.JOB_STATE_CANCELLED: "cancelled",
    llm_pb2.JOB_STATE_TIMED_OUT: "expired",
}


class IncompleteBatch(RuntimeError):
    """Output and errors would not hold every item exactly once."""


async def merge(task: internal_pb2.MergeTask, store: Store) -> internal_pb2.MergeResult:
    """Write output and errors, and return them as objects.

    Raises IncompleteBatch, DamagedSegment, LostItem, and the errors of the store.
    """
    request = task.request
    with ExitStack() as stack:
        runs = stack.enter_context(Runs())
        group: list[common_pb2.FileRef] = []
        async for segment in _segments(store, request.manifests):
            group.append(segment)
            if len(group) == _MERGED_AT_ONCE:
                await runs.add(await _run_of(store, group))
                group.clear()
        if group:
            await runs.add(await _run_of(store, group))
        lines = stack.enter_context(await fetch(store, [stored(request.input)]))
        output, errors, rest = (stack.enter_context(TemporaryFile()) for _ in range(3))
        result = await asyncio.to_thread(_write, request, lines, runs.files, output, errors, rest)
        if output.tell():
            result.output.CopyFrom(await put(store, task.output_prefix, output, JSONL))
        if errors.tell():
            result.errors.CopyFrom(await put(store, task.errors_prefix, errors, JSONL))
        if rest.tell():
            result.rest.CopyFrom(await put(store, folder_of(request.batch_id, request.tenant), rest))
    return result


async def read_manifest(store: Store, ref: common_pb2.FileRef) -> internal_pb2.ChunkManifest:
    """Return a manifest. Raises the errors of the store."""
    data = b"".join([piece async for piece in store.read(stored(ref))])
    return internal_pb2.ChunkManifest.FromString(data)


async def _segments(store: Store, manifests: Iterable[common_pb2.FileRef]) -> AsyncIterator[common_pb2.FileRef]:
    for ref in manifests:
        for chunk in (await read_manifest(store, ref)).chunks:
            for segment in chunk.result.segments:
                yield segment


class Runs:
    """Segments in temporary files. There are few, however many are added: those of a level become one of the next."""

    def __init__(self, at_once: int = _MERGED_AT_ONCE) -> None:
        self._at_once = at_once
        self._levels: list[list[IO[bytes]]] = []

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            file.close()

    @property
    def files(self) -> list[IO[bytes]]:
        """The segments that hold what all segments that were added hold."""
        return [file for level in self._levels for file in level]

    async def add(self, file: IO[bytes]) -> None:
        """Add a segment, whose file is closed here. Raises DamagedSegment."""
        level = 0
        while True:
            if level == len(self._levels):
                self._levels.append([])
            files = self._levels[level]
            files.append(file)
            if len(files) < self._at_once:
                return
            file = await _merged(files)
            while files:
                files.pop().close()
            level += 1


async def _run_of(store: Store, segments: Sequence[common_pb2.FileRef]) -> IO[bytes]:
    """Return one segment that holds what some segments hold."""
    with ExitStack() as stack:
        return await _merged([stack.enter_context(await fetch(store, [stored(ref)])) for ref in segments])


async def _merged(files: Sequence[IO[bytes]]) -> IO[bytes]:
    """Return the segment that holds what the segments in some files hold. The caller closes it."""
    run = TemporaryFile()  # noqa: SIM115  # the caller closes it
    try:
        await asyncio.to_thread(lambda: run.writelines(merged_pieces([read_segment(file) for file in files])))
        run.seek(0)
    except BaseException:
        run.close()
        raise
    return run


def _write(
    request: internal_pb2.MergeRequest,
    lines: IO[bytes],
    runs: Sequence[IO[bytes]],
    output: IO[bytes],
    errors: IO[bytes],
    rest: IO[bytes],
) -> internal_pb2.MergeResult:
    """Write the lines of all items, and the items of those that never began; return the counts."""
    never_begun = batch_pb2.BatchItem(state=request.otherwise)
    if request.HasField("error"):
        never_begun.error.CopyFrom(request.error)
    counts = common_pb2.WorkCounts(total=request.items)
    begun: set[int] = set()
    """Lines with a result that were read and are not written: one or two."""

    def results() -> Iterator[batch_pb2.BatchItem]:
        for item in merge_segments([read_segment(run) for run in runs]):
            begun.add(item.index)
            yield item

    written = 0
    for line, item in joined(_lines(request, lines), results(), never_begun):
        if item.state not in _COUNT_OF:
            raise IncompleteBatch(f"line {line.index} has no result")
        if item.index in begun:
            begun.discard(item.index)
        else:
            proto.serialize_length_prefixed(item, rest)  # type: ignore[arg-type]  # any file will do
        into = to_line(line, item, request.batch_id, request.create_time)
        (output if into.succeeded else errors).write(into.data)
        name = _COUNT_OF[item.state]
        setattr(counts, name, getattr(counts, name) + 1)
        written += 1
    if written != request.items:
        raise IncompleteBatch(f"output and errors would have {written} lines for {request.items} items")
    return internal_pb2.MergeResult(counts=counts)


def _lines(request: internal_pb2.MergeRequest, lines: IO[bytes]) -> Iterator[Line]:
    """Yield the lines of the input, which were all good."""
    whole = BatchInput(request.batch, request.limits, is_planned=True)
    for piece in pieces_of(lines):
        yield from whole.feed(piece)
    yield from whole.close()
