"""Pipelines whose code does what no code should do."""

import asyncio
import time

from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from pipelines import Pipeline, StepFailed, pipeline


class _Wordless(Exception):
    def __str__(self) -> str:
        raise KeyError("no words")


_RAISED: dict[str, BaseException] = {
    "exit": SystemExit("scripted"),
    "interrupt": KeyboardInterrupt("scripted"),
    "cancelled": asyncio.CancelledError("scripted"),
    "generator": GeneratorExit("scripted"),
    "surrogate": ValueError("half \ud83d a pair"),
    "wordless": _Wordless(),
    "long": ValueError("long " * 1_000_000),
}


@pipeline("raising", StringValue, StringValue)
async def raising(llm: Pipeline, what: StringValue) -> StringValue:
    """Raise an error, by its name, from the code itself or from a call of map()."""
    where, _, name = what.value.partition(" ")
    if where == "code":
        raise _RAISED[name]

    async def fail(part: Pipeline, item: str) -> None:
        raise _RAISED[item]

    await llm.map("parts", [name], fail)
    return what


@pipeline("wide", Int32Value, Int32Value)
async def wide(llm: Pipeline, count: Int32Value) -> Int32Value:
    """Begin so many steps at the same time, which are refused."""

    async def ask(part: Pipeline, _: int) -> int:
        try:
            await part.generate("ask", model="no-such-model", prompt="x")
        except StepFailed:
            return 1
        return 0

    return Int32Value(value=sum(await llm.map("parts", range(count.value), ask, limit=count.value)))


@pipeline("leaving", StringValue, StringValue)
async def leaving(llm: Pipeline, what: StringValue) -> StringValue:
    """Fail, or return, while a step of another task waits for its worker."""
    task = asyncio.create_task(llm.generate("left", model="idle", prompt="Nobody waits for it."))
    await llm.generate("first", model="docstrings", prompt="x", max_tokens=1)
    if what.value == "fail":
        raise KeyError("scripted")
    return StringValue(value=str(task.done()))


@pipeline("stubborn", StringValue, StringValue)
async def stubborn(llm: Pipeline, what: StringValue) -> StringValue:
    """Go on whatever comes: after a cancel, after the end of the time, and with more steps than there may be."""
    try:
        await llm.approve("ask", "Shall I stop?")
    except (asyncio.CancelledError, StepFailed):
        await llm.approve("again", "Really?")
    number = 0
    while True:
        number += 1
        try:
            await llm.generate(f"try/{number}", model="no-such-model", prompt="x", timeout=None)
        except StepFailed:
            if what.value == "once":
                return what


@pipeline("dozing", StringValue, StringValue)
async def dozing(llm: Pipeline, what: StringValue) -> StringValue:
    """Block for longer than the SDK lets a workflow task take, as code does on a busy machine."""
    await llm.generate("first", model="docstrings", prompt="x", max_tokens=1)
    time.sleep(3)  # noqa: ASYNC251
    return what


@pipeline("partial", Int32Value, StringValue)
async def partial(llm: Pipeline, limit: Int32Value) -> StringValue:
    """Keep what succeeds of four parts: the second is refused, and the code of the third fails."""

    async def write(part: Pipeline, model: str) -> str:
        if not model:
            raise KeyError("scripted")
        await part.generate("write", model=model, prompt="x", max_tokens=1)
        return "written"

    models = ["docstrings", "no-such-model", "", "docstrings"]
    made = await llm.map("parts", models, write, limit=limit.value, return_exceptions=True)
    return StringValue(value=", ".join(part if isinstance(part, str) else type(part).__name__ for part in made))
