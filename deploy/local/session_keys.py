"""The key of the console's sessions: all fronts of a stack have it, and it outlives them."""

import base64
import os
from pathlib import Path
from typing import Final

from encryption import durable_file

NAME: Final = "session-keys"
"""The name of its file in the state folder."""


def write_session_key(state_dir: Path) -> None:
    """Write the file if there is none yet. Only its owner can read it."""
    path = state_dir / NAME
    if not path.exists():
        durable_file.replace(path, base64.b64encode(os.urandom(32)).decode() + "\n")
