"""The paths of the REST API, and their description at /openapi.json."""

import functools
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llm_pb import common_pb2, llm_pb2
from services.http.front import Front
from services.http.resources import Package
from services.http.rest import batches, models, pipelines, schedules
from services.http.rest.handlers import list_parameters
from services.http.rest.jobs import Jobs
from services.http.rest.openapi import describe
from services.http.rest.operations import Operation, Parameter, Paths, resources, streamed
from services.http.rest.problems import answer
from services.http.rest.stream import PLACE, stream

_STATES: Final = [value.name for value in llm_pb2.JobState.DESCRIPTOR.values if value.number]
_CLASSES: Final = [value.name for value in common_pb2.JobClass.DESCRIPTOR.values if value.number]
_LIST: Final = list_parameters(
    "jobs",
    **{
        "state": Parameter(
            "Lists only jobs in this state. It may occur up to 16 times.",
            {"type": "array", "items": {"type": "string", "enum": _STATES}},
        ),
        "class": Parameter(
            "Lists only jobs of this class. It may occur up to 16 times.",
            {"type": "array", "items": {"type": "string", "enum": _CLASSES}},
        ),
    },
    model=Parameter("Lists only jobs for this model."),
    project_id=Parameter("Lists only jobs with this label."),
)
_WORKERS: Final = {"model": Parameter("Lists only workers that serve this model.")}


def package(front: Front, further: Mapping[str, Any]) -> Package:
    """Return the package. It takes all paths that no other package has.

    `further` are the operations of other packages, by path, which /openapi.json describes, too.
    """
    jobs, paths = Jobs(front), dict[str, Mapping[str, Operation]]()

    async def openapi(_: Request, __: Mapping[str, list[str]]) -> Response:
        return JSONResponse(describe(paths, further))

    paths |= _paths(front, jobs)
    for kind in (models, batches, pipelines, schedules):
        paths |= kind.paths(front)
    paths["/openapi.json"] = {"GET": Operation("GetOpenApi", "Returns this description.", openapi)}
    return Package("", resources(paths), answer)


def _paths(front: Front, jobs: Jobs) -> Paths:
    """Return the operations. Paths with a suffix come first, because an id may hold `/`."""
    pb, of_path = llm_pb2, ("workflow_id",)
    return {
        "/jobs": {
            "POST": Operation(
                "Submit",
                "Starts a job, or finds the one with the same user_id and request_id.",
                jobs.submit,
                pb.SubmitResponse,
                HTTPStatus.ACCEPTED,
                body=pb.JobRequest,
            ),
            "GET": Operation("List", "Lists jobs, open ones first.", jobs.list, pb.ListResponse, query=_LIST),
        },
        "/jobs/{id:id}/status": {
            "GET": Operation("GetStatus", "Returns a job's status, and its result.", jobs.status, pb.GetStatusResponse)
        },
        "/jobs/{id:id}/stream": {
            "GET": streamed(
                "StreamStatus",
                "Watches a job to its end, as server-sent events whose data are StreamStatusResponse.",
                functools.partial(stream, front),
                pb.StreamStatusResponse,
                PLACE,
            )
        },
        "/jobs/{id:id}/output": {
            "GET": Operation(
                "GetOutput",
                "Returns the text of a job that has ended, of any size.",
                jobs.output,
                media_type="text/plain",
            )
        },
        "/jobs/{id:id}/cancel": {
            "POST": Operation(
                "Cancel",
                "Requests that a job stops.",
                jobs.cancel,
                pb.CancelResponse,
                body=pb.CancelRequest,
                body_without=of_path,
            )
        },
        "/jobs/{id:id}/deliveries": {
            "GET": Operation(
                "ListDeliveries", "Lists the deliveries of a job's events.", jobs.deliveries, pb.ListDeliveriesResponse
            )
        },
        "/jobs/{id:id}/redeliver": {
            "POST": Operation(
                "Redeliver",
                "Sends the outcome of an ended job again.",
                jobs.redeliver,
                pb.RedeliverResponse,
                HTTPStatus.ACCEPTED,
                body=pb.RedeliverRequest,
                body_without=of_path,
            )
        },
        "/jobs/{id:id}": {
            "GET": Operation("GetJob", "Returns a job with its status and its result.", jobs.get, pb.GetJobResponse),
            "DELETE": Operation(
                "DeleteJob",
                "Deletes a job with all that it has produced.",
                jobs.delete,
                pb.DeleteJobResponse,
                HTTPStatus.ACCEPTED,
            ),
        },
        "/users/{id:id}": {
            "DELETE": Operation(
                "DeleteUser",
                "Deletes all that a user has: jobs, pipelines, batches, files and schedules.",
                jobs.delete_user,
                pb.DeleteUserResponse,
                HTTPStatus.ACCEPTED,
            ),
        },
        "/deletions/{id:id}": {
            "GET": Operation(
                "GetDeletion", "Returns the progress of a deletion.", jobs.deletion, pb.GetDeletionResponse
            )
        },
        "/models": {
            "GET": Operation("ListModels", "Lists the models that a job may name.", jobs.models, pb.ListModelsResponse)
        },
        "/workers": {
            "GET": Operation(
                "ListWorkers",
                "Lists the GPU workers, and how full each is.",
                jobs.workers,
                pb.ListWorkersResponse,
                query=_WORKERS,
            )
        },
        "/quota": {
            "GET": Operation("GetQuota", "Returns the quotas of the caller's tenant.", jobs.quota, pb.GetQuotaResponse)
        },
    }
