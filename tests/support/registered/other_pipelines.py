"""Pipelines of the tests: each shows one thing that pipelines can do."""

import asyncio
from datetime import timedelta

from google.protobuf.struct_pb2 import Struct
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from pipelines import Incomplete, Pipeline, StepFailed, pipeline


@pipeline("fan", Int32Value, Int32Value)
async def fan(llm: Pipeline, count: Int32Value) -> Int32Value:
    """Run so many long jobs at the same time."""

    async def write(part: Pipeline, number: int) -> int:
        return len((await part.generate("write", model="docstrings", prompt=f"Part {number}.", max_tokens=8000)).text)

    return Int32Value(value=sum(await llm.map("parts", range(count.value), write, limit=count.value)))


@pipeline("leaves", Int32Value, Int32Value)
async def leaves(llm: Pipeline, count: Int32Value) -> Int32Value:
    """Run so many jobs at the same time that generate a few tokens, and then wait for a cancel."""

    async def write(part: Pipeline, number: int) -> None:
        prompt = f"Part {number}. [[fault:hang@{number + 5}]]"
        await part.generate("write", model="docstrings", prompt=prompt, max_tokens=8000)

    await llm.map("parts", range(count.value), write, limit=count.value)
    return count


@pipeline("careful", StringValue, StringValue)
async def careful(llm: Pipeline, prompt: StringValue) -> StringValue:
    """Ask before generating. What was generated is undone if a later step fails."""
    if not await llm.approve("review/approve", f"May I generate from {prompt.value!r}?"):
        return StringValue(value="not approved")
    llm.note("review/approve", {"asked": True})
    first = await llm.generate("first", model="docstrings", prompt=prompt.value, max_tokens=4)

    async def undo(number: int) -> None:
        await llm.generate(f"undo/{number}", model="docstrings", prompt="Undo.", max_tokens=2)

    llm.compensate(undo, 1)
    llm.compensate(undo, 2)
    try:
        await llm.generate("optional", model="no-such-model", prompt="x")
    except StepFailed as error:
        reason = error.reason
    second = await llm.generate("second", model="docstrings", prompt="[[fault:failed@1]]", max_tokens=4)
    return StringValue(value=f"{first.text} {reason} {second.text}")


@pipeline("article", StringValue, StringValue)
async def article(llm: Pipeline, topic: StringValue) -> StringValue:
    """Write the parts of an article at the same time, and ask before it is published. Pictures show it."""
    outline = await llm.generate("outline", model="docstrings", prompt=f"On {topic.value}:", max_tokens=30)

    async def write(part: Pipeline, heading: str) -> str:
        text = (await part.generate("draft", model="docstrings", prompt=heading, max_tokens=60)).text
        return (await part.generate("shorten", model="docstrings", prompt=text, max_tokens=90)).text

    parts = await llm.map("parts", ["cause", "course", "end"], write, limit=2)
    if not await llm.approve("publish", f"The article on {topic.value} has {len(parts)} parts. Shall it be published?"):
        return StringValue(value="not published")
    return StringValue(value="\n\n".join([outline.text, *parts]))


@pipeline("spending", Int32Value, StringValue)
async def spending(llm: Pipeline, steps: Int32Value) -> StringValue:
    """Generate eight tokens in each of so many steps."""
    texts = [
        (await llm.generate(f"steps/{number}", model="docstrings", prompt="Say it.", max_tokens=8)).text
        for number in range(steps.value)
    ]
    return StringValue(value="".join(texts))


@pipeline("asking", StringValue, StringValue, resumes=True)
async def asking(llm: Pipeline, question: StringValue) -> StringValue:
    """Generate four tokens, and fail without a yes. Who submits it again is asked again."""
    text = (await llm.generate("text", model="docstrings", prompt=question.value, max_tokens=4)).text
    if not await llm.approve("ask", question.value):
        raise Incomplete(StringValue(value=text), "the answer was no")
    return StringValue(value=text)


@pipeline("foreign", Struct, StringValue)
async def foreign(llm: Pipeline, spec: Struct) -> StringValue:
    """Run an activity of a worker of somebody else."""
    seconds = {name: timedelta(seconds=spec[name]) for name in ("heartbeat_timeout",) if name in spec}
    text = await llm.step(
        "shout",
        "Shout",
        spec["text"],
        task_queue=spec["queue"],
        result_type=str,
        timeout=timedelta(minutes=20),
        **seconds,  # type: ignore[arg-type]
    )
    return StringValue(value=text)


@pipeline("broken", Struct, StringValue)
async def broken(llm: Pipeline, spec: Struct) -> StringValue:
    """Fail as code fails, with what somebody wrote."""
    raise KeyError(f"no such thing as {spec['text']}" if "text" in spec else "no such thing")


@pipeline("deep", StringValue, StringValue)
async def deep(llm: Pipeline, path: StringValue) -> StringValue:
    """Generate at a path."""
    return StringValue(value=(await llm.generate(path.value, model="docstrings", prompt="Deep.", max_tokens=4)).text)


@pipeline("restless", Int32Value, StringValue)
async def restless(llm: Pipeline, changes: Int32Value) -> StringValue:
    """Change what is noted of a step, so many times, every 50 ms."""
    await llm.generate("first", model="docstrings", prompt="Rest.", max_tokens=1)
    for number in range(changes.value):
        await asyncio.sleep(0.05)
        llm.note("first", {"change": number})
    return StringValue(value="done")


@pipeline("twice", StringValue, StringValue)
async def twice(llm: Pipeline, prompt: StringValue) -> StringValue:
    """Generate the same twice, each time from the cache if it has the answer."""
    steps = [
        await llm.generate(
            name, model="docstrings", prompt=prompt.value, max_tokens=8, seed=1, cache=timedelta(minutes=5)
        )
        for name in ("first", "second")
    ]
    return StringValue(value=" ".join(str(step.result.metadata.cached) for step in steps))
