"""The memory of a process of the stack, as Linux counts it."""

from pathlib import Path

from deploy.local.process import Process


def resident_bytes(process: Process) -> int:
    """Return the current resident memory in bytes."""
    return _value(process, "VmRSS")


def peak_bytes(process: Process) -> int:
    """Return the peak of the resident memory in bytes."""
    return _value(process, "VmHWM")


def _value(process: Process, key: str) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition(f"{key}:")[2].split()[0]) * 1024
