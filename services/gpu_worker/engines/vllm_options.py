"""The options that vLLM is started with: the operator's and those that the worker chooses."""

import dataclasses
import os
from typing import Any, Final

from vllm import AsyncEngineArgs
from vllm.config import StructuredOutputsConfig
from vllm.platforms import current_platform

from llm_pb import llm_pb2
from services.gpu_worker.engines.engine import EngineConfig
from services.gpu_worker.engines.structured_guard import FLOOR, SLOWDOWN, StructuredGuard

CHOSEN_HERE: Final = ("model", "max_num_seqs", "scheduling_policy")
"""Fields of AsyncEngineArgs that the worker's own settings decide."""
GUARD_OPTIONS: Final = {"structured_floor": FLOOR, "structured_slowdown": SLOWDOWN}
"""The StructuredGuard's options and their defaults."""
BACKENDS: Final = ("xgrammar", "guidance")
"""Backends that may constrain structured output, the default first. The rules estimate the cost of xgrammar, and
guidance limits its own. Of vLLM's others outlines compiles .{0,100} for 47 s and \\w{1,500} for over a minute (131,000
tokens; xgrammar takes 2 s and 0.3 s), and nothing limits lm-format-enforcer. auto chooses the backend that an engine's
first structured job needs, which may be outlines, for all jobs that follow."""
CPU_CACHE_BYTES: Final = 1 << 30


def engine_arguments(config: EngineConfig) -> AsyncEngineArgs:
    """Return vLLM's own form of the options, without the guard's. Raises ValueError for an unknown option."""
    options = {**cpu_defaults(), **config.options}
    for name in GUARD_OPTIONS:
        options.pop(name, None)
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)} - set(CHOSEN_HERE)
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"options: {', '.join(unknown)} is unknown to vLLM, or set by the worker itself")
    structured = {"backend": BACKENDS[0], **options.get("structured_outputs_config", {})}
    if structured["backend"] not in BACKENDS:
        raise ValueError(f"options: structured_outputs_config.backend must be one of {', '.join(BACKENDS)}")
    options["structured_outputs_config"] = StructuredOutputsConfig(**structured)
    return AsyncEngineArgs(
        model=config.model_path, max_num_seqs=config.max_concurrent, scheduling_policy="priority", **options
    )


def new_guard(config: EngineConfig) -> StructuredGuard:
    """Return the guard with its options. Raises ValueError for an option that is no number."""
    floor, slowdown = (float(config.options.get(name, default)) for name, default in GUARD_OPTIONS.items())
    return StructuredGuard(floor, slowdown)


def gpu_info(count: int) -> llm_pb2.GpuInfo:
    """Return the description of the device, for results. The driver gives it, so this process needs no GPU memory."""
    if current_platform.is_cpu():
        return llm_pb2.GpuInfo(name="cpu")
    return llm_pb2.GpuInfo(
        name=current_platform.get_device_name(),
        memory_bytes=current_platform.get_device_total_memory(),
        count=count,
    )


def cpu_defaults() -> dict[str, Any]:
    """Return the defaults on a CPU: exact numbers, little memory, and no compilation, which takes minutes."""
    if not current_platform.is_cpu():
        return {}
    defaults: dict[str, Any] = {"dtype": "float32", "enforce_eager": True}
    if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        defaults["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    return defaults
