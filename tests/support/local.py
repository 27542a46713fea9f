"""The local stack that tests run as a command."""

import os
from pathlib import Path

from deploy.local.settings import StackSettings


def environment(settings: StackSettings) -> dict[str, str]:
    return {**os.environ, **{f"STACK_{name.upper()}": str(value) for name, value in settings.model_dump().items()}}


def child_pids(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
