"""A peer of bench.token_latency: `vllm serve` whose engine generates stamps instead of tokens, at an even pace.

    python -m bench.peers.stamping_vllm_serve PER_SECOND serve MODEL ...

Everything after AsyncLLM.generate is vLLM's own: its server, its protocol, its handling of each output.
"""

import sys
from collections.abc import AsyncGenerator
from typing import Any

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from bench.peers import vllm_cli
from bench.support.stamps import paced

_TOKEN = 1


def stamping(per_second: float) -> Any:
    """Return the replacement of AsyncLLM.generate."""

    async def generate(
        self: AsyncLLM, prompt: Any, sampling_params: SamplingParams, request_id: str, **_: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        left = sampling_params.max_tokens or 1
        async for text in paced(left, per_second):
            left -= 1
            reason = "length" if left == 0 else None
            output = CompletionOutput(0, text, [_TOKEN], None, None, finish_reason=reason)
            yield RequestOutput(request_id, None, [_TOKEN], None, [output], finished=left == 0)

    return generate


if __name__ == "__main__":
    AsyncLLM.generate = stamping(float(sys.argv.pop(1)))
    vllm_cli.run()
