"""The methods of FileService: each calls the object that implements it. See services.gateway.servicer."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, NamedTuple

import grpc

from encryption import Encryption
from jobs.ids import OUTPUT_ID_PREFIX, file_workflow_id
from llm_pb import file_pb2, file_pb2_grpc
from runtime.answers import Answers
from runtime.grpc_auth import current_caller
from services.gateway.effects import Effects
from services.gateway.errors import file_of_job, files_disabled
from services.gateway.files.download import Downloads
from services.gateway.files.quotas import FileQuotas
from services.gateway.files.reader import FileReader
from services.gateway.files.records import FileRecords
from services.gateway.files.upload import Uploads
from services.gateway.settings import GatewaySettings
from store.store import Store

_Context = grpc.aio.ServicerContext[Any, Any]


class FileServicer(file_pb2_grpc.FileServiceServicer):
    """The methods of file.proto."""

    def __init__(
        self,
        effects: Effects,
        reader: FileReader,
        store: Store | None,
        quotas: FileQuotas,
        answers: Answers,
        settings: GatewaySettings,
        encryption: Encryption | None,
    ) -> None:
        """Without a store there are no files to write, read or delete."""
        self._reader = reader
        self._answers = answers
        self._files: _Files | None = None
        if store is not None:
            records = FileRecords(effects, reader, store, quotas, settings, encryption)
            uploads = Uploads(records, reader, store, settings)
            self._files = _Files(records, uploads, Downloads(reader, store, settings))

    async def UploadFile(
        self, requests: AsyncIterator[file_pb2.UploadFileRequest], context: _Context
    ) -> file_pb2.UploadFileResponse:
        """See file.proto."""
        return await self._stored().uploads.upload(current_caller(), requests)

    def DownloadFile(
        self, request: file_pb2.DownloadFileRequest, context: _Context
    ) -> AsyncGenerator[file_pb2.DownloadFileResponse, None]:
        """See file.proto."""
        return self._stored().downloads.download(current_caller(), request, self._answers.of(context))

    async def GetFile(self, request: file_pb2.GetFileRequest, context: _Context) -> file_pb2.GetFileResponse:
        """See file.proto."""
        return file_pb2.GetFileResponse(file=await self._reader.get(current_caller(), request.file_id))

    async def ListFiles(self, request: file_pb2.ListFilesRequest, context: _Context) -> file_pb2.ListFilesResponse:
        """See file.proto."""
        response = await self._reader.list_page(current_caller(), request)
        await self._answers.of(context).reserve(response.ByteSize())
        return response

    async def DeleteFile(self, request: file_pb2.DeleteFileRequest, context: _Context) -> file_pb2.DeleteFileResponse:
        """See file.proto."""
        caller, records = current_caller(), self._stored().records
        if request.file_id.startswith(OUTPUT_ID_PREFIX):
            await self._reader.get(caller, request.file_id)
            raise file_of_job(request.file_id)
        found = await self._reader.get_deletable(caller, request.file_id)
        await records.remove(file_workflow_id(request.file_id, caller.tenant), found)
        return file_pb2.DeleteFileResponse()

    def _stored(self) -> "_Files":
        """Return what needs the store. Raises ApiError FAILED_PRECONDITION without one."""
        if self._files is None:
            raise files_disabled()
        return self._files


class _Files(NamedTuple):
    """What needs the store."""

    records: FileRecords
    uploads: Uploads
    downloads: Downloads
