"""Whether a batch is as fast as vLLM's own `vllm run-batch` on the same lines, and what its order is worth.

Both read the same file of chat completions, greedy, with the same engine options, in separate processes. Only one of
them works at a time. The suite's time is from the upload of the file to the end of the batch, which has written its
output by then. That of `peer_run_batch` is from reading the file to its written output; its engine has started before.

`--layers SmolLM2-135M` gives the model the layers of that one, as in bench.throughput.

- `different prompts`: no two lines have much in common.
- `shared prompts`: groups of lines begin with the same long text, and the lines of a group are far from one another.
  The engine's cache holds a part of these texts. The suite runs the lines of a group together, `peer_run_batch` in the
  order of the file. `limit_sorted` is the peer on a file that has the groups together already.

Needs vLLM: run it in the environment of `make test-vllm` (CPU) or of `make test-gpu`.

    python -m bench.batch_throughput
"""

import inspect
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

from bench.peers import vllm_peers
from bench.peers.vllm_peers import RunBatch, with_layers, worker_environment
from bench.support import script
from bench.support.report import Report
from bench.support.stacks import new_stack
from durable_llm import AsyncClient
from llm_pb import batch_pb2


@dataclass(frozen=True)
class Sizes:
    """The options of the command line. `lines` and `tokens` are of different prompts, `groups`, `members` of shared.

    No groups: no shared prompts.
    """

    rounds: int = 7
    lines: int = 2048
    tokens: int = 64
    groups: int = 128
    members: int = 8
    max_concurrent: int = 64
    model_path: str = "models/docstrings"
    cache_mb: int = 256
    layers: str = "its own"


MODEL: Final = "docstrings"
DIFFERENT: Final = "different prompts"
SHARED: Final = "shared prompts"
SHARED_CHARACTERS: Final = 3000
SHARED_TOKENS: Final = 8
Way = Callable[[bytes], Awaitable[dict[str, float]]]
"""Runs a file of lines; returns the figures."""
_numbers = count(1)


async def measure(sizes: Sizes) -> Report:
    """Return the report."""
    report = Report(
        "Is a batch as fast as vLLM's own, and what is its order worth?",
        f"Output tokens a second. vLLM's {'CPU' if vllm_peers.on_cpu() else 'GPU'} build, model {sizes.model_path},"
        f" {sizes.max_concurrent} at a time. Different prompts: {sizes.lines} lines of {sizes.tokens} tokens."
        f" Shared ones: {sizes.groups} groups of {sizes.members} lines with {SHARED_CHARACTERS} characters in common,"
        f" {SHARED_TOKENS} tokens each. Without the start of engines.",
    )
    different, shared = different_lines(sizes), shared_lines(sizes)
    far = [shared[number % sizes.groups * sizes.members + number // sizes.groups] for number in range(len(shared))]
    async with all_ways(sizes) as (suite, peer):
        for way in (suite, peer):
            await way(to_file(different))
        for number in range(sizes.rounds):
            runs: list[tuple[str, str, Way, Sequence[dict[str, Any]]]] = [
                (DIFFERENT, "suite", suite, different),
                (DIFFERENT, "peer_run_batch", peer, different),
            ]
            if shared:
                runs += [
                    (SHARED, "suite", suite, far),
                    (SHARED, "peer_run_batch", peer, far),
                    (SHARED, "limit_sorted", peer, shared),
                ]
            # Nobody always has the caches that another one has left.
            for case, who, way, lines in runs[:: -1 if number % 2 else 1]:
                report.add(case, who, await way(to_file(lines)))
    figure = "tokens_per_second"
    report.ratio(DIFFERENT, figure, "peer_run_batch", at_least=0.95)
    if shared:
        report.ratio(SHARED, figure, "peer_run_batch", at_least=1)
        report.ratio(SHARED, figure, "limit_sorted")
    return report


def different_lines(sizes: Sizes) -> list[dict[str, Any]]:
    """Return lines whose prompts differ from their first word on."""
    texts = _texts()
    return [_line(f"{number}. {texts[number % len(texts)][:200]}", sizes.tokens) for number in range(sizes.lines)]


def shared_lines(sizes: Sizes) -> list[dict[str, Any]]:
    """Return the lines of one group after the other."""
    chance, words = random.Random(7), " ".join(_texts()).split()  # no secret
    prefixes = [" ".join(chance.sample(words, len(words) // 2))[:SHARED_CHARACTERS] for _ in range(sizes.groups)]
    return [_line(f"{prefix} {member}", SHARED_TOKENS) for prefix in prefixes for member in range(sizes.members)]


def to_file(lines: Sequence[dict[str, Any]]) -> bytes:
    """Return a file of lines, which no earlier run has had: the suite would find its batch."""
    run = next(_numbers)
    numbered = ({"custom_id": f"{run}-{number}", **line} for number, line in enumerate(lines))
    return b"".join(json.dumps(line).encode() + b"\n" for line in numbered)


@asynccontextmanager
async def all_ways(sizes: Sizes) -> AsyncIterator[tuple[Way, Way]]:
    """Run the stack and the peer, and yield the two ways."""
    extra = with_layers(sizes.layers) | {"kv_cache_memory_bytes": sizes.cache_mb << 20}
    async with AsyncExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        worker = worker_environment(sizes.model_path, sizes.max_concurrent, extra)
        stack = opened.enter_context(new_stack({"gpu-worker": worker}, engine="vllm"))
        await opened.enter_async_context(stack)
        client = await opened.enter_async_context(AsyncClient(stack.address("gateway")))
        peer = await opened.enter_async_context(RunBatch.running(sizes.model_path, MODEL, sizes.max_concurrent, extra))
        yield partial(run_suite, client, folder), partial(run_peer, peer, folder)


async def run_suite(client: AsyncClient, folder: Path, lines: bytes) -> dict[str, float]:
    """Run a file as a batch."""
    path = folder / "suite.jsonl"
    path.write_bytes(lines)
    began = time.monotonic()
    started = await client.batches.start(path, user_id="bench")
    status = [status async for status in client.batches.watch(started.batch_id)][-1]
    seconds = time.monotonic() - began
    if status.state != batch_pb2.BATCH_STATE_SUCCEEDED or status.counts.failed:
        raise RuntimeError(f"the batch ended otherwise: {status}")
    return _figures(status.usage.output_tokens, seconds)


async def run_peer(peer: RunBatch, folder: Path, lines: bytes) -> dict[str, float]:
    """Run a file by `vllm run-batch`."""
    path, output = folder / "peer.jsonl", folder / "peer.output.jsonl"
    path.write_bytes(lines)
    seconds = await peer.seconds(path, output)
    answers = [json.loads(line) for line in output.read_bytes().splitlines()]
    if failed := [answer["error"] for answer in answers if answer["error"]]:
        raise RuntimeError(f"vllm run-batch failed: {failed[0]}")
    return _figures(sum(answer["response"]["body"]["usage"]["completion_tokens"] for answer in answers), seconds)


def _figures(tokens: int, seconds: float) -> dict[str, float]:
    return {"tokens_per_second": tokens / seconds, "output_tokens": tokens, "seconds": seconds}


def _line(prompt: str, tokens: int) -> dict[str, Any]:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
    }
    return {"method": "POST", "url": "/v1/chat/completions", "body": body}


def _texts() -> list[str]:
    """Return the documentation of Python's built-in types."""
    kinds = (str, bytes, list, dict, set, int, float)
    return [text for kind in kinds for name in sorted(vars(kind)) if (text := inspect.getdoc(getattr(kind, name)))]


if __name__ == "__main__":
    script.run(measure, Sizes(), Sizes(rounds=1, lines=8, tokens=4, groups=2, members=2), __doc__)
