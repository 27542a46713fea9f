"""The handlers of the REST API. Each makes one call of the gateway."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote

from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import Response

from durable_llm import ApiError
from durable_llm.errors import Violation
from llm_pb import llm_pb2
from services.http.bodies import read_object
from services.http.failures import Failure, bad_request, of_call, with_fields
from services.http.front import Front
from services.http.large_outputs import download
from services.http.parsing import parse
from services.http.rest.messages import answer_with

Query = Mapping[str, list[str]]

REPEATED: Final = {"state": "states", "class": "classes"}
"""Fields of ListRequest by their parameters, which are repeated for each value."""


class Jobs:
    """The handlers."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def submit(self, request: Request, _: Query) -> Response:
        """Start a job. The body is a JobRequest."""
        value = await self._body(request)
        if "job" in value:
            words = "is no field of JobRequest: the body is the job itself, without an object around it"
            raise bad_request(Violation("job", words))
        submit = llm_pb2.SubmitRequest(job=parse(value, llm_pb2.JobRequest()))
        try:
            response = await self._call(request, "Submit", submit)
        except ApiError as error:
            raise with_fields(of_call(error), lambda field: field.removeprefix("job.")) from error
        location = f"/jobs/{quote(response.workflow_id, safe='')}"
        return answer_with(response, HTTPStatus.ACCEPTED, {"Location": location})

    async def list(self, request: Request, query: Query) -> Response:
        """List jobs. The query holds the fields of ListRequest."""
        value: dict[str, Any] = {name: values[0] for name, values in query.items() if name not in REPEATED}
        value |= {field: query.get(name, []) for name, field in REPEATED.items()}
        try:
            message = parse(value, llm_pb2.ListRequest())
            return answer_with(await self._call(request, "List", message))
        except ApiError as error:
            failure = of_call(error)
        except Failure as wrong:
            failure = wrong
        raise with_fields(failure, _as_parameter)

    async def get(self, request: Request, _: Query) -> Response:
        """Return a job as it was accepted, with its status and its result."""
        return answer_with(await self._call(request, "GetJob", _of(request, llm_pb2.GetJobRequest())))

    async def status(self, request: Request, _: Query) -> Response:
        """Return the status of a job, and its result."""
        return answer_with(await self._call(request, "GetStatus", _of(request, llm_pb2.GetStatusRequest())))

    async def output(self, request: Request, _: Query) -> Response:
        """Return the output of a job as a text."""
        return await download(self._front.gateway.of(request), self._front, request)

    async def cancel(self, request: Request, _: Query) -> Response:
        """Request that a job stops."""
        message = await self._with_body(request, llm_pb2.CancelRequest())
        return answer_with(await self._call(request, "Cancel", message))

    async def delete(self, request: Request, _: Query) -> Response:
        """Delete a job."""
        response = await self._call(request, "DeleteJob", _of(request, llm_pb2.DeleteJobRequest()))
        location = f"/deletions/{quote(response.deletion.deletion_id, safe='')}"
        return answer_with(response, HTTPStatus.ACCEPTED, {"Location": location})

    async def deletion(self, request: Request, _: Query) -> Response:
        """Return the progress of a deletion."""
        message = llm_pb2.GetDeletionRequest(deletion_id=request.path_params["id"])
        return answer_with(await self._call(request, "GetDeletion", message))

    async def deliveries(self, request: Request, _: Query) -> Response:
        """List the deliveries of a job."""
        return answer_with(await self._call(request, "ListDeliveries", _of(request, llm_pb2.ListDeliveriesRequest())))

    async def redeliver(self, request: Request, _: Query) -> Response:
        """Send the outcome of a job again."""
        message = await self._with_body(request, llm_pb2.RedeliverRequest())
        return answer_with(await self._call(request, "Redeliver", message), HTTPStatus.ACCEPTED)

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

    async def _call(self, request: Request, method: str, message: Message) -> Any:
        return await self._front.gateway.of(request).call(method, message)

    async def _body(self, request: Request, *, optional: bool = False) -> dict[str, Any]:
        return await read_object(request, self._front.settings, optional=optional)

    async def _with_body(self, request: Request, message: Any) -> Any:
        """Return the message for the job in the path, with the fields of the body."""
        value = await self._body(request, optional=True)
        return _of(request, parse(value, message, without=("workflow_id", "workflowId")))


def _as_parameter(field: str) -> str:
    """Return the path of a field of ListRequest as one of a parameter."""
    for name, of_request in REPEATED.items():
        field = field.replace(of_request, name, 1)
    return field


def _of(request: Request, message: Any) -> Any:
    """Return the message for the job in the path."""
    message.workflow_id = request.path_params["id"]
    return message
