"""Pipelines of the tests: large outputs, files, batches, and pipelines within pipelines."""

import asyncio
import json

from google.protobuf.struct_pb2 import ListValue, Struct
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from jobs.pipelines import MAX_TEXT_BYTES
from llm_pb import batch_pb2, common_pb2, llm_pb2, pipeline_pb2
from pipelines import Incomplete, Pipeline, StepFailed, pipeline

_WIDE = 20
"""Tokens of [[wide]], of 4 KiB each: more than 64 KiB of text."""


@pipeline("large", Int32Value, StringValue)
async def large(llm: Pipeline, count: Int32Value) -> StringValue:
    """Generate large outputs, read one, and pass one on."""

    async def write(part: Pipeline, number: int) -> common_pb2.FileRef | None:
        return (await part.generate("write", model="docstrings", prompt=f"[[wide]] {number}", max_tokens=_WIDE)).file

    files = await llm.map("parts", range(count.value), write)
    draft = await llm.generate("draft", model="docstrings", prompt="[[wide]]", max_tokens=_WIDE)
    reasons = []
    try:
        draft.text  # noqa: B018  # it raises
    except StepFailed as error:
        reasons.append(error.reason)
    try:
        await llm.generate("next", model="docstrings", prompt_file=draft.file, max_tokens=4)
    except StepFailed as error:
        reasons.append(error.reason)
    text = await draft.read()
    return StringValue(value=f"{len(files)} {len(text.encode())} {' '.join(reasons)}")


@pipeline("librarian", common_pb2.FileRef, StringValue)
async def librarian(llm: Pipeline, ref: common_pb2.FileRef) -> StringValue:
    """Read a file, write another one, and generate from it."""
    text = await llm.files.get(ref)
    written = await llm.files.put("notes", f"{text} and more")
    again = await llm.files.get(written)
    generated = await llm.generate("continue", model="docstrings", prompt_file=written, max_tokens=4)
    return StringValue(value=f"{again}: {generated.text}")


@pipeline("asked-reader", common_pb2.FileRef, StringValue)
async def asked_reader(llm: Pipeline, ref: common_pb2.FileRef) -> StringValue:
    """Ask, and then generate from a file."""
    await llm.approve("ask", "Now?")
    return StringValue(value=(await llm.generate("read", model="docstrings", prompt_file=ref, max_tokens=4)).text)


@pipeline("batching", Int32Value, batch_pb2.BatchStatus)
async def batching(llm: Pipeline, count: Int32Value) -> batch_pb2.BatchStatus:
    """Run a batch of so many lines."""
    lines = [
        llm_pb2.JobRequest(request_id=f"line-{number}", model="docstrings", prompt=f"Line {number}.")
        for number in range(count.value)
    ]
    return await llm.batch("lines", lines, defaults=llm_pb2.JobRequest(params=llm_pb2.SamplingParams(max_tokens=4)))


@pipeline("batching-again", Int32Value, batch_pb2.BatchStatus, resumes=True)
async def batching_again(llm: Pipeline, count: Int32Value) -> batch_pb2.BatchStatus:
    """Run a batch of so many lines, and fail without a yes. Who submits it again is asked again."""
    status = await batching(llm, count)
    if not await llm.approve("ask", "Is it good?"):
        raise Incomplete(status, "the answer was no")
    return status  # type: ignore[no-any-return]


@pipeline("watching-again", common_pb2.FileRef, batch_pb2.BatchStatus, resumes=True)
async def watching_again(llm: Pipeline, lines: common_pb2.FileRef) -> batch_pb2.BatchStatus:
    """Run a batch, and fail without a yes while it runs. Who submits it again is asked again."""
    running = asyncio.ensure_future(llm.batch("lines", lines))
    if not await llm.approve("ask", "Shall it run to its end?"):
        raise Incomplete(batch_pb2.BatchStatus(), "the answer was no")
    return await running


@pipeline("nesting-again", StringValue, StringValue, resumes=True)
async def nesting_again(llm: Pipeline, topic: StringValue) -> StringValue:
    """Run a pipeline within this one, and fail without a yes. Who submits it again is asked again."""
    text: StringValue = await llm.pipeline("inner", "essay", topic)
    if not await llm.approve("ask", "Is it good?"):
        raise Incomplete(text, "the answer was no")
    return text


@pipeline("forming", Int32Value, Int32Value, resumes=True)
async def forming(llm: Pipeline, size: Int32Value) -> Int32Value:
    """Generate JSON with a text of so many bytes, and fail without a yes. Who submits it again is asked again."""
    schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    prompt = f"Write it.[[when Write: {json.dumps({'text': 'x' * size.value})}]]"
    made = await llm.generate("form", model="docstrings", prompt=prompt, schema=schema, max_tokens=70_000)
    length = Int32Value(value=len(made.json["text"]))
    if not await llm.approve("ask", "Is it good?"):
        raise Incomplete(length, "the answer was no")
    return length


@pipeline("hasty", StringValue, StringValue)
async def hasty(llm: Pipeline, topic: StringValue) -> StringValue:
    """Fail in one part while the pipeline of another is just being started. That part would go on with a job."""

    async def write(part: Pipeline, code: str) -> None:
        if not code:
            raise KeyError("scripted")
        try:
            await part.pipeline("write", code, topic)
        except StepFailed:
            await part.generate("instead", model="docstrings", prompt=topic.value, max_tokens=2)

    try:
        await llm.map("parts", ["essay", ""], write)
    except KeyError:
        return StringValue(value="failed")
    return topic


@pipeline("lingering", Int32Value, batch_pb2.BatchStatus)
async def lingering(llm: Pipeline, count: Int32Value) -> batch_pb2.BatchStatus:
    """Run a batch of so many short lines and a long one, and ask whether it is whole."""
    lines = [
        llm_pb2.JobRequest(request_id=f"line-{number}", prompt=f"Line {number}.", params={"max_tokens": tokens})
        for number, tokens in enumerate([*[4] * count.value, 8000])
    ]
    status = await llm.batch("lines", lines, defaults=llm_pb2.JobRequest(model="docstrings"))
    # A batch may end with its window, a moment before its pipeline.
    await llm.approve("whole", "Is it whole?")
    return status


@pipeline("nesting", Struct, StringValue)
async def nesting(llm: Pipeline, spec: Struct) -> StringValue:
    """Run pipelines within this one, of which one may fail."""

    async def run(part: Pipeline, topic: str) -> str:
        try:
            written: StringValue = await part.pipeline("write", spec["code"], StringValue(value=topic))
        except StepFailed as error:
            return error.reason
        return written.value

    return StringValue(value="|".join(await llm.map("parts", list(spec["topics"]), run)))


@pipeline("part-of-many", ListValue, ListValue)
async def part_of_many(llm: Pipeline, topics: ListValue) -> ListValue:
    """Write a part on each topic."""

    async def write(part: Pipeline, topic: str) -> str:
        return (await part.generate("write", model="docstrings", prompt=topic, max_tokens=2)).text

    parts = await llm.map("parts", [*topics], write, limit=50, return_exceptions=True)
    texts = ListValue()
    texts.extend(None if isinstance(part, StepFailed) else part for part in parts)
    return texts


@pipeline("many", Struct, Int32Value)
async def many(llm: Pipeline, spec: Struct) -> Int32Value:
    """Write so many parts, in groups of so many, as docs/pipelines.md shows."""
    count, size = int(spec["count"]), int(spec["size"])

    async def run(group: Pipeline, first: int) -> int:
        some = ListValue()
        some.extend(f"Part {number}." for number in range(first, min(first + size, count)))
        return sum(part is not None for part in await group.pipeline("parts", "part-of-many", some))

    return Int32Value(value=sum(await llm.map("groups", range(0, count, size), run, limit=4)))


@pipeline("refining", StringValue, pipeline_pb2.RefineResult)
async def refining(llm: Pipeline, topic: StringValue) -> pipeline_pb2.RefineResult:
    """Run a refinement that leaves everything but its topic to the operator."""
    refined: pipeline_pb2.RefineResult = await llm.pipeline(
        "article", "refine", pipeline_pb2.RefineSpec(topic=topic.value)
    )
    return refined


@pipeline("careless", StringValue, StringValue)
async def careless(llm: Pipeline, prompt: StringValue) -> StringValue:
    """Generate, and fail as code fails."""
    await llm.generate("write", model="docstrings", prompt=prompt.value, max_tokens=4)
    raise RuntimeError("careless")


@pipeline("lasting", StringValue, StringValue)
async def lasting(llm: Pipeline, prompt: StringValue) -> StringValue:
    """Run a long job."""
    return StringValue(
        value=(await llm.generate("write", model="docstrings", prompt=prompt.value, max_tokens=8000)).text
    )


@pipeline("verbose", StringValue, StringValue)
async def verbose(llm: Pipeline, text: StringValue) -> StringValue:
    """Write a large text again and again."""

    async def undo() -> None:
        await llm.generate("undo", model="docstrings", prompt="Undo.", max_tokens=2)

    llm.compensate(undo)

    async def write(part: Pipeline, _: int) -> None:
        await part.files.put("text", text.value * MAX_TEXT_BYTES)

    await llm.map("texts", range(100), write, limit=4)
    return StringValue()
