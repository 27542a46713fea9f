"""Outputs that are files. Their text comes from the gateway's stream of the job."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from durable_llm import FINAL_STATES, Output
from llm_pb import llm_pb2
from services.http.failures import Failure
from services.http.front import Front
from services.http.gateway import Calls


async def with_text(calls: Calls, workflow_id: str, result: llm_pb2.JobResult, most: int) -> llm_pb2.JobResult:
    """Return the result of an ended job with its output, also where that is a file.

    Raises Failure for a file of more than `most` bytes, ApiError.
    """
    file = result.output_file
    if not file.size_bytes or result.output:
        return result
    if file.size_bytes > most:
        message = (
            f"the output has {file.size_bytes} bytes, more than the {most} of an answer: read the file"
            f" {file.file_id}, or stream the job"
        )
        raise Failure(HTTPStatus.UNPROCESSABLE_ENTITY, message, "OUTPUT_TOO_LARGE")
    whole = llm_pb2.JobResult()
    whole.CopyFrom(result)
    whole.output = await beginning(calls, workflow_id, file.size_bytes)
    return whole


async def beginning(calls: Calls, workflow_id: str, least: int) -> str:
    """Return the output of an ended job from its start, at least so many bytes if it has them. Raises ApiError."""
    output = Output()
    async with aclosing(calls.watch(workflow_id)) as messages:
        async for message in messages:
            if message.HasField("delta"):
                output.add(message.delta)
            if len(output) >= least:
                break
    return output.text


async def download(calls: Calls, front: Front, request: Request) -> Response:
    """Answer with the output of the ended job in the path as a text of any size.

    Raises Failure, 409, for a job that has not ended, 503 when too many streams are open; ApiError.
    """
    workflow_id = request.path_params["id"]
    response = await calls.call("GetStatus", llm_pb2.GetStatusRequest(workflow_id=workflow_id))
    if response.status.state not in FINAL_STATES:
        raise Failure(HTTPStatus.CONFLICT, f"job {workflow_id} has not ended; call again when it has", "JOB_NOT_ENDED")
    result = response.result
    headers = {
        "Cache-Control": "no-store",
        "Content-Disposition": 'attachment; filename="output.txt"',
        "X-Content-Type-Options": "nosniff",
    }
    if not result.output_file.size_bytes:
        return Response(result.output.encode(), headers=headers, media_type="text/plain")
    # A client sees by the length that an answer was cut.
    headers["Content-Length"] = str(result.output_file.size_bytes)
    if request.method == "HEAD":
        return Response(headers=headers, media_type="text/plain")
    front.require_place()
    return StreamingResponse(_text(calls, front, workflow_id), headers=headers, media_type="text/plain")


async def _text(calls: Calls, front: Front, workflow_id: str) -> AsyncIterator[bytes]:
    with front.stream():
        async with aclosing(calls.watch(workflow_id)) as messages:
            async for message in messages:
                if message.delta.text:
                    yield message.delta.text.encode()
