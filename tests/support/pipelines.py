"""How tests submit pipelines, answer and follow them."""

import asyncio
import itertools
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from google.protobuf.message import Message
from temporalio.api.history.v1 import HistoryEvent
from temporalio.client import Client

from jobs.pipelines import FINAL_STATES
from llm_pb import pipeline_pb2
from tests.support.files import PATIENCE
from tests.support.paths import ROOT
from tests.support.stacks import FAST

REGISTERED: Final = ROOT / "tests" / "support" / "registered"
"""What an operator has installed: pipelines, and the entry points that name them."""
_PATH: Final = os.pathsep.join(filter(None, (str(REGISTERED), os.environ.get("PYTHONPATH", ""))))
WITH_PIPELINES: Final = {**FAST, "gateway": {**FAST["gateway"], "PYTHONPATH": _PATH}}
"""FAST, with the pipelines in the gateways."""
_numbers = itertools.count(1)


def new_pipeline(name: str, input_: Message | None = None, **changes: Any) -> pipeline_pb2.PipelineRequest:
    """Return a registered pipeline with a new key."""
    number = next(_numbers)
    values = {"user_id": f"maker-{number}", "request_id": f"made-{number}", **changes}
    pipeline = pipeline_pb2.PipelineRequest(**values)
    pipeline.custom.name = name
    if input_ is not None:
        pipeline.custom.input.Pack(input_)
    return pipeline


async def submit(stub: Any, pipeline: pipeline_pb2.PipelineRequest) -> pipeline_pb2.PipelineStatus:
    request = pipeline_pb2.SubmitPipelineRequest(pipeline=pipeline)
    return (await stub.SubmitPipeline(request, timeout=PATIENCE)).status


async def get(stub: Any, id_: str, path: str = "") -> pipeline_pb2.GetPipelineResponse:
    return await stub.GetPipeline(pipeline_pb2.GetPipelineRequest(pipeline_id=id_, path=path), timeout=PATIENCE)


async def cancel(stub: Any, id_: str) -> pipeline_pb2.PipelineStatus:
    request = pipeline_pb2.CancelPipelineRequest(pipeline_id=id_, reason="enough")
    return (await stub.CancelPipeline(request, timeout=PATIENCE)).status


async def answer(stub: Any, id_: str, path: str, answer_id: str, *, approved: bool) -> pipeline_pb2.StepStatus:
    request = pipeline_pb2.AnswerStepRequest(pipeline_id=id_, path=path, answer_id=answer_id, approved=approved)
    return (await stub.AnswerStep(request, timeout=PATIENCE)).step


def activities(events: Iterable[HistoryEvent]) -> Counter[str]:
    """Return how often a workflow has called each of its activities that are not local."""
    return Counter(
        event.activity_task_scheduled_event_attributes.activity_type.name
        for event in events
        if event.HasField("activity_task_scheduled_event_attributes")
    )


@dataclass
class Followed:
    """What a stream, or several that continue each other, have brought."""

    steps: dict[str, pipeline_pb2.StepStatus] = field(default_factory=dict)
    outputs: dict[str, bytes] = field(default_factory=dict)
    cursor: str = ""
    status: pipeline_pb2.PipelineStatus = field(default_factory=pipeline_pb2.PipelineStatus)
    result: pipeline_pb2.PipelineResult | None = None
    messages: int = 0

    def take(self, message: pipeline_pb2.StreamPipelineResponse) -> None:
        assert not self.ended, "the message with the final state is the last one"
        self.messages += 1
        if message.HasField("status"):
            self.status = message.status
        if message.rewind:
            self.steps.clear()
        self.steps.update((step.path, step) for step in message.steps)
        if message.HasField("delta"):
            path, delta = message.delta.path, message.delta.delta
            known = self.outputs.get(path, b"")
            assert delta.offset == len(known) or (delta.rewind and delta.offset < len(known)), "bytes twice, or a gap"
            self.outputs[path] = known[: delta.offset] + delta.text.encode()
        if message.HasField("result"):
            self.result = message.result
        assert message.cursor
        self.cursor = message.cursor

    @property
    def ended(self) -> bool:
        return self.status.state in FINAL_STATES


async def follow(
    stub: Any,
    id_: str,
    *patterns: str,
    known: Followed | None = None,
    until: Any = lambda _: False,
    patience: float = PATIENCE,
) -> Followed:
    """Follow a pipeline from where `known` is, to its end or until what has come meets a condition.

    `patience` is in seconds.
    """
    followed = known if known is not None else Followed()
    request = pipeline_pb2.StreamPipelineRequest(pipeline_id=id_, cursor=followed.cursor, follow=patterns)
    call = stub.StreamPipeline(request, timeout=patience)
    try:
        async for message in call:
            followed.take(message)
            if until(followed):
                break
    finally:
        call.cancel()
    return followed


def asks(seen: Followed) -> bool:
    """Return whether the step "ask" of a pipeline waits for an answer, or the pipeline has ended."""
    return seen.ended or ("ask" in seen.steps and bool(seen.steps["ask"].question))


async def until_pending(temporal: Client, id_: str, activity: str) -> None:
    """Wait until an activity of a workflow, which is not a local one, waits or runs."""
    async with asyncio.timeout(PATIENCE):
        while True:
            description = await temporal.get_workflow_handle(id_).describe()
            if activity in {one.activity_type.name for one in description.raw_description.pending_activities}:
                return
            await asyncio.sleep(0.1)
