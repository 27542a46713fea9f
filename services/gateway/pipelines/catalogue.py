"""The pipelines that this gateway takes: those that come along, and those of installed packages."""

from importlib.metadata import entry_points
from typing import Final

from google.protobuf.message import DecodeError

from jobs.field_rules import DEPTH, Violation
from jobs.pipelines import name_of
from llm_pb import llm_pb2, pipeline_pb2
from pipelines import refine as refine  # it registers itself
from pipelines import training as training  # likewise
from pipelines import world as world
from pipelines.registry import REGISTERED, TYPED

GROUP: Final = "durable_llm.pipelines"
"""The entry points that name modules with pipelines."""


def load_pipelines() -> None:
    """Import the pipelines of installed packages.

    Raises RuntimeError for a module that cannot be imported, or a name that two have.
    """
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            raise RuntimeError(f"the pipelines of {entry.value}, an entry point of {GROUP}: {error}") from error


def check_registered(pipeline: pipeline_pb2.PipelineRequest) -> list[Violation]:
    """Return the violations of a pipeline's name and input."""
    if pipeline.WhichOneof("spec") != "custom":
        return []
    found = REGISTERED.get(name_of(pipeline))
    if found is None or found.name in TYPED:
        known = ", ".join(sorted(REGISTERED.keys() - TYPED)) or "none"
        return [
            Violation("pipeline.custom.name", f"must be the name of a registered pipeline, of which there are: {known}")
        ]
    if pipeline.custom.HasField("input"):
        rule = f"must be a {found.spec.DESCRIPTOR.full_name}"
        try:
            if pipeline.custom.input.Unpack(found.spec()):
                return []
        except DecodeError:
            rule += f" that can be read: not cut, and {DEPTH}"
        return [Violation("pipeline.custom.input", rule)]
    return []


def goes_on(status: pipeline_pb2.PipelineStatus) -> bool:
    """Return whether a pipeline has failed, and is one that goes on when it is submitted again."""
    registered = REGISTERED.get(status.name)
    failed = status.state in (llm_pb2.JOB_STATE_FAILED, llm_pb2.JOB_STATE_TIMED_OUT)
    return failed and registered is not None and registered.resumes
