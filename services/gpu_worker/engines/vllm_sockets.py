"""The folder of the sockets between vLLM's processes. It needs no vLLM."""

import atexit
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from runtime.work_folders import sweep_work_folders, work_folder

SOCKETS: Final = "VLLM_RPC_BASE_PATH"
"""The variable that names the folder of the sockets between vLLM's processes."""
_SOCKETS_PREFIX: Final = "vllm-"
"""Prefix of that folder's name."""
_MAX_SOCKET_PATH: Final = 107
"""Maximum number of bytes of a socket's path in Linux."""
_SHORT: Final = Path("/tmp")  # noqa: S108  # the folder in it has a name of its own, and only this user reads it
_SOCKET_NAME: Final = 37
"""Number of bytes that vLLM adds to the folder's path: a slash and a UUID."""


def choose_socket_folder() -> None:
    """Give vLLM a folder of this process for its sockets, unless the operator has named one.

    vLLM's default is the system's folder for temporary files, where a killed process leaves its sockets for ever. Where
    that folder's path is too long for a socket's, the folder is in /tmp. Raises ValueError for a path of the operator's
    that is too long.
    """
    if SOCKETS in os.environ:
        if not _fits(os.environ[SOCKETS]):
            most = _MAX_SOCKET_PATH - _SOCKET_NAME
            raise ValueError(f"{SOCKETS} has more than {most} bytes, and the paths of sockets in it would be too long")
        return
    sweep_work_folders(_SOCKETS_PREFIX)
    folders = ExitStack()
    folder = folders.enter_context(work_folder(_SOCKETS_PREFIX))
    if not _fits(str(folder)):
        folders.close()
        sweep_work_folders(_SOCKETS_PREFIX, _SHORT)
        folder = folders.enter_context(work_folder(_SOCKETS_PREFIX, _SHORT))
    os.environ[SOCKETS] = str(folder)
    atexit.register(folders.close)


def _fits(folder: str) -> bool:
    return len(os.fsencode(folder)) + _SOCKET_NAME <= _MAX_SOCKET_PATH
