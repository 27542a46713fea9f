"""The questions of pipelines, and their answers: many at once, and those that come as the pipeline ends."""

import asyncio
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest
from google.rpc import code_pb2
from temporalio import workflow
from temporalio.client import WorkflowExecutionStatus
from temporalio.service import RPCError, RPCStatusCode

from durable_llm.cli._follow_pipeline import described
from jobs import names
from jobs.errors import reason_of
from llm_pb import internal_pb2, llm_pb2, pipeline_pb2
from pipelines.execution import Execution
from pipelines.step import Step
from runtime.auth import Caller
from services.gateway.effects import Effects
from services.gateway.errors import ApiError
from services.gateway.pipelines.answers import StepAnswers
from services.gateway.pipelines.reader import PipelineReader
from services.http.console.pipeline_view import Node

CALLER = Caller("", "", frozenset())
MOST = 10
"""Number of updates that Temporal takes of a workflow at once."""


class Reader:
    """A pipeline that runs when it is described, and is as in `record` when it is read."""

    def __init__(self, state: "llm_pb2.JobState.ValueType") -> None:
        self.record = internal_pb2.PipelineRecord()
        self.record.status.state = state
        self.record.nodes.add().step.path = "ask/0"

    async def describe(self, *_: Any) -> Any:
        async def memo_value(_: str, default: Any = None) -> Any:
            return default

        return SimpleNamespace(id="llmpipe-u-1", status=WorkflowExecutionStatus.RUNNING, memo_value=memo_value)

    async def read(self, *_: Any) -> internal_pb2.PipelineRecord:
        return self.record


class Updates:
    """Takes as many updates at once as Temporal does, or fails with an error."""

    def __init__(self, error: RPCStatusCode | None = None) -> None:
        self._error = error
        self._under_way = 0

    async def update(self, _: str, __: str, request: pipeline_pb2.AnswerStepRequest, **___: Any) -> Any:
        if self._error is not None:
            raise RPCError("refused", self._error, b"")
        if self._under_way == MOST:
            raise RPCError("limit on number of concurrent updates", RPCStatusCode.RESOURCE_EXHAUSTED, b"")
        self._under_way += 1
        await asyncio.sleep(0.001)
        self._under_way -= 1
        return pipeline_pb2.StepStatus(path=request.path)


def answers(updates: Updates, state: "llm_pb2.JobState.ValueType" = llm_pb2.JOB_STATE_RUNNING) -> StepAnswers:
    return StepAnswers(cast("Effects", updates), cast("PipelineReader", Reader(state)))


def to(number: int) -> pipeline_pb2.AnswerStepRequest:
    return pipeline_pb2.AnswerStepRequest(pipeline_id="llmpipe-u-1", path=f"ask/{number}", answer_id="a", approved=True)


async def test_hundreds_of_answers_to_one_pipeline_at_once_are_all_taken() -> None:
    """Of 300 answers 24 were taken: Temporal refused the others."""
    many = answers(Updates())
    taken = await asyncio.gather(*(many.answer(CALLER, to(number)) for number in range(300)))
    assert [step.path for step in taken] == [f"ask/{number}" for number in range(300)]


@pytest.mark.parametrize("status", [RPCStatusCode.FAILED_PRECONDITION, RPCStatusCode.NOT_FOUND])
async def test_an_answer_that_comes_as_its_pipeline_ends_is_one_to_an_ended_pipeline(status: RPCStatusCode) -> None:
    """It was UNAVAILABLE: "Temporal has failed (FAILED_PRECONDITION)"."""
    with pytest.raises(ApiError) as refused:
        await answers(Updates(status), llm_pb2.JOB_STATE_CANCELLED).answer(CALLER, to(0))
    assert reason_of(refused.value.status) == names.STEP_NOT_WAITING


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (RPCStatusCode.FAILED_PRECONDITION, code_pb2.UNAVAILABLE, "it ends, or its code fails"),
        (RPCStatusCode.RESOURCE_EXHAUSTED, code_pb2.RESOURCE_EXHAUSTED, "too many answers to this pipeline"),
        (RPCStatusCode.UNAVAILABLE, code_pb2.UNAVAILABLE, "has not taken the answer"),
    ],
)
async def test_what_keeps_an_answer_from_being_taken_is_said(status: RPCStatusCode, code: int, words: str) -> None:
    with pytest.raises(ApiError) as refused:
        await answers(Updates(status)).answer(CALLER, to(0))
    assert refused.value.status.code == code
    assert words in refused.value.status.message


@pytest.mark.parametrize("question", ["", " \n"])
async def test_a_step_does_not_ask_nothing(monkeypatch: pytest.MonkeyPatch, question: str) -> None:
    """Nobody could answer it."""
    monkeypatch.setattr(workflow, "info", lambda: SimpleNamespace(workflow_id="llmpipe-alice-1"))
    monkeypatch.setattr(workflow, "patched", lambda _: True)
    with pytest.raises(ValueError, match="a question must not be empty"):
        await Execution(internal_pb2.PipelineRun()).ask(Step("ask"), question, None)


@pytest.mark.parametrize("approved", [True, False])
def test_a_step_says_how_it_was_answered(monkeypatch: pytest.MonkeyPatch, approved: bool) -> None:
    monkeypatch.setattr(workflow, "info", lambda: SimpleNamespace(workflow_id="llmpipe-alice-1"))
    execution = Execution(internal_pb2.PipelineRun())
    execution.tree.begin("ask", datetime(2026, 1, 1, tzinfo=UTC), pipeline_pb2.STEP_KIND_APPROVAL)
    execution.tree.ask("ask", "Go on?")
    assert not execution.record().nodes[0].step.HasField("approved")
    execution.answer(pipeline_pb2.AnswerStepRequest(path="ask", answer_id="a", approved=approved))
    step = execution.record().nodes[0].step
    assert (step.HasField("approved"), step.approved) == (True, approved)
    shown = "approved" if approved else "declined"
    # The summary repeats the answer for clients of earlier versions.
    assert described(step, "ask") == f"ask RUNNING {shown} Go on?"
    assert Node(step).summary == [("", shown)]
    step.summary_json = '{"by": "alice"}'
    assert described(step, "ask") == f'ask RUNNING {shown} {{"by": "alice"}} Go on?'
    assert Node(step).summary == [("", shown), ("by", "alice")]
