"""The folder of the sockets between vLLM's processes."""

import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from services.gpu_worker.engines.vllm_sockets import SOCKETS, choose_socket_folder

CHOOSE = f"""
import os
from services.gpu_worker.engines.vllm_sockets import choose_socket_folder
choose_socket_folder()
print(os.environ["{SOCKETS}"], os.path.isdir(os.environ["{SOCKETS}"]))
"""


@pytest.mark.parametrize("length", [10, 60, 120])
def test_a_socket_fits_wherever_the_folder_for_temporary_files_is(tmp_path: Path, length: int) -> None:
    """The path of a socket has at most 107 bytes. The folder goes with its process."""
    temporary = tmp_path / ("x" * length)
    temporary.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != SOCKETS}
    environment["TMPDIR"] = str(temporary)
    done = subprocess.run([sys.executable, "-c", CHOOSE], env=environment, capture_output=True, text=True, check=True)
    folder, is_one = done.stdout.split()
    assert is_one == "True"
    assert len(f"{folder}/{uuid.uuid4()}") <= 107
    assert not Path(folder).exists()
    assert not [*temporary.iterdir()]


def test_a_folder_of_the_operators_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = "/" + "x" * 69
    monkeypatch.setenv(SOCKETS, longest)
    choose_socket_folder()
    monkeypatch.setenv(SOCKETS, f"{longest}x")
    with pytest.raises(ValueError, match="more than 70 bytes"):
        choose_socket_folder()
    with socket.socket(socket.AF_UNIX) as one, pytest.raises(OSError, match="too long"):
        one.bind(f"{longest}xx/{uuid.uuid4()}")
