"""Client for durable LLM jobs: submit a job, stream its output across broken connections, come back to it, cancel it.

    async with AsyncClient("127.0.0.1:50051") as client:
        job = await client.submit(user_id="alice", model="docstrings", prompt="Return the")
        async for piece in job.stream():
            print(piece.text, end="")

`Client` does the same without asyncio.
"""

from durable_llm._client import AsyncClient, Outcome
from durable_llm._job import AsyncJob, Piece
from durable_llm._retrying_stub import FINAL_STATES, is_last
from durable_llm._sync import Client, Job
from durable_llm.errors import ApiError, DurableLLMError, JobError
from durable_llm.output import Output
from durable_llm.retry import RetryPolicy
from llm_pb.llm_pb2 import ChatMessage, JobRequest, JobResult, JobStatus, SamplingParams

__all__ = [
    "FINAL_STATES",
    "ApiError",
    "AsyncClient",
    "AsyncJob",
    "ChatMessage",
    "Client",
    "DurableLLMError",
    "Job",
    "JobError",
    "JobRequest",
    "JobResult",
    "JobStatus",
    "Outcome",
    "Output",
    "Piece",
    "RetryPolicy",
    "SamplingParams",
    "is_last",
]
