"""A peer of bench.three_steps: the program on Temporal's plugin for OpenAI's Agents SDK, set up as in its README.

Run in the environment of `make bench-peers`: `python -m bench.peers.agents_program TEMPORAL_ADDRESS BASE_URL`
"""

import asyncio
import sys
from datetime import timedelta

from agents import Agent, ModelSettings, OpenAIProvider, RunConfig, Runner
from openai import AsyncOpenAI
from temporalio import workflow
from temporalio.client import Client
from temporalio.openai_agents import ModelActivityParameters, OpenAIAgentsPlugin
from temporalio.worker import Worker

from bench.peers.three_step_names import MAX_TOKENS, MODEL, QUEUE, STEPS, WORKFLOW, prompt_of


@workflow.defn(name=WORKFLOW)
class ThreeSteps:
    """The program."""

    @workflow.run
    async def run(self, run: str) -> str:
        """Return the text of the last step."""
        text = run
        for step in STEPS:
            agent = Agent(name=step, model=MODEL, model_settings=ModelSettings(max_tokens=MAX_TOKENS))
            # The SDK sends traces to OpenAI otherwise.
            config = RunConfig(tracing_disabled=True)
            text = (await Runner.run(agent, prompt_of(run, step, text), run_config=config)).final_output
        return text


async def main(temporal: str, base_url: str) -> None:
    """Run the worker until killed."""
    upstream = AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0)
    plugin = OpenAIAgentsPlugin(
        model_params=ModelActivityParameters(start_to_close_timeout=timedelta(seconds=30)),
        model_provider=OpenAIProvider(openai_client=upstream, use_responses=False),
    )
    client = await Client.connect(temporal, plugins=[plugin])
    async with Worker(client, task_queue=QUEUE, workflows=[ThreeSteps]):
        print("ready", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
