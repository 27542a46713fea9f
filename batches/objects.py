"""Where the objects of a batch lie in the store: all in one folder, whose name tells nothing of the batch."""

import hashlib
from typing import Final

ROOT: Final = "batches/"
"""The folder of all batches."""


def folder_of(batch_id: str, tenant: str) -> str:
    """Return the folder of a batch, with a `/` at its end."""
    return f"{ROOT}{tenant or '-'}/{hashlib.sha256(batch_id.encode()).hexdigest()}/"


def segments_folder(batch_id: str, tenant: str) -> str:
    """Return the folder of the segments that the batch's chunks write."""
    return f"{folder_of(batch_id, tenant)}segments/"
