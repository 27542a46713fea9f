"""Requests that break a rule of file.proto: one row for each way. See tests.support.bad_requests."""

from collections.abc import Iterator
from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp

from llm_pb import common_pb2, file_pb2
from tests.support.bad_requests import BAD_IDS, REQUESTS, Row

NO_FILE: Final = f"file-{'0' * 64}"
BAD_FILE_IDS: Final = {
    **BAD_IDS,
    "missing": "",
    "a short hash": f"file-{'0' * 63}",
    "capital letters": f"file-{'A' * 64}",
    "another prefix": f"llmfile-{'0' * 64}",
}
BAD_REFS: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "a short sha256": ({"sha256": b"0" * 31}, "sha256"),
    "a sha256 in hexadecimal": ({"sha256": b"0" * 64}, "sha256"),
    "a negative size": ({"size_bytes": -1}, "size_bytes"),
}
BAD_PAGES: Final[dict[str, tuple[dict[str, Any], str]]] = {
    **{f"page_size {size}": ({"page_size": size}, "page_size") for size in (-1, 101, -(2**31), 2**31 - 1)},
    **{f"page_token {token[:12]!r}": ({"page_token": token}, "page_token") for token in ("!!!!", "AAAA", "a" * 60_000)},
}
_BAD_PURPOSES: Final = ("a b", "a/b", "a'b", "a\n", "é", "a" * 65)
_BAD_LINES: Final = ("a\nb", "\x1b[31m", "\x00", "é" * 128)


def first(**changes: Any) -> file_pb2.UploadFileRequest:
    """Return a valid first message of an upload, with these changes of its file."""
    file = {"user_id": "u", "filename": "notes.txt", "purpose": "user_data", **changes}
    return file_pb2.UploadFileRequest(file=file_pb2.File(**file), request_id="r", data=b"abc")


def file_rows() -> Iterator[Row]:
    """Yield the table."""
    yield from _first_rows()
    for what, changes, *fields in (
        ("a file", {"file": first().file, "request_id": "r"}, "file", "request_id"),
        ("a request_id", {"request_id": "r"}, "request_id"),
        ("another offset", {"offset": 4}, "offset"),
        ("more data than fit", {"data": bytes((1 << 20) + 1)}, "data"),
    ):
        later = file_pb2.UploadFileRequest(**{"offset": 3, "data": b"d", **changes})  # type: ignore[arg-type]
        earlier = (first().SerializeToString(),)
        yield Row("UploadFile", f"a later message with {what}", later.SerializeToString(), frozenset(fields), earlier)
    whole = first()
    whole.last = True
    after = file_pb2.UploadFileRequest(offset=3).SerializeToString()
    yield Row("UploadFile", "a message after the last", after, frozenset({"last"}), (whole.SerializeToString(),))
    for rpc in ("DownloadFile", "GetFile", "DeleteFile"):
        for what, value in BAD_FILE_IDS.items():
            yield _row(rpc, f"file_id with {what}", "file_id", file_id=value)
    for number in (-1, -(2**63)):
        for field in ("offset", "limit"):
            yield _row("DownloadFile", f"{field} {number}", field, file_id=NO_FILE, **{field: number})
    for what, value in BAD_IDS.items():
        yield _row("ListFiles", f"user_id with {what}", "user_id", user_id=value)
    for value in _BAD_PURPOSES:
        yield _row("ListFiles", f"purpose {value[:12]!r}", "purpose", purpose=value)
    for what, (changes, field) in BAD_PAGES.items():
        yield _row("ListFiles", what, field, **changes)


def _first_rows() -> Iterator[Row]:
    def row(what: str, *fields: str, **changes: Any) -> Row:
        return Row("UploadFile", what, first(**changes).SerializeToString(), frozenset(fields))

    yield Row("UploadFile", "no file", b"", frozenset({"file"}))
    for what, value in {**BAD_IDS, "missing": ""}.items():
        yield row(f"user_id with {what}", "file.user_id", user_id=value)
        request = first()
        request.request_id = value
        yield Row("UploadFile", f"request_id with {what}", request.SerializeToString(), frozenset({"request_id"}))
    for value in _BAD_LINES:
        yield row(f"filename {value[:12]!r}", "file.filename", filename=value)
        yield row(f"media_type {value[:12]!r}", "file.ref.media_type", ref=common_pb2.FileRef(media_type=value))
    for value in _BAD_PURPOSES:
        yield row(f"purpose {value[:12]!r}", "file.purpose", purpose=value)
    for what, (ref, field) in BAD_REFS.items():
        yield row(what, f"file.ref.{field}", ref=common_pb2.FileRef(**ref))
    huge = common_pb2.FileRef(size_bytes=2**63 - 1)
    yield row("a size over the operator's maximum", "file.ref.size_bytes", ref=huge)
    for seconds in (2**60, -(2**60)):
        yield row(f"expire_time {seconds}", "file.expire_time", expire_time=Timestamp(seconds=seconds))
    for offset in (-1, -(2**63)):
        request = first()
        request.offset = offset
        yield Row("UploadFile", f"offset {offset}", request.SerializeToString(), frozenset({"offset"}))
    large = first()
    large.data = bytes((1 << 20) + 1)
    yield Row("UploadFile", "more data than fit", large.SerializeToString(), frozenset({"data"}))


def _row(rpc: str, what: str, *fields: str, **values: Any) -> Row:
    return Row(rpc, what, REQUESTS[rpc](**values).SerializeToString(), frozenset(fields))
