"""Shows a training: the bundled model learns the pages of docs/, and a job runs on what it has become."""

import asyncio
import json
import uuid
from pathlib import Path
from typing import Final

from deploy.local.client import gateway_client
from deploy.local.errors import DemoFailed
from deploy.local.stack import Stack
from durable_llm import ApiError, AsyncClient
from llm_pb import common_pb2, llm_pb2, pipeline_pb2
from services.gateway.models.settings import EMBEDDED_MODEL

KINDS: Final = ("temporal", "nats", "gateway", "gpu-worker", "trainer")
"""The processes that the demo needs."""
_MODEL: Final = "docs@latest"
_QUEUE: Final = "llm-gpu-activities.docs"
_MODELS: Final = (EMBEDDED_MODEL, EMBEDDED_MODEL.model_copy(update={"name": _MODEL, "queue": _QUEUE}))
ENVIRONMENT: Final = {"gateway": {"GATEWAY_MODELS": json.dumps([one.model_dump(mode="json") for one in _MODELS])}}
"""The settings of the gateway: it has the model that is yet to be trained."""
_DOCS: Final = Path(__file__).parents[2] / "docs"
_STEPS: Final = 160
_MIN_CHARACTERS: Final = 60
"""Paragraphs that are shorter teach little."""
_PROMPT: Final = "A pipeline is "
_MAX_TOKENS: Final = 80


async def demo_training(stack: Stack) -> None:
    """Train a model, start a worker for it, run the same job on both. Raises DemoFailed when a step fails."""
    try:
        async with gateway_client(stack) as client:
            await _demo(stack, client)
    except ApiError as error:
        raise DemoFailed(f"The gateway answered {error.code.name}: {error}") from error


async def _demo(stack: Stack, client: AsyncClient) -> None:
    texts = [text for path in sorted(_DOCS.glob("*.md")) for text in path.read_text().split("\n\n")]
    lines = [json.dumps({"text": text}) for text in texts if len(text) >= _MIN_CHARACTERS]
    _heading(f"UploadFile: a data set of {len(lines)} paragraphs of docs/")
    key = uuid.uuid4().hex[:8]
    file = await client.files.upload(
        "\n".join(lines).encode(), user_id="demo", request_id=key, media_type="application/jsonl"
    )
    print(f"  {file.ref.file_id}")

    _heading(f"SubmitPipeline: {_STEPS} steps on {EMBEDDED_MODEL.name}, on a trainer of its own")
    result = await _train(client, key, file.ref)
    print(f"  loss on held-out paragraphs: {result.base_loss:.3f} before, {result.loss:.3f} after")
    if not result.version:
        raise DemoFailed("The model has not become better.")
    print(f"  {result.model}, sha256 {result.sha256.hex()[:16]}…")

    _heading(f"A worker that serves {_MODEL} loads it from the store")
    worker = stack.add("gpu-worker", {"GPU_WORKER_MODEL": _MODEL, "GPU_WORKER_TASK_QUEUE": _QUEUE})
    await worker.start()
    await worker.wait_ready()
    for model in (EMBEDDED_MODEL.name, _MODEL):
        _heading(f"{model} goes on after {_PROMPT!r}")
        print(f"  {await _answer(client, model)!r}")
    print()


async def _train(client: AsyncClient, key: str, dataset: common_pb2.FileRef) -> pipeline_pb2.TrainingResult:
    """Run the training and show its steps."""
    spec = pipeline_pb2.TrainingSpec(
        base_model=EMBEDDED_MODEL.name,
        model=_MODEL.partition("@")[0],
        dataset=dataset,
        steps=_STEPS,
        learning_rate=1e-3,
        step_tokens=2048,
    )
    started = await client.pipelines.submit(user_id="demo", request_id=f"train-{key}", training=spec)
    print(f"  {started.pipeline_id} is durable from here on")
    shown: dict[str, int] = {}
    async for message in client.pipelines.watch(started.pipeline_id):
        for step in message.steps:
            if shown.get(step.path) != step.state:
                shown[step.path] = step.state
                state = pipeline_pb2.StepState.Name(step.state).removeprefix("STEP_STATE_")
                print(f"  {step.path:<12} {state:<10} {step.summary_json}", flush=True)
    found = await client.pipelines.get(started.pipeline_id)
    result = pipeline_pb2.TrainingResult()
    if not found.result.value.Unpack(result):
        raise DemoFailed(f"The training ended without a result: {found.status.root.error.message}")
    return result


async def _answer(client: AsyncClient, model: str) -> str:
    job = await client.submit(
        llm_pb2.JobRequest(
            user_id="demo",
            request_id=uuid.uuid4().hex[:8],
            model=model,
            prompt=_PROMPT,
            params=llm_pb2.SamplingParams(max_tokens=_MAX_TOKENS, temperature=0.3),
        )
    )
    async with asyncio.timeout(60):
        return (await job.result()).output


def _heading(words: str) -> None:
    print(f"\n== {words}")
