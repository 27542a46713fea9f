"""The paths under `/v1/batches`."""

import uuid
from collections.abc import Sequence
from contextlib import aclosing
from http import HTTPStatus
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from durable_llm.errors import InvalidRequest, UserNotAllowed
from openai_api.asked import DEFAULT_USER
from openai_api.batches import batch_object, read_batch
from openai_api.errors import invalid
from services.http.bodies import query_of, read_object
from services.http.failures import Failure, with_fields
from services.http.front import Front
from services.http.openai.answers import answered
from services.http.openai.files import limit_of
from services.http.openai.repeats import request_id_of
from services.http.resources import Resource

_FIELDS: Final = {
    "batch.input.file_id": "input_file_id",
    "batch.window": "completion_window",
    "batch.labels": "metadata",
}
"""Parameters whose names are not those of the gateway's fields."""
_DEFAULT_LIMIT: Final = 20
_MAX_LIMIT: Final = 100
_MAX_SCANNED: Final = 5000
_PAGE_SIZE: Final = 50


class Batches:
    """Answers the requests."""

    def __init__(self, front: Front) -> None:
        self._front = front

    @property
    def resources(self) -> Sequence[Resource]:
        """The paths."""
        return (
            Resource("/v1/batches", {"POST": self.create, "GET": self.list}),
            Resource("/v1/batches/{id:id}/cancel", {"POST": self.cancel}),
            Resource("/v1/batches/{id:id}", {"GET": self.retrieve}),
        )

    async def create(self, request: Request) -> Response:
        """Create a batch."""
        query_of(request, ())
        batch = read_batch(await read_object(request, self._front.settings))
        batch.user_id, batch.request_id = DEFAULT_USER, request_id_of(request) or uuid.uuid4().hex
        with self._front.gateway.of(request).batches("CreateBatch") as batches:
            try:
                try:
                    status = await batches.create(batch)
                except UserNotAllowed as error:
                    # The credential is for one user. The request means that user.
                    if not (bound := error.metadata.get("user_id")):
                        raise
                    batch.user_id = bound
                    status = await batches.create(batch)
            except InvalidRequest as error:
                violations = Failure(HTTPStatus.BAD_REQUEST, str(error), error.reason, error.violations)
                raise with_fields(violations, lambda field: _FIELDS.get(field, field)) from error
        return answered(batch_object(status))

    async def retrieve(self, request: Request) -> Response:
        """Return a batch."""
        query_of(request, ())
        with self._front.gateway.of(request).batches("GetBatch") as batches:
            return answered(batch_object(await batches.get(request.path_params["id"])))

    async def cancel(self, request: Request) -> Response:
        """Cancel a batch."""
        query_of(request, ())
        await read_object(request, self._front.settings, optional=True)
        with self._front.gateway.of(request).batches("CancelBatch") as batches:
            return answered(batch_object(await batches.cancel(request.path_params["id"])))

    async def list(self, request: Request) -> Response:
        """List batches, open ones first."""
        query = {name: values[0] for name, values in query_of(request, ("after", "limit")).items()}
        limit = limit_of(query.get("limit", str(_DEFAULT_LIMIT)), _MAX_LIMIT)
        after = query.get("after", "")
        page: list[dict[str, Any]] = []
        found, more, scanned = not after, False, 0
        with self._front.gateway.of(request).batches("ListBatches") as batches:
            async with aclosing(batches.list(page_size=_PAGE_SIZE)) as listed:
                async for status in listed:
                    scanned += 1
                    if found and len(page) == limit:
                        more = True
                        break
                    if found:
                        page.append(batch_object(status))
                    found = found or status.batch_id == after
                    if scanned == _MAX_SCANNED:
                        break
        if not found:
            raise invalid("after", "is no batch of the list")
        return answered(
            {
                "object": "list",
                "data": page,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
                "has_more": more,
            }
        )
