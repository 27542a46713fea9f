"""Runs the scripts of this folder one after another, and writes their results into RESULTS.md.

    python -m bench [--quick] [--vllm-python PATH] [--only NAME ...]
    python -m bench --gpu [--quick] [--only NAME ...]

PATH is the Python of an environment that has vLLM. With it, the scripts that have vLLM among their peers run in that
environment. Without it, throughput is left out and the others lack that peer. results.jsonl keeps the last result of
each script, so that a single script can be run again.

With --gpu the scripts that say something about a GPU run, in this environment, and RESULTS-GPU.md is written.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from typing import Final

from bench.support import results
from bench.support.stacks import ROOT

PLAIN: Final = ()
VLLM_TOO: Final = ("--engine", "vllm", "--rounds", "3")
TOKENS_BY_TEN: Final = ("--engine-options", '{"stream_interval":10}')
"""The profile for throughput: see docs/operate.md."""
REAL_LAYERS: Final = ("--layers", "SmolLM2-135M", "--tokens", "256")
"""The layers of one of the smallest models in use, so that the engine's work is realistic."""
REAL_BATCH: Final = ("--layers", "SmolLM2-135M", "--cache-mb", "1024", "--lines", "128", "--groups", "0")
"""The same of a batch. It takes a thirtieth of the lines a second."""
IN_ONE_PROCESS: Final = (
    "--engine-options",
    '{"distributed_executor_backend":"vllm.v1.executor.uniproc_executor.UniProcExecutor"}',
)
"""The profile for a CPU with few cores: see docs/operate.md."""
LLAMA: Final = ("--layers", "Llama-3.1-8B")

RUNS: Final[tuple[tuple[str, bool, tuple[str, ...]], ...]] = (
    ("first_token", False, PLAIN),
    ("first_token", True, VLLM_TOO),
    ("throughput", True, PLAIN),
    ("throughput", True, TOKENS_BY_TEN),
    ("throughput", True, REAL_LAYERS),
    ("throughput", True, (*REAL_LAYERS, "--jobs", "64", *IN_ONE_PROCESS)),
    ("token_latency", True, PLAIN),
    ("http_front", True, PLAIN),
    ("jobs_per_second", False, PLAIN),
    ("watchers", False, PLAIN),
    ("payload_cost", False, PLAIN),
    ("temporal_cost", False, PLAIN),
    ("growth", False, PLAIN),
    ("feed_fanout", False, PLAIN),
    ("queue_partitions", False, PLAIN),
    ("fairness", False, PLAIN),
    ("seats", False, PLAIN),
    ("pipeline_steps", False, PLAIN),
    ("three_steps", False, PLAIN),
    ("batch", False, PLAIN),
    ("batch_throughput", True, PLAIN),
    ("batch_throughput", True, REAL_BATCH),
    ("cancel_latency", False, PLAIN),
    ("pipeline_cancel", False, PLAIN),
    ("tracing_cost", False, PLAIN),
    ("quota_cost", False, PLAIN),
    ("encryption_cost", False, PLAIN),
    ("idle_memory", False, PLAIN),
)
"""Each script, whether it can use vLLM, and its arguments."""
GPU_RUNS: Final[tuple[tuple[str, bool, tuple[str, ...]], ...]] = (
    ("throughput", True, LLAMA),
    ("throughput", True, (*LLAMA, *TOKENS_BY_TEN)),
    ("first_token", True, VLLM_TOO),
)
"""The same, of those that run on a GPU."""
NEEDS_VLLM: Final = {("first_token", VLLM_TOO), *(run[::2] for run in RUNS if run[0].endswith("throughput"))}


def shown(name: str, arguments: tuple[str, ...]) -> str:
    """Return the name of a run."""
    return shlex.join([f"bench.{name}", *arguments])


def main() -> int:
    """Run the scripts. Return 1 when one failed; the results of the others are written nevertheless."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only check that the scripts run; RESULTS.md stays")
    parser.add_argument("--vllm-python", help="the Python of an environment that has vLLM")
    parser.add_argument("--only", nargs="+", choices=sorted({name for name, _, _ in RUNS}), help="run only these")
    parser.add_argument("--gpu", action="store_true", help="run those for a GPU, with vLLM in this environment")
    asked = parser.parse_args()
    vllm_python = asked.vllm_python or sys.executable
    runs, page = (GPU_RUNS, results.GPU_PAGE) if asked.gpu else (RUNS, results.PAGE)
    failed = False
    for name, with_vllm, arguments in runs:
        without = not asked.gpu and not asked.vllm_python
        if (asked.only and name not in asked.only) or ((name, arguments) in NEEDS_VLLM and without):
            continue
        python = vllm_python if with_vllm else sys.executable
        command = [python, "-m", f"bench.{name}", *(["--quick"] if asked.quick else []), *arguments]
        since = time.monotonic()
        print(shown(name, arguments), end=" ", file=sys.stderr, flush=True)
        ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=False)
        took = time.monotonic() - since
        print(f"{'failed' if ran.returncode else 'ran'} after {took:.0f} s", file=sys.stderr, flush=True)
        failed |= ran.returncode != 0
        if ran.returncode == 0:
            report = json.loads(ran.stdout)
            print(json.dumps(report))
            if not asked.quick:
                results.keep(shown(name, arguments), report, took, vllm_python, page)
    if not asked.quick:
        names = [shown(name, arguments) for name, _, arguments in runs]
        # Runs with sizes of their own follow.
        others = [name for name in results.kept_names(page) if name not in names] if asked.gpu else []
        results.write([*names, *others], page)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
