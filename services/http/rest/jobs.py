"""The handlers of jobs. Each makes one call of the gateway."""

from http import HTTPStatus
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from llm_pb import llm_pb2
from services.http.large_outputs import download
from services.http.rest.handlers import Handlers, Query, located
from services.http.rest.messages import answer_with

_REPEATED: Final = {"state": "states", "class": "classes"}


class Jobs(Handlers):
    """The handlers."""

    id_field = "workflow_id"

    async def submit(self, request: Request, _: Query) -> Response:
        """Start a job. The body is a JobRequest."""
        response = await self._send(request, "Submit", llm_pb2.SubmitRequest(), "job")
        return located(response, "jobs", response.workflow_id)

    async def list(self, request: Request, query: Query) -> Response:
        """List jobs. The query holds the fields of ListRequest."""
        return await self._list(request, "List", llm_pb2.ListRequest(), query, _REPEATED)

    async def get(self, request: Request, _: Query) -> Response:
        """Return a job as it was accepted, with its status and its result."""
        return await self._answer(request, "GetJob", llm_pb2.GetJobRequest())

    async def status(self, request: Request, _: Query) -> Response:
        """Return the status of a job, and its result."""
        return await self._answer(request, "GetStatus", llm_pb2.GetStatusRequest())

    async def output(self, request: Request, _: Query) -> Response:
        """Return the output of a job as a text."""
        return await download(self._front.gateway.of(request), self._front, request)

    async def cancel(self, request: Request, _: Query) -> Response:
        """Request that a job stops."""
        return await self._answer_to_body(request, "Cancel", llm_pb2.CancelRequest())

    async def delete(self, request: Request, _: Query) -> Response:
        """Delete a job."""
        response = await self._call(request, "DeleteJob", self._of(request, llm_pb2.DeleteJobRequest()))
        return located(response, "deletions", response.deletion.deletion_id)

    async def delete_user(self, request: Request, _: Query) -> Response:
        """Delete all that a user has."""
        message = llm_pb2.DeleteUserRequest(user_id=request.path_params["id"])
        response = await self._call(request, "DeleteUser", message)
        return located(response, "deletions", response.deletion.deletion_id)

    async def deletion(self, request: Request, _: Query) -> Response:
        """Return the progress of a deletion."""
        message = llm_pb2.GetDeletionRequest(deletion_id=request.path_params["id"])
        return answer_with(await self._call(request, "GetDeletion", message))

    async def deliveries(self, request: Request, _: Query) -> Response:
        """List the deliveries of a job."""
        return await self._answer(request, "ListDeliveries", llm_pb2.ListDeliveriesRequest())

    async def redeliver(self, request: Request, _: Query) -> Response:
        """Send the outcome of a job again."""
        return await self._answer_to_body(request, "Redeliver", llm_pb2.RedeliverRequest(), HTTPStatus.ACCEPTED)

    async def models(self, request: Request, _: Query) -> Response:
        """List the models."""
        return answer_with(await self._call(request, "ListModels", llm_pb2.ListModelsRequest()))

    async def workers(self, request: Request, query: Query) -> Response:
        """List the GPU workers."""
        message = llm_pb2.ListWorkersRequest(model=query.get("model", [""])[0])
        return answer_with(await self._call(request, "ListWorkers", message))

    async def quota(self, request: Request, _: Query) -> Response:
        """Return the quotas of the caller's tenant."""
        return answer_with(await self._call(request, "GetQuota", llm_pb2.GetQuotaRequest()))
