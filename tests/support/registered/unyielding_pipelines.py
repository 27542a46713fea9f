"""Pipelines of the tests: code that makes it hard to stop or to undo a pipeline."""

import asyncio
from datetime import timedelta
from typing import Any

from google.protobuf.struct_pb2 import Struct
from google.protobuf.wrappers_pb2 import StringValue

from pipelines import Pipeline, pipeline


@pipeline("unyielding", Struct, StringValue)
async def unyielding(llm: Pipeline, spec: Struct) -> StringValue:
    """Run activities one after another that end well when they are cancelled."""
    for number in range(3):
        await llm.step(
            f"turns/{number}",
            "Turn",
            number,
            task_queue=spec["queue"],
            result_type=int,
            heartbeat_timeout=timedelta(minutes=1),
        )
    return StringValue(value="done")


@pipeline("untidy", Struct, StringValue)
async def untidy(llm: Pipeline, spec: Struct) -> StringValue:
    """Fail with compensations of which one cannot be called and one is no coroutine function."""

    async def undo() -> None:
        await llm.generate("undo", model="docstrings", prompt="Undo.", max_tokens=2)

    broken: Any = lambda: None  # noqa: E731
    llm.compensate(undo)
    llm.compensate(broken)
    llm.compensate(undo, "an argument too many")
    await llm.map("none", [1], undo, limit=0)  # type: ignore[arg-type]  # it fails before
    return StringValue()


@pipeline("forgetful", StringValue, StringValue)
async def forgetful(llm: Pipeline, prompt: StringValue) -> StringValue:
    """Fail while a task that nobody waits for sleeps, and undo what was done when it has woken up."""

    async def oversleep() -> None:
        await asyncio.sleep(0.5)
        await llm.generate("late", model="docstrings", prompt=prompt.value, max_tokens=2)

    left = asyncio.create_task(oversleep())

    async def undo() -> None:
        await asyncio.gather(left, return_exceptions=True)
        await llm.generate("undo", model="docstrings", prompt="Undo.", max_tokens=2)

    llm.compensate(undo)
    raise KeyError(prompt.value)
