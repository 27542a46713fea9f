"""AnswerStep: the answers to the questions of pipelines."""

from typing import Final

from temporalio.client import WorkflowExecutionStatus, WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from jobs import names
from jobs.pipelines import FINAL_STATES, MAX_NODES, is_repeat
from llm_pb import pipeline_pb2
from runtime.auth import Caller
from runtime.keyed_limiter import KeyedLimiter
from services.gateway.effects import Effects
from services.gateway.errors import answer_refused, exhausted, temporal_unavailable
from services.gateway.job_traces import link_call
from services.gateway.pipelines.reader import PipelineReader

_AT_ONCE: Final = 3
"""Maximum number of answers to one pipeline that this gateway has under way. Temporal takes ten updates of a workflow
at once, and another gateway may have some as well. One more reads the pipeline: see services.gateway.told."""
_TOO_MANY: Final = "too many answers to this pipeline are under way at once; call again"
_ENDED: Final = (
    RPCStatusCode.NOT_FOUND,
    # The last task of the pipeline has failed because something came just before its end. It is repeated.
    RPCStatusCode.FAILED_PRECONDITION,
)
"""How Temporal refuses an answer to a pipeline that has ended, or is about to end."""


class StepAnswers:
    """Answers steps. Those of one pipeline are answered in turn."""

    def __init__(self, effects: Effects, reader: PipelineReader) -> None:
        self._effects = effects
        self._reader = reader
        self._turns = KeyedLimiter(_AT_ONCE, lambda: exhausted(_TOO_MANY), waiting=MAX_NODES)

    async def answer(self, caller: Caller, request: pipeline_pb2.AnswerStepRequest) -> pipeline_pb2.StepStatus:
        """Answer a step and return it.

        Raises ApiError NOT_FOUND, FAILED_PRECONDITION for a step that waits for no answer, ALREADY_EXISTS for one that
        has got another, RESOURCE_EXHAUSTED for too many answers at once, UNAVAILABLE for a pipeline that does not
        answer, or has ended and whose steps cannot be read; RPCError, AuditUnavailable.
        """
        description = await self._reader.describe(caller, request.pipeline_id)
        await link_call(description)
        if description.status == WorkflowExecutionStatus.RUNNING:
            try:
                async with self._turns.acquired(request.pipeline_id):
                    step: pipeline_pb2.StepStatus = await self._effects.update(
                        request.pipeline_id,
                        names.UPDATE_ANSWER_STEP,
                        request,
                        result_type=pipeline_pb2.StepStatus,
                    )
            except WorkflowUpdateFailedError as error:
                cause = error.cause
                if not isinstance(cause, ApplicationError) or cause.type is None:
                    raise temporal_unavailable("the pipeline does not answer; call again") from error
                raise answer_refused(cause.type, cause.message) from None
            except RPCError as error:
                if error.status == RPCStatusCode.RESOURCE_EXHAUSTED:
                    raise exhausted(_TOO_MANY) from error
                if error.status == RPCStatusCode.UNAVAILABLE:
                    # Temporal says so as well where it gives an answer up.
                    raise temporal_unavailable("Temporal has not taken the answer; call again") from error
                if error.status not in _ENDED:
                    raise
            else:
                return step
        return await self._answered(caller, request)

    async def _answered(self, caller: Caller, request: pipeline_pb2.AnswerStepRequest) -> pipeline_pb2.StepStatus:
        """Return a step of a pipeline that has ended, if it got this answer before."""
        record = await self._reader.read(caller, request.pipeline_id)
        if record.status.state not in FINAL_STATES:
            raise temporal_unavailable("the pipeline takes no answer now: it ends, or its code fails; call again")
        node = next((node for node in record.nodes if node.step.path == request.path), None)
        if not record.nodes and record.status.root.counts.total:
            # The code of then did not answer. Nobody knows its steps now.
            raise temporal_unavailable("the steps of the pipeline cannot be read; call again")
        if node is None:
            raise answer_refused(names.STEP_NOT_FOUND, f"there is no step {request.path!r}")
        if is_repeat(node, request):
            return node.step
        if node.answer_id:
            raise answer_refused(names.STEP_ANSWERED, f"{request.path} has got another answer")
        raise answer_refused(names.STEP_NOT_WAITING, f"{request.path} waits for no answer: the pipeline has ended")
