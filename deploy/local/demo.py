"""Shows one real job, from Submit to its webhook, while it runs."""

import asyncio
import json
import uuid
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration

from deploy.local.client import first_model, gateway_client
from deploy.local.errors import DemoFailed
from deploy.local.hints import hints
from deploy.local.receiver import Receiver
from deploy.local.stack import Stack
from deploy.local.view import LiveView
from durable_llm import ApiError, AsyncJob, Output
from llm_pb import llm_pb2

_PROMPT: Final = "Return the "
_MAX_TOKENS: Final = 400
_DELIVERY_SECONDS: Final = 30
_SHOWN_CHARACTERS: Final = 100


async def demo(stack: Stack) -> None:
    """Submit a job and show its tokens, its outcome and the webhook. Raises DemoFailed when a step fails."""
    try:
        await _demo(stack)
    except ApiError as error:
        raise DemoFailed(f"The gateway answered {error.code.name}: {error}") from error


async def _demo(stack: Stack) -> None:
    async with Receiver(stack.ports.demo_webhook) as receiver, gateway_client(stack) as client:
        request = llm_pb2.JobRequest(
            user_id="demo",
            request_id=uuid.uuid4().hex[:8],
            model=await first_model(client),
            prompt=_PROMPT,
            params=llm_pb2.SamplingParams(max_tokens=_MAX_TOKENS, temperature=0.3),
            notify=[llm_pb2.NotifyTarget(webhook=llm_pb2.Webhook(url=receiver.url))],
        )
        _heading(f"Submit: model {request.model}, prompt {request.prompt!r}, at most {_MAX_TOKENS} tokens")
        job = await client.submit(request)
        print(f"  {job.workflow_id} is durable from here on")

        _heading("StreamStatus: the tokens as they are generated")
        streamed = await _watch(job)
        ended = await job.get()
        if ended.result.output != streamed:
            raise DemoFailed("The streamed text and the result differ.")

        _heading("How it ended")
        print(_summary(ended))
        if ended.status.state != llm_pb2.JOB_STATE_SUCCEEDED:
            raise DemoFailed(
                f"The job ended as {llm_pb2.JobState.Name(ended.status.state)}: {ended.status.error.message}"
            )

        _heading(f"The webhook that {receiver.url} received")
        try:
            async with asyncio.timeout(_DELIVERY_SECONDS):
                event = await receiver.events.get()
        except TimeoutError as error:
            raise DemoFailed(f"No webhook came within {_DELIVERY_SECONDS} s.") from error
        for line in json.dumps(_shortened(event), indent=2, ensure_ascii=False).splitlines():
            print(f"  {line}")

    _heading("Next steps: `make up` starts the same stack again, with this job, and keeps it running")
    print(hints(stack, request.model))
    print(f"  This job    {stack.web_ui}/namespaces/default/workflows/{job.workflow_id}\n")
    print("The demo stops the stack now. The addresses above answer while `make up` runs in another terminal.\n")


async def _watch(job: AsyncJob) -> str:
    """Show the job until it has ended. Return the text that its deltas result in."""
    view = LiveView()
    output = Output()
    status = llm_pb2.JobStatus()
    async for message in job.watch():
        if message.HasField("status"):
            status = message.status
        if message.HasField("delta"):
            output.add(message.delta)
        state = llm_pb2.JobState.Name(status.state).removeprefix("JOB_STATE_")
        view.update(message.delta.text, status.progress.percent, f"{state} {status.progress.stage} {len(output)} bytes")
    view.close()
    return output.text


def _heading(words: str) -> None:
    print(f"\n== {words}")


def _summary(ended: llm_pb2.GetStatusResponse) -> str:
    """Return the main fields of the final status and of the result's metadata, one a line."""
    status, metadata = ended.status, ended.result.metadata
    lines = {
        "state": llm_pb2.JobState.Name(status.state),
        "error": status.error.message,
        "finish reason": llm_pb2.FinishReason.Name(ended.result.finish_reason),
        "tokens": f"{metadata.prompt_tokens} of the prompt, {metadata.output_tokens} of output",
        "waited": f"{_seconds(metadata.queue_time)} in the queue, {_seconds(metadata.time_to_first_token)} for a token",
        "took": f"{_seconds(metadata.latency)} in all, {metadata.attempts} attempt(s)",
        "ran on": f"{metadata.engine}, {metadata.gpu.name}, worker {metadata.worker}",
    }
    return "\n".join(f"  {name:<14} {value}" for name, value in lines.items() if value)


def _seconds(duration: Duration) -> str:
    return f"{duration.ToTimedelta().total_seconds():.3f} s"


def _shortened(value: Any) -> Any:
    """Return JSON with its long texts shortened for people."""
    if isinstance(value, dict):
        return {name: _shortened(item) for name, item in value.items()}
    return f"{value[:_SHOWN_CHARACTERS]}..." if isinstance(value, str) and len(value) > _SHOWN_CHARACTERS else value
