"""Client for durable LLM jobs: submit a job, stream its output across broken connections, come back to it, cancel it.

    async with AsyncClient("127.0.0.1:50051") as client:
        job = await client.submit(user_id="alice", model="docstrings", prompt="Return the")
        async for piece in job.stream():
            print(piece.text, end="")

`Client` does the same without asyncio. A name is imported once it is used, and nothing before: the command line handles
Ctrl-C from its first import on, and starts without gRPC.
"""

TYPE_CHECKING = False
"""What type checkers take for typing.TYPE_CHECKING."""

if TYPE_CHECKING:
    from durable_llm._batches import AsyncBatches
    from durable_llm._client import AsyncClient, Outcome
    from durable_llm._files import AsyncFiles
    from durable_llm._job import AsyncJob
    from durable_llm._pipelines import AsyncPipelines
    from durable_llm._retrying_stub import FINAL_STATES, is_last
    from durable_llm._sync import Client, Job
    from durable_llm._sync_batches import Batches
    from durable_llm._sync_files import Files
    from durable_llm._sync_pipelines import Pipelines
    from durable_llm.errors import ApiError, DurableLLMError, JobError
    from durable_llm.output import Output, Piece
    from durable_llm.retry import RetryPolicy
    from llm_pb.batch_pb2 import BatchItem, BatchRequest, BatchStatus
    from llm_pb.file_pb2 import File
    from llm_pb.llm_pb2 import ChatMessage, JobRequest, JobResult, JobStatus, SamplingParams
    from llm_pb.pipeline_pb2 import PipelineRequest, PipelineStatus, StepStatus

__all__ = [
    "FINAL_STATES",
    "ApiError",
    "AsyncBatches",
    "AsyncClient",
    "AsyncFiles",
    "AsyncJob",
    "AsyncPipelines",
    "BatchItem",
    "BatchRequest",
    "BatchStatus",
    "Batches",
    "ChatMessage",
    "Client",
    "DurableLLMError",
    "File",
    "Files",
    "Job",
    "JobError",
    "JobRequest",
    "JobResult",
    "JobStatus",
    "Outcome",
    "Output",
    "Piece",
    "PipelineRequest",
    "PipelineStatus",
    "Pipelines",
    "RetryPolicy",
    "SamplingParams",
    "StepStatus",
    "is_last",
]

_NAMES = {
    "durable_llm._batches": ("AsyncBatches",),
    "durable_llm._client": ("AsyncClient", "Outcome"),
    "durable_llm._files": ("AsyncFiles",),
    "durable_llm._job": ("AsyncJob",),
    "durable_llm._pipelines": ("AsyncPipelines",),
    "durable_llm._retrying_stub": ("FINAL_STATES", "is_last"),
    "durable_llm._sync": ("Client", "Job"),
    "durable_llm._sync_batches": ("Batches",),
    "durable_llm._sync_files": ("Files",),
    "durable_llm._sync_pipelines": ("Pipelines",),
    "durable_llm.errors": ("ApiError", "DurableLLMError", "JobError"),
    "durable_llm.output": ("Output", "Piece"),
    "durable_llm.retry": ("RetryPolicy",),
    "llm_pb.batch_pb2": ("BatchItem", "BatchRequest", "BatchStatus"),
    "llm_pb.file_pb2": ("File",),
    "llm_pb.pipeline_pb2": ("PipelineRequest", "PipelineStatus", "StepStatus"),
    "llm_pb.llm_pb2": ("ChatMessage", "JobRequest", "JobResult", "JobStatus", "SamplingParams"),
}
"""The public names by the modules that define them."""
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = ("batch_errors", "errors", "file_errors", "model_errors", "output", "pipeline_errors", "retry")


if not TYPE_CHECKING:
    # A type checker would take any name for one of the package.

    def __getattr__(name):
        from importlib import import_module

        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
