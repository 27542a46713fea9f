"""A peer of bench.three_steps: the program as a graph of LangGraph, in one process, with its checkpointer on SQLite.

It runs what standard input names, a run on each line, all at the same time, and prints each that has ended. A run that
has checkpoints goes on after the last one.

Run in the environment of `make bench-peers`: `python -m bench.peers.langgraph_program BASE_URL FILE`
"""

import asyncio
import sys
from typing import Any, TypedDict

from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph
from openai import AsyncOpenAI

from bench.peers.three_step_names import MAX_TOKENS, MODEL, STEPS, prompt_of


class State(TypedDict):
    """What the steps hand on."""

    run: str
    text: str


def graph_of(upstream: AsyncOpenAI) -> Any:
    """Return the graph, a node for each step."""
    graph = StateGraph(State)

    def node(step: str) -> Any:
        async def ask(state: State) -> dict[str, str]:
            made = await upstream.chat.completions.create(
                model=MODEL,
                max_tokens=MAX_TOKENS,
                messages=[{"role": "user", "content": prompt_of(state["run"], step, state["text"])}],
            )
            return {"text": made.choices[0].message.content or ""}

        return ask

    for step in STEPS:
        graph.add_node(step, node(step))
    for before, after in zip((START, *STEPS), (*STEPS, END), strict=True):
        graph.add_edge(before, after)
    return graph


async def main(base_url: str, file: str) -> None:
    """Run until killed."""
    upstream = AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with AsyncSqliteSaver.from_conn_string(file) as saver, asyncio.TaskGroup() as tasks:
        graph = graph_of(upstream).compile(checkpointer=saver)

        async def one(run: str) -> None:
            config = {"configurable": {"thread_id": run}}
            known = await graph.aget_state(config)
            await graph.ainvoke(None if known.next else {"run": run, "text": run}, config)
            print(run, flush=True)

        print("ready", flush=True)
        while line := (await lines.readline()).decode().strip():
            tasks.create_task(one(line))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
