"""Checks the files of a training before its pipeline is accepted. The trainer reads them."""

from collections.abc import AsyncIterator
from typing import Final

from jobs.field_rules import Violation
from llm_pb import common_pb2, file_pb2, pipeline_pb2
from runtime.auth import Caller
from services.gateway.errors import FileNotFound
from services.gateway.files.reader import FileReader

_KINDS: Final = ("training", "preprocess")


class Datasets:
    """Checks files of documents."""

    def __init__(self, reader: FileReader, *, has_store: bool) -> None:
        self._reader = reader
        self._has_store = has_store

    async def check(self, caller: Caller, pipeline: pipeline_pb2.PipelineRequest) -> list[Violation]:
        """Return what is wrong with the files of a training for the caller. It keeps the rules.

        Raises RPCError, PayloadError.
        """
        kind = pipeline.WhichOneof("spec")
        if kind not in _KINDS:
            return []
        if not self._has_store:
            return [
                Violation(f"pipeline.{kind}.dataset", "cannot be used here: the operator has set no store of files")
            ]
        spec: pipeline_pb2.TrainingSpec | pipeline_pb2.PreprocessSpec = getattr(pipeline, kind)
        violations: list[Violation] = []
        if spec.HasField("dataset"):
            violations += [one async for one in self._file(caller, f"pipeline.{kind}.dataset", spec.dataset)]
        if spec.HasField("held_out"):
            violations += [one async for one in self._file(caller, f"pipeline.{kind}.held_out", spec.held_out)]
        return violations

    async def _file(self, caller: Caller, field: str, asked: common_pb2.FileRef) -> AsyncIterator[Violation]:
        try:
            file = await self._reader.get(caller, asked.file_id)
        except FileNotFound:
            yield Violation(f"{field}.file_id", "names no file, or one that has expired; upload it first")
            return
        if file.state != file_pb2.FILE_STATE_READY:
            yield Violation(f"{field}.file_id", "names a file whose upload has not ended")
        elif asked.sha256 not in (b"", file.ref.sha256):
            yield Violation(f"{field}.sha256", f"is not that of the file, {file.ref.sha256.hex()}")
