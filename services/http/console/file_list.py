"""The list of files, and what people do to a file there."""

from http import HTTPStatus
from typing import ClassVar

from starlette.requests import Request
from starlette.responses import Response

from llm_pb import file_pb2
from services.http.console.forms import read_form
from services.http.console.item_page import ItemPage, id_of
from services.http.console.listing import PAGE_SIZE, ListQuery
from services.http.file_downloads import download_file


class FileList(ItemPage):
    """The handlers."""

    place: ClassVar = "/console/files"

    async def content(self, request: Request) -> Response:
        """Answer with the content of a file, for a browser to save."""
        return await download_file(self._calls(request), request, id_of(request))

    async def delete(self, request: Request) -> Response:
        """Delete a file, and lead to the list."""
        await read_form(request, self._front.settings)
        return await self._do(request, "DeleteFile", file_pb2.DeleteFileRequest(file_id=id_of(request)), gone=True)

    async def _show(self, request: Request, refused: str = "", status: HTTPStatus = HTTPStatus.OK) -> Response:
        query = ListQuery.of(request, ("user_id", "purpose"))
        message = file_pb2.ListFilesRequest(
            user_id=query.filters["user_id"],
            purpose=query.filters["purpose"],
            page_size=PAGE_SIZE,
            page_token=query.page_token,
        )
        listed = await self._calls(request).call("ListFiles", message)
        return self._pages.render(
            request,
            "files.html",
            status,
            refused=refused,
            files=listed.files,
            **query.shown(listed.next_page_token),
        )
