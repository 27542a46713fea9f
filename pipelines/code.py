"""Runs the code of a pipeline. Code of a workflow."""

from datetime import UTC, timedelta
from typing import Final, NamedTuple

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from google.protobuf.message import Message
    from google.rpc import code_pb2, status_pb2

    from jobs import names
    from jobs.pipelines import (
        INCOMPLETE,
        TOTAL_TIMEOUT,
        UNKNOWN_PIPELINE,
        failure,
        name_of,
        packed,
        with_defaults,
    )
    from llm_pb import internal_pb2, pipeline_pb2
    from pipelines.errors import Incomplete, PipelineNotHere, StepFailed
    from pipelines.registry import REGISTERED, Registered

from pipelines.execution import Execution
from pipelines.program import Pipeline
from workflows.cancellation import Cancellation

_MAX_RESULT_BYTES: Final = 1024 * 1024
_ROLL_OUT: Final = timedelta(minutes=10)
"""Time since its start in which a gateway that has a pipeline has to take its first task."""


class Outcome(NamedTuple):
    """What the code of a pipeline has returned."""

    result: pipeline_pb2.PipelineResult
    error: status_pb2.Status | None
    """Why the result is not whole."""


def has_code(run: internal_pb2.PipelineRun, cancellation: Cancellation) -> bool:
    """Return whether the code of a pipeline runs. False: a gateway that does not have it gives it up, or has done so.

    Raises PipelineNotHere while it waits for a gateway that has it: when an operator rolls it out, some gateways have
    it before others. One that is cancelled, or whose time is over, needs no code any more.
    """
    name = name_of(with_defaults(run.pipeline, run.options.defaults))
    is_here = name in REGISTERED
    if workflow.unsafe.is_replaying():
        # This tells what was decided then, and records nothing.
        given_up = workflow.patched(names.PATCH_GIVES_UP)
    else:
        end = min(workflow.info().workflow_start_time + _ROLL_OUT, run.options.expire_time.ToDatetime(UTC))
        waits = is_here or (workflow.now() < end and not cancellation.is_asked)
        given_up = not waits and workflow.patched(names.PATCH_GIVES_UP)
    if given_up:
        cancellation.note_asked()
    elif not is_here:
        raise PipelineNotHere(f"no pipeline is named {name!r} here: another gateway has to run it")
    return not given_up


async def give_up(execution: Execution, run: internal_pb2.PipelineRun) -> Outcome:
    """Take the place of code that no gateway has. Raises StepFailed."""
    if execution.is_over():
        error = failure(TOTAL_TIMEOUT, "the pipeline's time was over", code_pb2.DEADLINE_EXCEEDED)
    else:
        name = name_of(with_defaults(run.pipeline, run.options.defaults))
        error = failure(UNKNOWN_PIPELINE, f"no pipeline is named {name!r} here", code_pb2.NOT_FOUND)
    raise StepFailed("", error)


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
    """Return what is registered, and the input."""
    request = with_defaults(run.pipeline, run.options.defaults)
    found = REGISTERED[name_of(request)]
    spec = found.spec()
    if request.WhichOneof("spec") != "custom":
        spec.CopyFrom(getattr(request, found.name))
    elif request.custom.HasField("input"):
        request.custom.input.Unpack(spec)
    return found, spec
