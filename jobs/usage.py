"""What jobs have used, and what a budget leaves of it."""

from typing import Final

from llm_pb import common_pb2, llm_pb2

SPENT: Final = -1
"""The value of a limit of which nothing is left. 0 is no limit."""


def usage_of(metadata: llm_pb2.ResultMetadata) -> common_pb2.Usage:
    """Return what a job has used. An answer from the cache uses no tokens."""
    usage = common_pb2.Usage(wasted_tokens=metadata.wasted_tokens)
    if not metadata.cached:
        usage.prompt_tokens = metadata.prompt_tokens
        usage.cached_prompt_tokens = metadata.cached_prompt_tokens
        usage.output_tokens = metadata.output_tokens
    if metadata.HasField("engine_time"):
        usage.engine_time.CopyFrom(metadata.engine_time)
    if metadata.HasField("cost_micros"):
        usage.cost_micros = metadata.cost_micros
    return usage


def left_of(budget: common_pb2.Budget, usage: common_pb2.Usage) -> common_pb2.Budget:
    """Return what is left of a budget. A limit that is spent is SPENT."""
    left = common_pb2.Budget()
    for name in ("output_tokens", "prompt_tokens", "cost_micros"):
        if limit := getattr(budget, name):
            setattr(left, name, limit - getattr(usage, name) if getattr(usage, name) < limit else SPENT)
    if limit := budget.engine_time.ToNanoseconds():
        unused = limit - usage.engine_time.ToNanoseconds()
        left.engine_time.FromNanoseconds(unused if unused > 0 else SPENT * 1_000_000_000)
    return left


def spent_field(left: common_pb2.Budget) -> str:
    """Return the name of the field of a budget of which nothing is left; empty if there is none."""
    for name in ("output_tokens", "prompt_tokens", "cost_micros"):
        if getattr(left, name) < 0:
            return name
    return "engine_time" if left.engine_time.ToNanoseconds() < 0 else ""
