"""The stub of FileService with retries: a transfer that breaks goes on where it broke."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing, suppress
from datetime import timedelta
from typing import Final, TypeVar

import grpc

from durable_llm._retrying_stub import RESET, RetryingStub, Silence
from durable_llm._statuses import from_call
from durable_llm._upload_source import StreamSource, UploadSource
from durable_llm.errors import ApiError, Unavailable
from durable_llm.file_errors import UploadOvertaken, WrongOffset
from llm_pb import file_pb2

_T = TypeVar("_T")
_FINISH: Final = timedelta(minutes=5)
"""Maximum wait for the answer to the last message: the service may have to read a large file back."""

_DISCARD: Final = timedelta(seconds=10)


class RetryingFileStub(RetryingStub):
    """A stub of FileService. All of its calls are safe to repeat."""

    async def upload(
        self, first: file_pb2.UploadFileRequest, source: UploadSource | StreamSource, *, keep: bool
    ) -> file_pb2.File:
        """Upload a source; `first` describes it. Raises ApiError.

        `keep`: whether what was uploaded stays when the upload fails, because its caller may go on with it. Otherwise
        it is deleted, as well as that is possible then.
        """
        begun: list[str] = []
        try:
            return await self._upload(first, source, begun)
        except BaseException:
            if begun and not keep:
                await self._discard(begun[0])
            raise

    async def _discard(self, file_id: str) -> None:
        """Delete a file that nobody can go on with. The service removes it later where this fails."""
        with suppress(ApiError, TimeoutError):
            async with asyncio.timeout(_DISCARD.total_seconds()):
                await self.unary("DeleteFile", file_pb2.DeleteFileRequest(file_id=file_id))

    async def _upload(
        self, first: file_pb2.UploadFileRequest, source: UploadSource | StreamSource, begun: list[str]
    ) -> file_pb2.File:
        """Upload a source, and add the id of its file to `begun` once it is known. Raises ApiError.

        Each try begins with a call without data. It tells where the file ends, and gets the status of a refusal before
        any data are sent.
        """
        silence, committed = Silence(), 0
        broken: ApiError | None = None
        sent = False
        while True:
            try:
                with silence.growing():
                    file = await self._begin(first, committed)
                begun[:] = [file.ref.file_id]
                if file.committed_bytes > committed:
                    silence = Silence()
                committed = file.committed_bytes
                if file.state == file_pb2.FILE_STATE_READY:
                    return file
                if broken is None or source.can_seek or not sent:
                    sent = True
                    return await self._send(first, source, committed)
            except UploadOvertaken as error:
                # An earlier try of this upload was not over yet, or another process uploads the same file.
                broken = Unavailable(str(error), grpc.StatusCode.UNAVAILABLE, error.reason)
            except ApiError as error:
                broken = error
            else:
                # What came once cannot be sent again.
                raise broken
            await self.back_off(broken, silence, f"going on at byte {committed}")

    async def download(self, file_id: str, offset: int, limit: int) -> AsyncGenerator[bytes, None]:
        """Yield the content from an offset on. Raises ApiError."""
        silence, end = Silence(), offset + limit if limit else None
        while True:
            request = file_pb2.DownloadFileRequest(
                file_id=file_id, offset=offset, limit=0 if end is None else end - offset
            )
            call = self._stub.DownloadFile(request, metadata=self._metadata)
            messages = aiter(call)
            try:
                while True:
                    with silence.growing():
                        message = await self._in_time(anext(messages, None), self._idle_timeout)
                    self._answered = True
                    if message is None:
                        return
                    silence, offset = Silence(), message.next_offset
                    yield message.data
                    if offset == end:
                        return
            except ApiError as error:
                broken = error
            finally:
                call.cancel()
            await self.back_off(broken, silence, f"going on at byte {offset}")

    async def _begin(self, first: file_pb2.UploadFileRequest, committed: int) -> file_pb2.File:
        """Return the file as it is, begun now if it is not there yet."""
        opening = file_pb2.UploadFileRequest()
        opening.CopyFrom(first)
        while True:
            opening.offset = committed
            try:
                call = self._stub.UploadFile(iter([opening]), metadata=self._metadata)
                response: file_pb2.UploadFileResponse = await self._in_time(call, self._timeout)
            except WrongOffset as error:
                if error.committed_bytes == committed:
                    raise
                committed = error.committed_bytes
            else:
                self._answered = True
                return response.file

    async def _send(
        self, first: file_pb2.UploadFileRequest, source: UploadSource | StreamSource, offset: int
    ) -> file_pb2.File:
        """Send the source from an offset on, and return the file.

        A call of grpc.aio that ends while a message is sent loses its status. So the service sends its initial metadata
        when it has its answer, and ends the call a moment later: nothing more is sent then.
        """
        call = self._stub.UploadFile(metadata=self._metadata)
        answered = asyncio.ensure_future(call.initial_metadata())
        try:
            opening = file_pb2.UploadFileRequest()
            opening.CopyFrom(first)
            opening.offset = offset
            await self._in_time(call.write(opening), self._idle_timeout)
            async with aclosing(source.pieces(offset)) as pieces:
                async for piece in pieces:
                    if answered.done():
                        break
                    message = file_pb2.UploadFileRequest(offset=offset, data=piece)
                    await self._in_time(call.write(message), self._idle_timeout)
                    offset += len(piece)
            if not answered.done():
                last = file_pb2.UploadFileRequest(offset=offset, last=True)
                await self._in_time(call.write(last), self._idle_timeout)
            if not call.done():
                await self._in_time(call.done_writing(), self._idle_timeout)
            response: file_pb2.UploadFileResponse = await self._in_time(call, _FINISH)
        finally:
            call.cancel()
            answered.cancel()
            await asyncio.gather(answered, return_exceptions=True)
        return response.file

    async def _in_time(self, asked: Awaitable[_T], limit: timedelta) -> _T:
        """Return what is asked for. Raises ApiError."""
        try:
            async with asyncio.timeout(limit.total_seconds()):
                return await asked
        except grpc.aio.AioRpcError as error:
            failure = from_call(error)
            if failure.code in RESET and not failure.reason:
                raise Unavailable(str(failure), grpc.StatusCode.UNAVAILABLE) from error
            raise failure from error
        except asyncio.InvalidStateError as error:
            # The call has ended, and its answer says why.
            raise Unavailable("the call ended before all was sent", grpc.StatusCode.UNAVAILABLE) from error
        except TimeoutError:
            message = f"the service has not answered for {limit.total_seconds():g} s"
            raise Unavailable(message, grpc.StatusCode.UNAVAILABLE) from None
