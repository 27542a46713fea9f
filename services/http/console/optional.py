"""Optional parts of a page. The caller may lack the scope for them, or a broker may be away."""

from typing import Any, Final, NamedTuple

import grpc
from google.protobuf.message import Message

from durable_llm import ApiError
from llm_pb import llm_pb2
from services.http.failures import of_call
from services.http.gateway import Calls

_NOT_FOR_CALLER: Final = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED)

_SHOWN: Final = ("requests", "open_jobs", "output_tokens", "weight")
"""The fields of GetQuotaResponse that pages show."""


class Part(NamedTuple):
    """The answer of a call, or the reason why there is none."""

    answer: Any
    """The answer; None if the call has failed."""
    problem: str = ""
    """Why the call has failed, for people. Empty when the caller lacks the scope or the gateway lacks the call."""
    bound_user: str = ""
    """The user whom the credential is bound to, as the refusal names it. Empty: unknown, or nobody."""


async def ask(calls: Calls, method: str, request: Message) -> Part:
    """Return the answer of a call, or why there is none."""
    try:
        return Part(await calls.call(method, request))
    except ApiError as error:
        problem = "" if error.code in _NOT_FOR_CALLER else of_call(error).message
        return Part(None, problem, error.metadata.get("user_id", ""))


async def quota_of(calls: Calls) -> Part:
    """Return the quotas of a caller, and the weight. There is no answer for a caller without any."""
    return shown_quota(await ask(calls, "GetQuota", llm_pb2.GetQuotaRequest()))


def shown_quota(part: Part) -> Part:
    """Return the answer of GetQuota if pages show any of it."""
    quota = part.answer
    if quota is None or any(map(quota.HasField, _SHOWN)):
        return part
    return Part(None)
