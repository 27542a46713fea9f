"""The pipelines of the benchmarks, as an operator installs them."""

from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from bench.peers.three_step_names import MAX_TOKENS, MODEL, STEPS, prompt_of
from pipelines import Pipeline, pipeline


@pipeline("steps", Int32Value, Int32Value)
async def steps(llm: Pipeline, count: Int32Value) -> Int32Value:
    """Run so many jobs one after another, of one token each."""
    for number in range(count.value):
        await llm.generate(f"steps/{number}", model="docstrings", prompt="Step.", max_tokens=1)
    return count


@pipeline("fan", Int32Value, Int32Value)
async def fan(llm: Pipeline, count: Int32Value) -> Int32Value:
    """Run so many jobs of one token each at the same time."""

    await _generate_at_once(llm, count.value, max_tokens=1)
    return count


@pipeline("endless", Int32Value, Int32Value)
async def endless(llm: Pipeline, count: Int32Value) -> Int32Value:
    """Run so many jobs at the same time that do not end on their own while they are measured."""

    await _generate_at_once(llm, count.value, max_tokens=8000)
    return count


async def _generate_at_once(llm: Pipeline, count: int, max_tokens: int) -> None:
    async def one(part: Pipeline, number: int) -> None:
        await part.generate("write", model="docstrings", prompt="Step.", max_tokens=max_tokens)

    await llm.map("parts", range(count), one, limit=count)


@pipeline("three", StringValue, StringValue)
async def three(llm: Pipeline, run: StringValue) -> StringValue:
    """Run the program of bench.three_steps."""
    text = run.value
    for step in STEPS:
        message = {"role": "user", "content": prompt_of(run.value, step, text)}
        text = (await llm.generate(step, model=MODEL, messages=[message], max_tokens=MAX_TOKENS)).text
    return StringValue(value=text)
