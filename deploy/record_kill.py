"""`make record`: kills a GPU worker in mid-sentence with SIGKILL, and writes what a watcher sees into the README.

    python -m deploy.record_kill            # prints the recording
    python -m deploy.record_kill --readme   # writes it into the README

The script runs a real stack in a temporary folder: Temporal, NATS, a gateway, a notifier and two GPU workers with the
small model. The heartbeat timeout is 3 s instead of 30 s, so that the recording has no long silence.
"""

import asyncio
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Final

from deploy.local.client import gateway_client
from deploy.local.process import Process
from deploy.local.settings import StackSettings
from deploy.local.stack import Stack
from durable_llm import AsyncClient, AsyncJob, Output
from llm_pb import llm_pb2

README: Final = Path(__file__).parents[1] / "README.md"
BEGIN: Final = "<!-- recording: written by `make record` -->\n"
END: Final = "<!-- recording end -->\n"
_ONLY: Final = ("temporal", "nats", "gateway", "gpu-worker", "notifier")
_ENVIRONMENT: Final = {
    "gateway": {"GATEWAY_HEARTBEAT_TIMEOUT": "PT3S", "GATEWAY_RETRY_INTERVAL": "PT1S"},
    # With one thread each, two workers share the processors of a small machine.
    "gpu-worker": {"GPU_WORKER_ENGINE_OPTIONS": '{"threads": 1}'},
}
_PROMPT: Final = "Return the "
_MAX_TOKENS: Final = 300
_KILL_AT: Final = 250
"""Bytes of output after which the script kills the worker."""
_WIDTH: Final = 100


class Recording:
    """The text of the model, and events with their time in seconds since the start of the recording."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._text = ""
        self._since = time.monotonic()

    def text(self, piece: str) -> None:
        """Add a piece of the model's text."""
        self._text += piece

    def event(self, words: str) -> None:
        """Add a line of its own."""
        self._end_text()
        self._lines.append(f"{time.monotonic() - self._since:5.1f} s  {words}")

    def markdown(self) -> str:
        """Return the recording as a block of Markdown."""
        self._end_text()
        return "```text\n" + "\n".join(self._lines) + "\n```\n"

    def _end_text(self) -> None:
        for line in self._text.splitlines():
            self._lines += textwrap.wrap(line, _WIDTH, initial_indent="    ", subsequent_indent="    ") or [""]
        self._text = ""


async def record() -> Recording:
    """Run a job undisturbed, then the same job with a kill.

    Raises AssertionError when the two outputs differ, and when the job ended before the kill.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = StackSettings.with_free_ports(state_dir=Path(folder) / "stack", gpu_workers=2)
        async with Stack(settings, only=_ONLY, environment=_ENVIRONMENT) as stack, gateway_client(stack) as client:
            expected = await (await _submit(client, "undisturbed")).result()
            recording = Recording()
            streamed, result = await _watch_and_kill(stack, client, recording)
            metadata = result.metadata
            assert streamed == result.output == expected.output
            assert metadata.rewinds == 0
            assert metadata.attempts > 1, "the job ended before its worker was killed"
            recording.event(f"SUCCEEDED: {metadata.output_tokens} tokens, {metadata.attempts} attempts, no rewind.")
            recording.event("The text is byte for byte that of the same job undisturbed.")
            return recording


async def _submit(client: AsyncClient, request_id: str) -> AsyncJob:
    params = {"temperature": 0.7, "seed": 7, "max_tokens": _MAX_TOKENS, "min_tokens": _MAX_TOKENS}
    return await client.submit(
        user_id="alice", request_id=request_id, model="docstrings", prompt=_PROMPT, params=params
    )


async def _watch_and_kill(stack: Stack, client: AsyncClient, recording: Recording) -> tuple[str, llm_pb2.JobResult]:
    """Return the text that the deltas result in, and the result."""
    job = await _submit(client, "killed")
    recording.event(f"Submit: continue {_PROMPT!r}. {job.workflow_id} is durable.")
    output, worker, killed, attempt = Output(), "", False, 0
    async for message in job.watch():
        status = message.status
        worker = status.progress.worker or worker
        if status.state == llm_pb2.JOB_STATE_QUEUED and killed and status.HasField("error"):
            recording.event(f"QUEUED: {status.error.message}")
        if status.state == llm_pb2.JOB_STATE_RUNNING and status.attempt > attempt:
            attempt = status.attempt
            recording.event(f"RUNNING, attempt {attempt}")
        if message.HasField("delta"):
            output.add(message.delta)
            recording.text(message.delta.text)
        if len(output) >= _KILL_AT and worker and not killed:
            killed = True
            process = _process_of(stack, worker)
            recording.event(f"$ kill -9 {process.pid}    # the GPU worker, after {len(output)} bytes")
            await process.kill()
    return output.text, await job.result()


def _process_of(stack: Stack, worker: str) -> Process:
    """Return the process of a worker, whose name ends in its process id."""
    (process,) = [one for one in stack.processes.values() if one.pid == int(worker.rpartition("-")[2])]
    return process


def with_recording(readme: str, recording: str) -> str:
    """Return the README with its recording replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{recording}\n{END}{after}"


if __name__ == "__main__":
    made = asyncio.run(record()).markdown()
    if "--readme" in sys.argv:
        README.write_text(with_recording(README.read_text(), made))
    else:
        print(made)
