"""The pipelines that this process knows, by their names.

A module registers its pipelines as it is imported. The gateway imports those that come along, and those that entry
points of the group `durable_llm.pipelines` name.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from google.protobuf.message import Message

from jobs.pipelines import NAME_PATTERN
from llm_pb import pipeline_pb2

Program = Callable[..., Awaitable[Message]]
"""The code of a pipeline: a coroutine function of a Pipeline and its spec that returns its result."""


@dataclass(frozen=True)
class Registered:
    """A pipeline that can be submitted."""

    name: str
    spec: type[Message]
    """The class of its input."""
    result: type[Message]
    """The class of what it returns."""
    program: Program
    resumes: bool
    """Whether it goes on when it is submitted again after it has failed."""


TYPED: Final = {field.name for field in pipeline_pb2.PipelineRequest.DESCRIPTOR.oneofs_by_name["spec"].fields}
"""Pipelines that come along, and have a field of PipelineRequest of their own."""
_registered: Final[dict[str, Registered]] = {}
REGISTERED: Final[Mapping[str, Registered]] = MappingProxyType(_registered)
"""All pipelines that this process has imported."""


def request_of(name: str, spec: Message) -> tuple[pipeline_pb2.PipelineRequest, Registered]:
    """Return what runs a registered pipeline, without a key, and the pipeline. Raises ValueError for a wrong input."""
    if (found := REGISTERED.get(name)) is None:
        raise ValueError(f"no pipeline is named {name!r} here")
    if not isinstance(spec, found.spec):
        raise ValueError(f"{name} takes a {found.spec.__name__}, no {type(spec).__name__}")
    request = pipeline_pb2.PipelineRequest()
    if name in TYPED:
        getattr(request, name).CopyFrom(spec)
    else:
        request.custom.name = name
        request.custom.input.Pack(spec)
    return request, found


def pipeline(name: str, spec: type[Message], result: type[Message], *, resumes: bool = False) -> Callable[[Any], Any]:
    """Register a coroutine function as the pipeline of a name. Raises ValueError for a bad name or one that is taken.

    `spec` and `result` are protobuf classes, such as google.protobuf.Struct. The function runs inside a workflow: it
    must be deterministic, so it takes time, chance and everything outside of it from its Pipeline alone.

    With `resumes` a pipeline that has failed or timed out goes on when the same request is submitted again: its code
    runs again, and generate() and image() of a step whose job has succeeded return what the job has made. Every other
    step runs again. This is for code whose steps ask for the same each time, and that compensates nothing.
    """
    if NAME_PATTERN.fullmatch(name) is None:
        raise ValueError(f"a pipeline cannot be named {name!r}: {NAME_PATTERN.pattern}")

    def register(program: Any) -> Any:
        if (earlier := REGISTERED.get(name)) is not None:
            places = " and ".join(f"{one.__module__}.{one.__qualname__}" for one in (earlier.program, program))
            raise ValueError(f"two pipelines are named {name!r}: {places}")
        _registered[name] = Registered(name, spec, result, program, resumes)
        return program

    return register
