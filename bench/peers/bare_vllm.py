"""The limit of bench.throughput: vLLM's bare AsyncLLM, in a process of its own.

    python -m bench.peers.bare_vllm ASYNC_ENGINE_ARGS_AS_JSON

Each line of its input is {"prompts": [text], "tokens": maximum of each output}. It answers each with a line of output.
"""

import asyncio
import json
import os
import sys
import time
from typing import Any

from vllm import AsyncEngineArgs, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM


async def generate(llm: AsyncLLM, number: str, prompt: str, params: SamplingParams) -> tuple[float, int]:
    """Return the time of the first token, and the number of tokens."""
    first, tokens = 0.0, 0
    async for request in llm.generate(prompt, params, number):
        first = first or time.monotonic()
        tokens += len(request.outputs[0].token_ids)
    return first, tokens


async def run(llm: AsyncLLM, prompts: list[str], tokens: int) -> dict[str, Any]:
    """Generate for all prompts concurrently; return the figures."""
    params = SamplingParams(max_tokens=tokens, temperature=0, output_kind=RequestOutputKind.DELTA)
    begin = time.monotonic()
    ended = await asyncio.gather(
        *(generate(llm, f"{begin}-{number}", prompt, params) for number, prompt in enumerate(prompts))
    )
    took, made = time.monotonic() - begin, sum(count for _, count in ended)
    return {
        "tokens_per_second": made / took,
        "output_tokens": made,
        "first_token_ms": (ended[0][0] - begin) * 1000,
    }


async def main(arguments: dict[str, Any], answers: Any) -> None:
    """Answer requests until the input ends."""
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    print("{}", file=answers, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await run(llm, **json.loads(line))), file=answers, flush=True)
    llm.shutdown()


if __name__ == "__main__":
    # vLLM logs to standard output, which has to carry only the answers here.
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)
        asyncio.run(main(json.loads(sys.argv[1]), output))
