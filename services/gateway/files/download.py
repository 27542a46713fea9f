"""DownloadFile: the content of a file from an offset on, as fast as its reader takes it."""

import hashlib
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import NamedTuple

from jobs.field_rules import Violation
from llm_pb import file_pb2, internal_pb2
from runtime.answers import Answer
from runtime.auth import Caller
from runtime.keyed_limiter import KeyedLimiter
from services.gateway.errors import exhausted, file_not_found, file_not_ready, invalid
from services.gateway.files.failures import ContentDamaged, store_errors
from services.gateway.files.reader import FileReader
from services.gateway.settings import GatewaySettings
from store.store import ObjectMissing, Store, StoredObject


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
            with store_errors(request.file_id):
                async with aclosing(self._pieces(caller, record, offset, end)) as pieces:
                    async for piece in pieces:
                        for data in _cut(piece, answer):
                            offset += len(data)
                            message = file_pb2.DownloadFileResponse(data=data, next_offset=offset)
                            answer.sending(message.ByteSize())
                            # The yield returns once gRPC has sent the message.
                            yield message
                            answer.left()

    async def _pieces(
        self, caller: Caller, record: internal_pb2.FileRecord, start: int, end: int
    ) -> AsyncGenerator[bytes, None]:
        """Yield the content between two offsets. The last piece of a whole file comes only if its hash is right.

        Raises ContentDamaged, ObjectMissing and what else a Store raises, ApiError NOT_FOUND for a file that is gone.
        """
        ref, offset, sha256 = record.file.ref, start, hashlib.sha256()
        for part in _parts(record, start, end):
            try:
                async with aclosing(self._store.read(part.stored, part.start, part.end)) as pieces:
                    async for piece in pieces:
                        sha256.update(piece)
                        offset += len(piece)
                        whole = (start, offset) == (0, ref.size_bytes)
                        if whole and ref.sha256 not in (b"", sha256.digest()):
                            raise ContentDamaged
                        yield piece
            except ObjectMissing:
                # The file may have been deleted meanwhile, and another one uploaded under its key.
                if (await self._reader.record(caller, ref.file_id)).prefix != record.prefix:
                    raise file_not_found(ref.file_id) from None
                raise


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
