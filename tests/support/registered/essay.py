from google.protobuf.wrappers_pb2 import StringValue

from pipelines import Pipeline, pipeline


@pipeline("essay", StringValue, StringValue)
async def essay(llm: Pipeline, topic: StringValue) -> StringValue:
    outline = await llm.generate("outline", model="docstrings", prompt=f"On {topic.value}:", max_tokens=30)

    async def write(part: Pipeline, heading: str) -> str:
        return (await part.generate("write", model="docstrings", prompt=heading, max_tokens=60)).text

    parts = await llm.map("parts", outline.text.split()[:3], write)
    return StringValue(value="\n\n".join(parts))
