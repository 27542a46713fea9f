"""Runs the scripts of this folder, one after the other, and writes what they found into RESULTS.md.

    python -m bench [--quick] [--vllm-python PATH] [--only NAME ...]

Those that have vLLM among their peers run in its environment when PATH, its Python, is given; without, throughput is
left out and the others lack that peer.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from bench.results import written

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = ROOT / "bench" / "RESULTS.md"
PLAIN: Final = ()
VLLM_TOO: Final = ("--engine", "vllm", "--rounds", "3")
TOKENS_BY_TEN: Final = ("--engine-options", '{"stream_interval":10}')
"""The profile for throughput: see docs/operate.md."""

RUNS: Final[tuple[tuple[str, bool, tuple[str, ...]], ...]] = (
    ("first_token", False, PLAIN),
    ("first_token", True, VLLM_TOO),
    ("throughput", True, PLAIN),
    ("throughput", True, TOKENS_BY_TEN),
    ("token_latency", True, PLAIN),
    ("jobs_per_second", False, PLAIN),
    ("watchers", False, PLAIN),
    ("payload_cost", False, PLAIN),
    ("temporal_cost", False, PLAIN),
    ("growth", False, PLAIN),
    ("fairness", False, PLAIN),
    ("cancel_latency", False, PLAIN),
    ("tracing_cost", False, PLAIN),
    ("idle_memory", False, PLAIN),
)
"""Each script, whether it can use vLLM, and its arguments."""
NEEDS_VLLM: Final = {("throughput", PLAIN), ("throughput", TOKENS_BY_TEN), ("first_token", VLLM_TOO)}


def main() -> int:
    """Return 1 when a script failed; the others' results are written all the same."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="prove only that the scripts run; RESULTS.md stays")
    parser.add_argument("--vllm-python", help="the Python of an environment that has vLLM")
    parser.add_argument("--only", nargs="+", choices=sorted({name for name, _, _ in RUNS}), help="these scripts alone")
    asked = parser.parse_args()
    reports: list[tuple[str, dict[str, Any]]] = []
    failed = False
    for name, with_vllm, arguments in RUNS:
        if (asked.only and name not in asked.only) or ((name, arguments) in NEEDS_VLLM and not asked.vllm_python):
            continue
        python = asked.vllm_python if with_vllm and asked.vllm_python else sys.executable
        command = [python, "-m", f"bench.{name}", *(["--quick"] if asked.quick else []), *arguments]
        since = time.monotonic()
        shown = shlex.join([f"bench.{name}", *arguments])
        print(shown, end=" ", file=sys.stderr, flush=True)
        ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=False)
        took = time.monotonic() - since
        print(f"{'failed' if ran.returncode else 'ran'} after {took:.0f} s", file=sys.stderr, flush=True)
        failed |= ran.returncode != 0
        if ran.returncode == 0:
            report = json.loads(ran.stdout)
            print(json.dumps(report))
            reports.append((shown, report | {"seconds": took}))
    if not asked.quick and not asked.only:
        RESULTS.write_text(written(reports, asked.vllm_python or sys.executable))
    return int(failed)


sys.exit(main())
