"""Processes that start stacks at the same time choose different ports."""

import subprocess
import sys

from tests.support.paths import ROOT

CHOOSE = (
    "import random; random.seed(7); from deploy.local.ports import free_port as f; print(f(), f(), flush=True); input()"
)


def test_two_processes_never_choose_the_same_port() -> None:
    """They did if both came past the same ports: the tests of one talked to a server of the other."""
    processes = [
        subprocess.Popen([sys.executable, "-c", CHOOSE], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    try:
        chosen = [port for process in processes if process.stdout for port in process.stdout.readline().split()]
    finally:
        for process in processes:
            process.communicate(b"\n")
    assert len(chosen) == 6
    assert len(set(chosen)) == 6
