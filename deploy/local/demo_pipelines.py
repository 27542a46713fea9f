"""Shows a pipeline that refines an article, on the model that comes along, with its tree as it grows."""

import uuid
from typing import Final

from deploy.local.client import first_model, gateway_client
from deploy.local.errors import DemoFailed
from deploy.local.stack import Stack
from durable_llm import ApiError, AsyncClient
from llm_pb import llm_pb2, pipeline_pb2

_ROUNDS: Final = 2
_STEP_SECONDS: Final = 600
"""Maximum time of each step: the whole demo may run on one core."""
_MARKS: Final = {
    pipeline_pb2.STEP_STATE_RUNNING: "…",
    pipeline_pb2.STEP_STATE_NEEDS_ANSWER: "?",
    pipeline_pb2.STEP_STATE_SUCCEEDED: "✓",
    pipeline_pb2.STEP_STATE_FAILED: "✗",
    pipeline_pb2.STEP_STATE_CANCELLED: "-",
}


async def demo_pipelines(stack: Stack) -> None:
    """Run `refine` and show its tree and its result. Raises DemoFailed when it does not succeed."""
    try:
        async with gateway_client(stack) as client:
            await _refine(client)
    except ApiError as error:
        raise DemoFailed(f"The gateway answered {error.code.name}: {error}") from error


async def _refine(client: AsyncClient) -> None:
    model = await first_model(client)
    spec = pipeline_pb2.RefineSpec(topic="the length of a list", models={"write": model}, max_rounds=_ROUNDS)
    for name in ("write", "critique", "check", "edit"):
        spec.step_timeouts[name].seconds = _STEP_SECONDS
    print(f"\n== refine: write, criticise as JSON, check, edit; at most {_ROUNDS} rounds of the model {model}")
    request = pipeline_pb2.PipelineRequest(user_id="demo", request_id=uuid.uuid4().hex[:8], refine=spec)
    id_ = (await client.pipelines.submit(request)).pipeline_id
    print(f"  {id_} is durable from here on\n")
    shown: dict[str, int] = {}
    async for message in client.pipelines.watch(id_):
        for step in message.steps:
            if shown.get(step.path) != step.state:
                shown[step.path] = step.state
                print(_line(step), flush=True)
    ended = await client.pipelines.get(id_)
    if ended.status.state != llm_pb2.JOB_STATE_SUCCEEDED:
        raise DemoFailed(
            f"The pipeline ended as {llm_pb2.JobState.Name(ended.status.state)}: {ended.status.root.error.message}"
        )
    result = pipeline_pb2.RefineResult()
    ended.result.value.Unpack(result)
    print(f"\n== The article: score {result.score:g} of 10 in round {result.best_round}")
    print("   The small model writes JSON of the right form, and cannot judge: its score means nothing.\n")
    print("\n".join(f"  {line}" for line in result.article.splitlines()))
    usage = ended.status.root.usage
    print(f"\n  {ended.status.root.counts.succeeded} steps, {usage.output_tokens} tokens. Each step is a job:")
    print("\n".join(f"  {step.workflow_id}" for step in ended.steps if step.workflow_id))
    print("\nThe demo stops the stack now. `make up` keeps it: durable-llm pipeline run refine …\n")


def _line(step: pipeline_pb2.StepStatus) -> str:
    *above, name = step.path.split("/")
    tokens = f"{step.usage.output_tokens} tokens" if step.HasField("end_time") and step.workflow_id else ""
    indented = f"{'  ' * len(above)}{_MARKS.get(step.state, ' ')} {name}"
    return f"  {indented:<26} {step.summary_json or tokens}"
