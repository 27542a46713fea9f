"""DownloadFile: the content of a file from an offset on, as fast as its reader takes it."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import NamedTuple

from jobs.field_rules import Violation
from llm_pb import file_pb2, internal_pb2
from runtime.answers import Answer
from runtime.auth import Caller
from runtime.keyed_limiter import KeyedLimiter
from services.gateway.errors import exhausted, file_not_ready, invalid
from services.gateway.files.failures import store_errors
from services.gateway.files.reader import FileReader
from services.gateway.settings import GatewaySettings
from store.store import Store, StoredObject


class _Part(NamedTuple):
    """What is to be read of one object."""

    stored: StoredObject
    start: int
    end: int


class Downloads:
    """The DownloadFile calls that this gateway serves."""

    def __init__(self, reader: FileReader, store: Store, settings: GatewaySettings) -> None:
        self._reader = reader
        self._store = store
        most = settings.max_downloads
        message = f"this gateway serves {most} downloads at once, half of them of one tenant; call again"
        self._all = KeyedLimiter(most, lambda: exhausted(message))
        self._of_tenant = KeyedLimiter(-(-most // 2), lambda: exhausted(message))

    async def download(
        self, caller: Caller, request: file_pb2.DownloadFileRequest, answer: Answer
    ) -> AsyncGenerator[file_pb2.DownloadFileResponse, None]:
        """Yield the messages of a call; see file.proto. Their size is limited by the room of `answer`.

        Raises ApiError, RPCError, KeysUnavailable, PayloadError.
        """
        async with self._all.acquired(), self._of_tenant.acquired(caller.tenant):
            record = await self._reader.record(caller, request.file_id)
            if record.file.state != file_pb2.FILE_STATE_READY:
                raise file_not_ready(request.file_id)
            size = record.file.ref.size_bytes
            if request.offset > size:
                raise invalid([Violation("offset", f"must be at most {size}, the size of the file")])
            end = min(size, request.offset + request.limit) if request.limit else size
            offset = request.offset
            for part in _parts(record, offset, end):
                pieces = self._store.read(part.stored, part.start, part.end)
                with store_errors(request.file_id):
                    async with aclosing(pieces):
                        async for piece in pieces:
                            for data in _cut(piece, answer):
                                offset += len(data)
                                message = file_pb2.DownloadFileResponse(data=data, next_offset=offset)
                                answer.sending(message.ByteSize())
                                # The yield returns once gRPC has sent the message.
                                yield message
                                answer.left()


def _parts(record: internal_pb2.FileRecord, start: int, end: int) -> Iterator[_Part]:
    """Yield what lies between two offsets of the file."""
    begin = 0
    for segment in record.segments:
        if begin < end and start < begin + segment.size:
            stored = StoredObject(segment.name, segment.size)
            yield _Part(stored, max(start - begin, 0), min(end - begin, segment.size))
        begin += segment.size


def _cut(piece: bytes, answer: Answer) -> Iterator[bytes]:
    while piece:
        room = answer.room()
        yield piece[:room]
        piece = piece[room:]
