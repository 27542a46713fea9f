"""The pipelines of Client: AsyncPipelines for code without asyncio."""

from collections.abc import Generator, Iterable
from typing import Any

from durable_llm._pipelines import AsyncPipelines
from durable_llm._sync_files import Runner
from llm_pb import pipeline_pb2


class Pipelines:
    """AsyncPipelines for code without asyncio."""

    def __init__(self, loop: Runner, pipelines: AsyncPipelines) -> None:
        self._loop = loop
        self._pipelines = pipelines

    def submit(
        self, pipeline: pipeline_pb2.PipelineRequest | None = None, /, **fields: Any
    ) -> pipeline_pb2.PipelineStatus:
        """See AsyncPipelines.submit."""
        return self._loop.run(self._pipelines.submit(pipeline, **fields))

    def get(self, pipeline_id: str, path: str = "") -> pipeline_pb2.GetPipelineResponse:
        """See AsyncPipelines.get."""
        return self._loop.run(self._pipelines.get(pipeline_id, path))

    def watch(
        self, pipeline_id: str, follow: Iterable[str] = (), cursor: str = ""
    ) -> Generator[pipeline_pb2.StreamPipelineResponse, None, None]:
        """See AsyncPipelines.watch."""
        return self._loop.iterate(self._pipelines.watch(pipeline_id, follow, cursor))

    def result(self, pipeline_id: str) -> pipeline_pb2.GetPipelineResponse:
        """See AsyncPipelines.result."""
        return self._loop.run(self._pipelines.result(pipeline_id))

    def cancel(self, pipeline_id: str, reason: str = "") -> pipeline_pb2.PipelineStatus:
        """See AsyncPipelines.cancel."""
        return self._loop.run(self._pipelines.cancel(pipeline_id, reason))

    def answer(self, pipeline_id: str, path: str, *, approved: bool, answer_id: str = "") -> pipeline_pb2.StepStatus:
        """See AsyncPipelines.answer."""
        return self._loop.run(self._pipelines.answer(pipeline_id, path, approved=approved, answer_id=answer_id))

    def list(self, **filters: Any) -> Generator[pipeline_pb2.PipelineStatus, None, None]:
        """See AsyncPipelines.list."""
        return self._loop.iterate(self._pipelines.list(**filters))
