"""What a caller may do: the scope of each method, and the scopes that a request needs as well.

A method that has no row here is refused, and the gateway does not start with one.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from google.protobuf.descriptor import ServiceDescriptor

from jobs.ids import tenant_of
from jobs.options import DEFAULT_PRIORITY
from llm_pb import llm_pb2
from runtime.auth import Caller, Code, Refusal, scope_missing
from runtime.scopes import (
    CANCEL,
    DELETE,
    NOTIFY,
    PRIORITY,
    READ,
    READ_MODELS,
    REDELIVER,
    SCOPES,
    STRUCTURED,
    SUBMIT,
    WORKERS,
)

OF_METHOD: Final[Mapping[str, str]] = {
    "/llm.v1.LlmService/Submit": SUBMIT,
    "/llm.v1.LlmService/GetStatus": READ,
    "/llm.v1.LlmService/GetJob": READ,
    "/llm.v1.LlmService/StreamStatus": READ,
    "/llm.v1.LlmService/Cancel": CANCEL,
    "/llm.v1.LlmService/List": READ,
    "/llm.v1.LlmService/ListModels": READ_MODELS,
    "/llm.v1.LlmService/ListWorkers": WORKERS,
    "/llm.v1.LlmService/ListDeliveries": READ,
    "/llm.v1.LlmService/Redeliver": REDELIVER,
    "/llm.v1.LlmService/GetQuota": READ,
    "/llm.v1.LlmService/DeleteJob": DELETE,
    "/llm.v1.LlmService/DeleteJobs": DELETE,
    "/llm.v1.LlmService/GetDeletion": DELETE,
}
"""The scope of each method."""


def gateway_for(workflow_id: str) -> Caller:
    """Return the gateway itself, for what it does about a job for all callers who may see the job."""
    return Caller(tenant_of(workflow_id), "gateway", SCOPES)


def require_all_methods(services: Iterable[ServiceDescriptor], of_method: Mapping[str, str] = OF_METHOD) -> None:
    """Raise RuntimeError for a method without a row."""
    methods = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    if without := sorted(methods - of_method.keys()):
        raise RuntimeError(f"no scope is named for {', '.join(without)}: see services.gateway.scopes")


def check_submit(caller: Caller, request: llm_pb2.SubmitRequest) -> None:
    """Raise Refusal for a job that is not the caller's to submit."""
    job = request.job
    needed = {
        NOTIFY: bool(job.notify),
        STRUCTURED: job.params.WhichOneof("structured_output") is not None,
        PRIORITY: 1 <= job.priority < DEFAULT_PRIORITY,
    }
    if missing := [scope for scope, needs in needed.items() if needs and not caller.may(scope)]:
        raise scope_missing(*missing)
    _require_user(caller, job.user_id)


def check_list(caller: Caller, request: llm_pb2.ListRequest) -> None:
    """Raise Refusal for jobs of others; a caller who is bound to a user, and names none, means that user."""
    if caller.user_id and not request.user_id:
        request.user_id = caller.user_id
    _require_user(caller, request.user_id)


def check_delete_jobs(caller: Caller, request: llm_pb2.DeleteJobsRequest) -> None:
    """Raise Refusal for jobs of others."""
    if request.user_id:
        _require_user(caller, request.user_id)


CHECKS: Final[Mapping[str, Callable[[Caller, Any], None]]] = {
    "Submit": check_submit,
    "List": check_list,
    "DeleteJobs": check_delete_jobs,
}
"""What the request of a method must not ask for, by the method's name. JobReader says whose an existing job is."""


def _require_user(caller: Caller, user_id: str) -> None:
    if not caller.may_see(user_id):
        raise user_not_allowed(caller.user_id)


def user_not_allowed(bound_to: str) -> Refusal:
    """PERMISSION_DENIED: the credential is bound to a user, whose jobs these are not."""
    message = f"the credential is for the jobs of the user {bound_to!r} alone"
    return Refusal(Code.PERMISSION_DENIED, "USER_NOT_ALLOWED", message, {"user_id": bound_to})
