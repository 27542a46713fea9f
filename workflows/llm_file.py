"""LLMFileWorkflow: the record of one file, open from the first message of its upload until the file is gone.

    gateway ──start──▶ a file of 0 bytes, which is uploaded
    gateway ──puts an object──▶ store, then ──update CommitSegment──▶ the object is a part of the file
    gateway ──update CommitSegment with last──▶ the file is ready
    its time has come, or ──update DeleteFile──▶ RemoveFile removes the objects, and the workflow closes

An object counts only once it is committed, and only where the file ends, so two uploads of one file cannot mix: the one
that commits second is refused. The memo holds the file as it is, so that reading and listing files runs no code.
"""

from datetime import UTC, timedelta
from functools import partial
from typing import Final

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ApplicationError

with workflow.unsafe.imports_passed_through():
    from jobs import names
    from jobs.inputs import one_input
    from jobs.memo import to_memo
    from llm_pb import file_pb2, internal_pb2

from workflows import activities

_MAX_UPDATES: Final = 1000
"""Updates of one run. Temporal accepts 2000."""
_MAX_SEGMENTS: Final = 8192
"""Segments of one file. The record, which names them all, must fit into one payload: Temporal accepts 2 MiB."""
_UPLOAD_TTL: Final = timedelta(days=1)
_REMOVE_TIMEOUT: Final = timedelta(minutes=5)
_REMOVE_RETRIES: Final = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(minutes=1))
"""Without a last attempt: a store that is away delays the removal."""
_NO_INPUT: Final = "CommitSegment takes one CommitSegmentRequest"


@workflow.defn(name=names.FILE_WORKFLOW_TYPE)
class LLMFileWorkflow:
    """Runs as long as the file exists, in one run after another if its upload has many segments."""

    @workflow.init
    @one_input
    def __init__(self, record: internal_pb2.FileRecord | None = None) -> None:
        self._record = internal_pb2.FileRecord()
        if record is not None:
            self._record.CopyFrom(record)
        self._file = self._record.file
        self._gone = False
        self._updates = 0

    @workflow.run
    @one_input
    async def run(self, record: internal_pb2.FileRecord | None = None) -> None:
        """Wait for the end of the file, then remove it."""
        if record is None:
            return
        while not self._gone and (left := self._time_left()) != timedelta(0):
            if self._too_long():
                await workflow.wait_condition(workflow.all_handlers_finished)
                # A new run begins with the memo of the first one's start.
                workflow.continue_as_new(self._record, memo={**workflow.memo(), names.MEMO_FILE: to_memo(self._file)})
            was_ready = self._is_ready()
            try:
                # Each commit of an upload moves the time further. It is looked at again when it has come.
                await workflow.wait_condition(partial(self._has_news, was_ready), timeout=left)
            except TimeoutError:
                continue
        self._forget()
        await workflow.execute_activity(
            activities.remove_file,
            internal_pb2.RemoveFileRequest(
                prefix=self._record.prefix,
                create_time=self._file.create_time if self._file.HasField("create_time") else None,
            ),
            start_to_close_timeout=_REMOVE_TIMEOUT,
            retry_policy=_REMOVE_RETRIES,
        )
        await workflow.wait_condition(workflow.all_handlers_finished)

    @workflow.update(name=names.UPDATE_COMMIT_SEGMENT)
    @one_input
    async def commit_segment(self, request: internal_pb2.CommitSegmentRequest | None = None) -> file_pb2.File:
        """Add the segment to the file, and return the file."""
        if request is None:
            raise ApplicationError(_NO_INPUT)
        self._updates += 1
        if self._has(request):
            return self._file
        self._require_end(request)
        if request.HasField("segment"):
            self._record.segments.append(request.segment)
            self._file.committed_bytes += request.segment.size
        if request.last:
            self._file.state = file_pb2.FILE_STATE_READY
            self._file.ref.sha256 = request.sha256
            self._file.ref.size_bytes = self._file.committed_bytes
            self._file.ClearField("expire_time")
            if self._record.HasField("ready_expire_time"):
                self._file.expire_time.CopyFrom(self._record.ready_expire_time)
        else:
            ttl = self._record.upload_ttl.ToTimedelta() if self._record.HasField("upload_ttl") else _UPLOAD_TTL
            self._file.expire_time.FromDatetime(workflow.now() + ttl)
        workflow.upsert_memo({names.MEMO_FILE: to_memo(self._file)})
        return self._file

    @commit_segment.validator
    @one_input
    def _validate_commit(self, request: internal_pb2.CommitSegmentRequest | None = None) -> None:
        """Refuse a segment that does not fit, which spares the history its events."""
        if request is None:
            raise ApplicationError(_NO_INPUT)
        if not self._has(request):
            self._require_end(request)

    @workflow.update(name=names.UPDATE_DELETE_FILE)
    async def delete_file(self, *_: object) -> None:
        """Mark the file as deleted. From now on it is not found."""
        self._forget()

    @workflow.query(name=names.QUERY_GET_RECORD)
    def get_record(self) -> internal_pb2.FileRecord:
        """Return the record; an empty one for a file that is gone."""
        return internal_pb2.FileRecord() if self._gone else self._record

    def _has(self, request: internal_pb2.CommitSegmentRequest) -> bool:
        """Return whether the request was committed before, and its answer was lost.

        Others may have committed more since. A segment's name is new, so it is enough to know it.
        """
        if self._gone:
            return False
        if request.HasField("segment"):
            return any(segment.name == request.segment.name for segment in self._record.segments)
        committed = (self._is_ready(), self._file.committed_bytes, self._file.ref.sha256)
        return (request.last, request.offset, request.sha256) == committed

    def _require_end(self, request: internal_pb2.CommitSegmentRequest) -> None:
        """Raise ApplicationError unless the file is being uploaded, ends where the request begins and has room left."""
        if self._gone or self._file.state != file_pb2.FILE_STATE_UPLOADING:
            raise ApplicationError("the file takes no more data", type=names.FILE_NOT_WRITABLE)
        if request.HasField("segment") and len(self._record.segments) >= _MAX_SEGMENTS:
            message = f"the file has {_MAX_SEGMENTS} segments, and takes no more"
            raise ApplicationError(message, type=names.TOO_MANY_SEGMENTS)
        if request.offset != self._file.committed_bytes:
            message = f"the file has {self._file.committed_bytes} bytes, not {request.offset}"
            raise ApplicationError(message, type=names.WRONG_OFFSET)

    def _time_left(self) -> timedelta | None:
        """Return the time until the file has to go: 0 once it has come, None for a file that stays."""
        if not self._file.HasField("expire_time"):
            return None
        return max(self._file.expire_time.ToDatetime(UTC) - workflow.now(), timedelta(0))

    def _forget(self) -> None:
        """Hide the file from all calls."""
        if not self._gone:
            self._gone = True
            workflow.upsert_memo({names.MEMO_FILE: {}})

    def _is_ready(self) -> bool:
        return self._file.state == file_pb2.FILE_STATE_READY

    def _has_news(self, was_ready: bool) -> bool:
        return self._gone or self._too_long() or self._is_ready() != was_ready

    def _too_long(self) -> bool:
        """Return whether to continue in a new run."""
        return (
            self._updates >= (self._record.max_updates or _MAX_UPDATES)
            or workflow.info().is_continue_as_new_suggested()
        )
