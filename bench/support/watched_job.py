"""The jobs of the benchmarks: submitted, and watched from then on.

By the generated stub, not by durable_llm: its own cost would be in the figures, and a stream that it continued would be
one that broke, which ends a benchmark.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, Self

from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub

MODEL: Final = "docstrings"
"""The model that a stack serves by default."""
DEADLINE_SECONDS: Final = 900
"""Maximum duration of a job. A job that takes longer never ends."""
_ids: Final = itertools.count(1)


async def submit(stub: LlmServiceStub, *, tokens: int | None = None, **fields: Any) -> str:
    """Submit a job with these fields and a new request_id; return its workflow id. `tokens` sets max_tokens."""
    values = {"user_id": "bench", "request_id": f"{next(_ids)}", "model": MODEL, "prompt": "x", **fields}
    if tokens is not None:
        values["params"] = llm_pb2.SamplingParams(max_tokens=tokens)
    response = await stub.Submit(llm_pb2.SubmitRequest(job=llm_pb2.JobRequest(**values)))
    return response.workflow_id


def messages(
    stub: LlmServiceStub, workflow_id: str, seconds: float = DEADLINE_SECONDS
) -> AsyncIterator[llm_pb2.StreamStatusResponse]:
    """Stream a job's status and output from its start."""
    request = llm_pb2.StreamStatusRequest(workflow_id=workflow_id)
    return aiter(stub.StreamStatus(request, timeout=seconds))


async def finish(stub: LlmServiceStub, workflow_id: str) -> llm_pb2.StreamStatusResponse:
    """Watch a job to its end; return the last message. Raises RuntimeError unless the job succeeded."""
    last = llm_pb2.StreamStatusResponse()
    async for message in messages(stub, workflow_id):
        last = message
    if last.status.state != llm_pb2.JOB_STATE_SUCCEEDED:
        raise RuntimeError(f"{workflow_id} ended otherwise: {last.status}")
    return last


async def together(count: int, job: Callable[[], Awaitable[object]], at_once: int) -> None:
    """Run the job `count` times, `at_once` of them concurrently."""
    waiting = iter(range(count))

    async def client() -> None:
        for _ in waiting:
            await job()

    await asyncio.gather(*(client() for _ in range(at_once)))


class WatchedJob:
    """What the stream of one job has reported so far."""

    def __init__(self, stub: LlmServiceStub, workflow_id: str) -> None:
        self.workflow_id = workflow_id
        self.status = llm_pb2.JobStatus()
        self.output_bytes = 0
        self.ended = 0.0
        """Time by time.time() at which the stream ended; 0 before."""
        self._stub = stub
        self._changed = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def submit(cls, stub: LlmServiceStub, **job: Any) -> Self:
        """Submit a job with these fields and start watching it."""
        return cls(stub, await submit(stub, **job))

    def in_state(self, state: "llm_pb2.JobState.ValueType") -> bool:
        """Return whether the job is in the state."""
        return self.status.state == state

    def status_has(self, field: str) -> bool:
        """Return whether a field of the status is set."""
        return self.status.HasField(field)  # type: ignore[arg-type]  # the stub takes only literals

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds. Raises RuntimeError when the stream ends before."""
        async with asyncio.timeout(30):
            while not condition():
                if self._reading.done():
                    self._reading.result()
                    raise RuntimeError(f"{self.workflow_id} has ended: {self.status}")
                changed = self._changed
                await changed.wait()

    async def end(self) -> None:
        """Wait until the stream has ended."""
        async with asyncio.timeout(30):
            await self._reading

    async def _read(self) -> None:
        try:
            async for message in messages(self._stub, self.workflow_id, 300):
                if message.HasField("status"):
                    self.status = message.status
                self.output_bytes = message.next_offset
                self._wake()
            self.ended = time.time()
        finally:
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
