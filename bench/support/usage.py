"""What processes use, as Linux tells it."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from deploy.local.stack import Stack


def resident_bytes(pid: int) -> int:
    """Return a process's resident set."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used, its threads' included, its children's not."""
    # After the name, which may hold spaces: utime and stime are the 14th and 15th fields of all, in ticks.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu_of(stack: Stack, names: Iterable[str] | None = None) -> dict[str, float]:
    """Return the processor time that each running process of the stack has used so far."""
    return {
        name: cpu_seconds(process.pid)
        for name, process in stack.processes.items()
        if process.pid is not None and (names is None or name in names)
    }


def since(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Return what was used between two readings."""
    return {name: used - before.get(name, 0.0) for name, used in after.items()}
