"""The operator's defaults of pipelines that come along."""

from typing import Any, Self

from google.protobuf.json_format import ParseDict, ParseError
from pydantic import RootModel, model_validator

from jobs.pipeline_rules import check_values
from llm_pb import pipeline_pb2


class PipelineDefaults(RootModel[dict[str, dict[str, Any]]]):
    """Values of specs, by the names of their fields in PipelineRequest."""

    root: dict[str, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _are_values_of_specs(self) -> Self:
        for name in self.root:
            if violations := check_values(self._request(name)):
                raise ValueError("; ".join(f"{field} {description}" for field, description in violations))
        return self

    def of(self, pipeline: pipeline_pb2.PipelineRequest) -> pipeline_pb2.PipelineRequest | None:
        """Return the defaults of a pipeline as a request with nothing but a spec; None without any."""
        name = pipeline.WhichOneof("spec") or ""
        return self._request(name) if name in self.root else None

    def all(self) -> list[pipeline_pb2.PipelineRequest]:
        """Return the defaults of all pipelines that have some, as of() does."""
        return [self._request(name) for name in sorted(self.root)]

    def _request(self, name: str) -> pipeline_pb2.PipelineRequest:
        request = pipeline_pb2.PipelineRequest()
        if name not in _SPECS:
            raise ValueError(f"{name} is none of {', '.join(sorted(_SPECS))}")
        try:
            ParseDict({name: self.root[name]}, request)
        except ParseError as error:
            raise ValueError(str(error)) from error
        return request


_SPECS = {field.name for field in pipeline_pb2.PipelineRequest.DESCRIPTOR.oneofs_by_name["spec"].fields} - {"custom"}
