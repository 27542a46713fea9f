"""The line of the caller's quotas."""

from durable_llm import ApiError
from llm_pb import llm_pb2
from services.http.gateway import Calls


async def quota_of(calls: Calls) -> llm_pb2.GetQuotaResponse | None:
    """Return the quotas of a caller; None where there are none, or where they cannot be had."""
    try:
        quota: llm_pb2.GetQuotaResponse = await calls.call("GetQuota", llm_pb2.GetQuotaRequest())
    except ApiError:
        # A page is worth more than this line of it.
        return None
    return quota if quota.HasField("requests") or quota.HasField("open_jobs") else None
