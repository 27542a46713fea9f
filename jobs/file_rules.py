"""The rules that file.proto states for the fields of a request, as code."""

import re
from collections.abc import Iterator
from typing import Final

from jobs.field_rules import Violation, check_id, check_line
from jobs.ids import FILE_ID_PATTERN, OUTPUT_ID_PREFIX
from llm_pb import common_pb2, file_pb2

MAX_DATA_BYTES: Final = 1024 * 1024
MAX_FILENAME_BYTES: Final = 255
MAX_MEDIA_TYPE_BYTES: Final = 255
MAX_PAGE_SIZE: Final = 100
PURPOSE_PATTERN: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SHA256_BYTES: Final = 32
_FILE_ID: Final = "must be the file_id that UploadFile returned"


def check_upload(request: file_pb2.UploadFileRequest) -> list[Violation]:
    """Return the violations of a message of UploadFile: of its first one if it has a file, else of a later one."""
    violations = []
    if len(request.data) > MAX_DATA_BYTES:
        violations.append(Violation("data", f"must be at most {MAX_DATA_BYTES} bytes, not {len(request.data)}"))
    if request.offset < 0:
        violations.append(Violation("offset", "must be 0 or more: the committed_bytes of the file"))
    if request.HasField("file"):
        violations += check_id("request_id", request.request_id, required=True)
        violations += _file(request.file, "file.")
    return violations


def check_first(request: file_pb2.UploadFileRequest) -> list[Violation]:
    """Return the violations of the first message of UploadFile that check_upload() cannot see."""
    return [] if request.HasField("file") else [Violation("file", "is required in the first message")]


def check_later(request: file_pb2.UploadFileRequest, offset: int) -> list[Violation]:
    """Return the violations of a later message of UploadFile, whose data must begin at the offset."""
    violations = []
    if request.HasField("file"):
        violations.append(Violation("file", "must be only in the first message"))
    if request.request_id:
        violations.append(Violation("request_id", "must be only in the first message"))
    if request.offset != offset:
        violations.append(Violation("offset", f"must be {offset}, the end of the data before, not {request.offset}"))
    return violations


def check_file_id(
    request: file_pb2.GetFileRequest | file_pb2.DeleteFileRequest | file_pb2.DownloadFileRequest,
) -> list[Violation]:
    """Return the violations of a request that only names a file."""
    if FILE_ID_PATTERN.fullmatch(request.file_id) is None:
        return [Violation("file_id", _FILE_ID)]
    return []


def check_download(request: file_pb2.DownloadFileRequest) -> list[Violation]:
    """Return the violations of a DownloadFileRequest. The size of the file is not known here."""
    violations = check_file_id(request)
    if request.offset < 0:
        violations.append(Violation("offset", "must be 0 or more: the last next_offset received"))
    if request.limit < 0:
        violations.append(Violation("limit", "must be 0 or more"))
    return violations


def check_list_files(request: file_pb2.ListFilesRequest) -> list[Violation]:
    """Return the violations of a ListFilesRequest. The gateway checks the page_token when it opens it."""
    violations = list(check_id("user_id", request.user_id, required=False))
    violations += _purpose("purpose", request.purpose)
    if not 0 <= request.page_size <= MAX_PAGE_SIZE:
        violations.append(Violation("page_size", f"must be 1 to {MAX_PAGE_SIZE}, or 0 for the default"))
    return violations


def check_prompt_file(field: str, ref: common_pb2.FileRef) -> Iterator[Violation]:
    """Yield the violations of the prompt_file of a job."""
    if ref.file_id.startswith(OUTPUT_ID_PREFIX) and not (ref.sha256 and ref.size_bytes):
        yield Violation(f"{field}.file_id", "is the output of a job: give its sha256 and size_bytes, too")
    yield from check_file(field, ref)


def check_file(field: str, ref: common_pb2.FileRef) -> Iterator[Violation]:
    """Yield the violations of a reference to any file, also one that is the output of a job."""
    if FILE_ID_PATTERN.fullmatch(ref.file_id) is None:
        yield Violation(f"{field}.file_id", _FILE_ID)
    yield from _content(field, ref)


def _content(field: str, ref: common_pb2.FileRef) -> Iterator[Violation]:
    if len(ref.sha256) not in (0, _SHA256_BYTES):
        yield Violation(f"{field}.sha256", f"must be {_SHA256_BYTES} bytes, or empty")
    if ref.size_bytes < 0:
        yield Violation(f"{field}.size_bytes", "must be 0 or more")


def _file(file: file_pb2.File, path: str) -> Iterator[Violation]:
    yield from check_id(f"{path}user_id", file.user_id, required=True)
    yield from check_line(f"{path}filename", file.filename, MAX_FILENAME_BYTES, required=False)
    yield from check_line(f"{path}ref.media_type", file.ref.media_type, MAX_MEDIA_TYPE_BYTES, required=False)
    yield from _purpose(f"{path}purpose", file.purpose)
    yield from _content(f"{path}ref", file.ref)
    if file.HasField("expire_time"):
        try:
            file.expire_time.ToDatetime()
        except (ValueError, OverflowError):
            yield Violation(f"{path}expire_time", "must be a time from year 1 to year 9999")


def _purpose(field: str, value: str) -> Iterator[Violation]:
    if value and PURPOSE_PATTERN.fullmatch(value) is None:
        yield Violation(field, "must be at most 64 of A-Z a-z 0-9 _ -")
