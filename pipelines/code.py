"""Runs the code of a pipeline. Code of a workflow."""

from datetime import timedelta
from typing import Final, NamedTuple

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from google.protobuf.message import Message
    from google.rpc import code_pb2, status_pb2

    from jobs import names
    from jobs.pipelines import INCOMPLETE, UNKNOWN_PIPELINE, failure, name_of, packed, with_defaults
    from llm_pb import internal_pb2, pipeline_pb2
    from pipelines.errors import Incomplete, StepFailed
    from pipelines.registry import REGISTERED, Registered

from pipelines.execution import Execution
from pipelines.program import Pipeline
from workflows.cancellation import Cancellation

_MAX_RESULT_BYTES: Final = 1024 * 1024
_ROLL_OUT: Final = timedelta(minutes=2)
"""Time since its start in which a gateway that has a pipeline has to take its first task."""


class Outcome(NamedTuple):
    """What the code of a pipeline has returned."""

    result: pipeline_pb2.PipelineResult
    error: status_pb2.Status | None
    """Why the result is not whole."""


def require_code(run: internal_pb2.PipelineRun, cancellation: Cancellation) -> None:
    """Raise RuntimeError where the pipeline is not installed here, and may be elsewhere. The workflow task fails then.

    While an operator rolls it out, some gateways have it before others. One that gives it up says so in the history,
    because what was begun otherwise was begun by a gateway that has it. A cancelled one needs no code any more.
    """
    name = name_of(with_defaults(run.pipeline, run.options.defaults))
    if name in REGISTERED:
        return
    cancellation.note_asked()
    young = workflow.now() - workflow.info().workflow_start_time < _ROLL_OUT
    waits = young and cancellation.error is None and not workflow.unsafe.is_replaying()
    if waits or not workflow.patched(names.PATCH_GIVES_UP):
        raise RuntimeError(f"no pipeline is named {name!r} here: another gateway has to run it")


async def run_code(execution: Execution, run: internal_pb2.PipelineRun) -> Outcome:
    """Run the code that a pipeline names. Raises what it raises, StepFailed, TypeError and ValueError."""
    found, spec = _code(run)
    error = None
    try:
        value = await found.program(Pipeline(execution), spec)
    except Incomplete as incomplete:
        value, error = incomplete.result, failure(INCOMPLETE, str(incomplete))
    if not isinstance(value, found.result):
        raise TypeError(f"{found.name} returns a {type(value).__name__}, no {found.result.__name__}")
    if (size := value.ByteSize()) > _MAX_RESULT_BYTES:
        raise ValueError(f"the result is {size} bytes; at most {_MAX_RESULT_BYTES} fit")
    return Outcome(packed(value), error)


def _code(run: internal_pb2.PipelineRun) -> tuple[Registered, Message]:
    """Return what is registered, and the input. Raises StepFailed."""
    request = with_defaults(run.pipeline, run.options.defaults)
    if (found := REGISTERED.get(name_of(request))) is None:
        error = failure(UNKNOWN_PIPELINE, f"no pipeline is named {name_of(request)!r} here", code_pb2.NOT_FOUND)
        raise StepFailed("", error)
    spec = found.spec()
    if request.WhichOneof("spec") != "custom":
        spec.CopyFrom(getattr(request, found.name))
    elif request.custom.HasField("input"):
        request.custom.input.Unpack(spec)
    return found, spec
