"""What a status of the service means: the error that the client raises for it."""

import contextlib
from typing import Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from durable_llm._details import reason_of
from durable_llm.batch_errors import BATCH_ERRORS
from durable_llm.errors import API_ERRORS, JOB_ERRORS, ApiError, JobError, Unavailable, Violation
from durable_llm.file_errors import FILE_ERRORS
from durable_llm.model_errors import MODEL_ERRORS
from durable_llm.pipeline_errors import PIPELINE_ERRORS
from llm_pb import llm_pb2

_DETAILS_KEY: Final = "grpc-status-details-bin"
_BY_REASON: Final = {**API_ERRORS, **FILE_ERRORS, **BATCH_ERRORS, **PIPELINE_ERRORS, **MODEL_ERRORS}


def from_call(error: grpc.aio.AioRpcError) -> ApiError:
    """Return the error of a gRPC call that failed."""
    code, message = error.code(), error.details() or error.code().name
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            with contextlib.suppress(DecodeError):
                status = status_pb2.Status.FromString(value)
    retry, request, info = error_details_pb2.RetryInfo(), error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
    for detail in status.details:
        detail.Unpack(retry)
        detail.Unpack(request)
        detail.Unpack(info)
    reason = reason_of(status)
    otherwise = Unavailable if code == grpc.StatusCode.UNAVAILABLE else ApiError
    return _BY_REASON.get(reason, otherwise)(
        message,
        code,
        reason,
        retry.retry_delay.ToTimedelta() if retry.HasField("retry_delay") else None,
        tuple(Violation(item.field, item.description) for item in request.field_violations),
        info.metadata,
    )


def from_outcome(status: llm_pb2.JobStatus, result: llm_pb2.JobResult) -> JobError | None:
    """Return the error of a job that ended. Return None for a job that succeeded."""
    if status.state == llm_pb2.JOB_STATE_SUCCEEDED:
        return None
    return JOB_ERRORS.get(reason_of(status.error), JobError)(status, result)
