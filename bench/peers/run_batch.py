"""The peer of bench.batch_throughput: what `vllm run-batch` does with a file, in a process that keeps its engine.

    python -m bench.peers.run_batch '{"flags": ["--model", …]}'

The flags are those of `vllm run-batch`. Each line of its input is {"lines": path, "output": path}. It answers each with
the seconds from the first line to the written output. The start of the engine, which takes longer, is not among them.
"""

import asyncio
import json
import os
import sys
import time
from argparse import Namespace
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.run_batch import make_arg_parser, run_batch
from vllm.utils.argparse_utils import FlexibleArgumentParser

from bench.peers import vllm_cli


def parse(flags: list[str], lines: str, output: str) -> Namespace:
    """Return the arguments of `vllm run-batch`."""
    parsed: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([*flags, "-i", lines, "-o", output])
    return parsed


async def main(flags: list[str], answers: Any) -> None:
    """Answer requests until the input ends."""
    async with build_async_engine_client(parse(flags, "-", "-")) as engine:
        print("{}", file=answers, flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps({"seconds": await seconds(engine, flags, json.loads(line))}), file=answers, flush=True)


async def seconds(engine: EngineClient, flags: list[str], asked: dict[str, str]) -> float:
    """Run a file, and return the time that it took."""
    began = time.monotonic()
    await run_batch(engine, parse(flags, asked["lines"], asked["output"]))
    return time.monotonic() - began


if __name__ == "__main__":
    # vLLM logs to standard output, which has to carry only the answers here.
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)
        vllm_cli.find_version()
        asyncio.run(main(json.loads(sys.argv[1])["flags"], output))
