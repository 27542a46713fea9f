"""The GPU worker with a simulated engine whose tokens hold the time at which the engine yielded them.

    python -m bench.peers.stamping_worker

Nothing else differs from `python -m services.gpu_worker`, whose table of engines this module changes.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from bench.support.stamps import stamp
from runtime import process, temporal
from services.gpu_worker import __main__ as gpu_worker
from services.gpu_worker.engines.engine import ENGINES, EngineConfig, Generation, Output
from services.gpu_worker.engines.simulated import SimulatedEngine, SimulatedOptions


class StampingEngine(SimulatedEngine):
    """The simulated engine with stamps as its text, at the same pace."""

    async def generate(self, generation: Generation) -> AsyncGenerator[Output, None]:
        """See services.gpu_worker.engines.engine.Engine."""
        async with aclosing(super().generate(generation)) as outputs:
            async for output in outputs:
                yield replace(output, text=stamp()) if output.token_ids else output


def create(config: EngineConfig) -> StampingEngine:
    """Return the engine."""
    return StampingEngine(config, SimulatedOptions.model_validate(dict(config.options)))


if __name__ == "__main__":
    ENGINES["simulated"] = "bench.peers.stamping_worker"
    process.run("gpu-worker", gpu_worker.main, new_provider=temporal.new_provider)
