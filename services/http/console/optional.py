"""Parts of a page that the page can do without: the caller may lack the scope for them, or a broker may be away."""

from typing import TypeVar

from google.protobuf.message import Message

from durable_llm import ApiError
from llm_pb import llm_pb2
from services.http.gateway import Calls

M = TypeVar("M", bound=Message)


async def ask(calls: Calls, method: str, request: Message, _response: type[M]) -> M | None:
    """Return the answer of a call, None if it fails."""
    try:
        answer: M = await calls.call(method, request)
    except ApiError:
        return None
    return answer


async def quota_of(calls: Calls) -> llm_pb2.GetQuotaResponse | None:
    """Return the quotas of a caller; None where there are none, or where they cannot be had."""
    quota = await ask(calls, "GetQuota", llm_pb2.GetQuotaRequest(), llm_pb2.GetQuotaResponse)
    return quota if quota is not None and (quota.HasField("requests") or quota.HasField("open_jobs")) else None
