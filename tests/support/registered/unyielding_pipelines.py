"""Pipelines of the tests: code that makes it hard to stop or to undo a pipeline."""

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
