"""Memory and processor time of processes, read from Linux."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from deploy.local.stack import Stack


def resident_bytes(pid: int) -> int:
    """Return the resident set of a process, in bytes."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024


def cpu_seconds(pid: int) -> float:
    """Return the processor seconds of a process, including its threads and excluding its children."""
    # The split starts after the name, which may hold spaces. utime and stime are fields 14 and 15, in ticks.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu_of(stack: Stack, names: Iterable[str] | None = None) -> dict[str, float]:
    """Return the processor seconds of each running process of the stack so far."""
    return {
        name: cpu_seconds(process.pid)
        for name, process in stack.processes.items()
        if process.pid is not None and (names is None or name in names)
    }


def since(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Return the difference of two readings of cpu_of()."""
    return {name: used - before.get(name, 0.0) for name, used in after.items()}
