"""The audit log by itself, over files that hang."""

import asyncio
import os
from datetime import timedelta
from pathlib import Path

from opentelemetry.metrics import NoOpMeterProvider

from runtime.audit import AuditLog
from runtime.audit_file import AuditFile


async def test_a_store_that_hangs_does_not_hold_the_end_of_the_process(tmp_path: Path) -> None:
    """A pipe that nobody reads takes 64 KiB."""
    path = tmp_path / "audit"
    os.mkfifo(path)
    lost = NoOpMeterProvider().get_meter("test").create_counter("lost")
    log = AuditLog(AuditFile(path, "AUDIT"), lost, timeout=timedelta(seconds=0.5))
    log.add(b"x" * 200_000)
    async with asyncio.timeout(60):
        await log.close()
    # The thread that writes must end before the test does.
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    for _ in range(20):
        try:
            os.read(reading, 1 << 16)
        except BlockingIOError:
            break
        await asyncio.sleep(0.05)
    os.close(reading)
