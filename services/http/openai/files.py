"""The paths under `/v1/files`."""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any, Final, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from durable_llm import ApiError
from durable_llm.errors import InvalidRequest, UserNotAllowed
from durable_llm.file_errors import ContentMismatch
from jobs.ids import FILE_ID_PATTERN
from llm_pb import file_pb2
from openai_api.asked import DEFAULT_USER
from openai_api.errors import InvalidBody, invalid, unsupported
from services.http.bodies import query_of, require_no_coding
from services.http.failures import Failure, with_fields
from services.http.file_downloads import download_file
from services.http.forms import UploadForm
from services.http.front import Front
from services.http.gateway import Calls
from services.http.openai.answers import answered
from services.http.openai.file_content import SentContent, key_reused
from services.http.openai.repeats import request_id_of
from services.http.resources import Resource

_FIELDS: Final = {
    "file.purpose": "purpose",
    "file.filename": "file",
    "file.ref.media_type": "file",
    "file.ref.size_bytes": "file",
    "data": "file",
    "file.expire_time": "expires_after",
}
"""Parameters whose names are not those of the gateway's fields."""
_ANCHOR: Final = "expires_after[anchor]"
_SECONDS: Final = "expires_after[seconds]"
_USER: Final = "user"
_KNOWN: Final = frozenset({"purpose", _ANCHOR, _SECONDS, _USER})
_MAX_LIMIT: Final = 10_000
_DEFAULT_LIMIT: Final = 100
_MAX_SCANNED: Final = 20_000
_PAGE_SIZE: Final = 100
_MAX_DIGITS: Final = 12


class Files:
    """Answers the requests."""

    def __init__(self, front: Front) -> None:
        self._front = front

    @property
    def resources(self) -> Sequence[Resource]:
        """The paths."""
        return (
            Resource("/v1/files", {"POST": self.create, "GET": self.list}),
            Resource("/v1/files/{id}/content", {"GET": self.content}),
            Resource("/v1/files/{id}", {"GET": self.retrieve, "DELETE": self.delete}),
        )

    async def create(self, request: Request) -> Response:
        """Upload a file, as it comes."""
        query_of(request, ())
        require_no_coding(request)
        request_id = request_id_of(request)
        form = UploadForm(request, self._front.settings)
        calls = self._front.gateway.of(request)
        try:
            await form.read_fields()
            return answered(file_object(await _upload(calls, form, request_id)))
        except InvalidRequest as error:
            await form.drain()
            violations = Failure(HTTPStatus.BAD_REQUEST, str(error), error.reason, error.violations)
            raise with_fields(violations, lambda field: _FIELDS.get(field, field)) from error
        except (ApiError, Failure, InvalidBody):
            await form.drain()
            raise

    async def list(self, request: Request) -> Response:
        """List files, the newest first."""
        query = {name: values[0] for name, values in query_of(request, ("after", "limit", "order", "purpose")).items()}
        if query.get("order", "desc") != "desc":
            raise unsupported("order", "files are listed with the newest first")
        limit = limit_of(query.get("limit", str(_DEFAULT_LIMIT)), _MAX_LIMIT)
        after = query.get("after", "")
        with self._front.gateway.of(request).files("ListFiles") as files:
            async with aclosing(files.list(purpose=query.get("purpose", ""), page_size=_PAGE_SIZE)) as listed:
                page = await page_of(listed, after, limit)
        objects = [file_object(file) for file in page.files]
        return answered(
            {
                "object": "list",
                "data": objects,
                "first_id": objects[0]["id"] if objects else None,
                "last_id": objects[-1]["id"] if objects else None,
                "has_more": page.has_more,
            }
        )

    async def retrieve(self, request: Request) -> Response:
        """Return a file without its content."""
        query_of(request, ())
        with self._front.gateway.of(request).files("GetFile") as files:
            return answered(file_object(await files.get(_id(request))))

    async def content(self, request: Request) -> Response:
        """Return the content of a file, as it comes."""
        query_of(request, ())
        return await download_file(self._front.gateway.of(request), request, _id(request))

    async def delete(self, request: Request) -> Response:
        """Delete a file."""
        query_of(request, ())
        id_ = _id(request)
        with self._front.gateway.of(request).files("DeleteFile") as files:
            await files.delete(id_)
        return answered({"id": id_, "object": "file", "deleted": True})


class Page(NamedTuple):
    """A page of a list of files."""

    files: list[file_pb2.File]
    has_more: bool
    """Whether more files follow, also those beyond the 20,000 that a request reads."""


async def page_of(listed: AsyncIterator[file_pb2.File], after: str, limit: int) -> Page:
    """Return the page that follows the file `after`, or the first one. Raises InvalidBody for a file that is not found.

    The gateway cannot seek, so a page costs the files before it. One request reads at most 20,000.
    """
    files: list[file_pb2.File] = []
    found, more, scanned = not after, False, 0
    async for file in listed:
        if len(files) == limit or scanned == _MAX_SCANNED:
            more = True
            break
        scanned += 1
        if found:
            files.append(file)
        found = found or file.ref.file_id == after
    if not found:
        raise invalid("after", f"is not among the newest {_MAX_SCANNED} files" if more else "is no file of the list")
    return Page(files, more)


def file_object(file: file_pb2.File) -> dict[str, Any]:
    """Return a file as OpenAI has it."""
    return {
        "id": file.ref.file_id,
        "object": "file",
        "bytes": max(file.ref.size_bytes, file.committed_bytes),
        "created_at": file.create_time.seconds,
        "expires_at": file.expire_time.seconds if file.HasField("expire_time") else None,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed" if file.state == file_pb2.FILE_STATE_READY else "uploaded",
        "status_details": None,
    }


async def _upload(calls: Calls, form: UploadForm, request_id: str) -> file_pb2.File:
    fields = form.fields
    for name in fields.keys() - _KNOWN:
        raise unsupported(name)
    if not fields.get("purpose"):
        raise invalid("purpose", "is required, before the file")
    user_id = fields.get(_USER) or DEFAULT_USER
    upload: dict[str, Any] = {
        "request_id": request_id,
        "filename": form.filename,
        "purpose": fields["purpose"],
        "media_type": form.media_type,
        "expire_time": _expire_time(fields),
    }
    content = SentContent(form.content())
    with calls.files("UploadFile") as files:
        try:
            try:
                file = await files.upload(content, user_id=user_id, **upload)
            except UserNotAllowed as error:
                # A request without a user means the one user of the credential. No data was sent yet.
                if fields.get(_USER) or not (bound := error.metadata.get("user_id")):
                    raise
                file = await files.upload(content, user_id=bound, **upload)
        except ContentMismatch as error:
            if not request_id:
                raise
            raise key_reused() from error
    await content.require_same(file)
    return file


def _expire_time(fields: dict[str, str]) -> datetime | None:
    if _SECONDS not in fields:
        return None
    if fields.get(_ANCHOR, "created_at") != "created_at":
        raise invalid(_ANCHOR, "must be created_at")
    seconds = fields[_SECONDS]
    if not 60 <= _number(seconds) <= 10**9:
        raise invalid(_SECONDS, "must be a whole number of seconds, at least 60")
    return datetime.now(UTC) + timedelta(seconds=int(seconds))


def _id(request: Request) -> str:
    id_: str = request.path_params["id"]
    if FILE_ID_PATTERN.fullmatch(id_) is None:
        raise Failure(HTTPStatus.NOT_FOUND, f"there is no file {id_}", "FILE_NOT_FOUND")
    return id_


def limit_of(text: str, most: int) -> int:
    """Return the parameter `limit` of a list. Raises InvalidBody."""
    if not 1 <= (limit := _number(text)) <= most:
        raise invalid("limit", f"must be 1 to {most}")
    return limit


def _number(text: str) -> int:
    """Return the whole number of a text; -1 for another text, and for one of more than 12 digits."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS else -1
