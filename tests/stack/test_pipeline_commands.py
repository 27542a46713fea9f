"""Pipelines by the command line."""

import asyncio
import json
import sys

from deploy.local.stack import Stack
from durable_llm.cli._pipelines import in_tree_order
from llm_pb import pipeline_pb2
from tests.support.commands import Ended, interrupt, run, start
from tests.support.jobs import new_job

RAIN = '{"@type": "type.googleapis.com/google.protobuf.StringValue", "value": "rain"}'


COMMAND = (sys.executable, "-m", "durable_llm", "pipeline")


async def cli(stack: Stack, *arguments: str) -> Ended:
    return await run(*COMMAND, *arguments, DURABLE_LLM_USER="piper", DURABLE_LLM_ADDRESS=stack.address("gateway"))


def key() -> str:
    return new_job().request_id


def test_steps_are_shown_as_they_began_below_their_parents() -> None:
    paths = ["write", "rounds", "rounds/1", "rounds/1/critique", "edit", "rounds/1/check", "rounds/10", "rounds/2"]
    steps = [pipeline_pb2.StepStatus(path=path) for path in paths]
    assert [step.path for step in in_tree_order(steps)] == [
        *("write", "rounds", "rounds/1", "rounds/1/critique", "rounds/1/check", "rounds/10", "rounds/2", "edit")
    ]


async def test_a_pipeline_is_run_shown_and_listed(stack: Stack) -> None:
    request_id = key()
    ended = await cli(stack, "run", "essay", RAIN, "--request-id", request_id, "--follow", "parts/*/write")
    assert ended.status == 0, ended.errors
    *outputs, result = ended.output.splitlines()
    essay = json.loads(result)["value"]
    followed, path = dict.fromkeys((f"parts/{number}/write" for number in range(3)), ""), ""
    for line in outputs:
        if line.startswith("--- "):
            path = line.removeprefix("--- ")
        else:
            followed[path] += line
    assert "".join(followed.values()) == essay.replace("\n", "")
    id_, *progress = ended.errors.splitlines()
    assert id_ == f"llmpipe-piper-{request_id}"
    assert "outline SUCCEEDED" in progress
    assert len(set(progress)) == len(progress), "a line comes twice"
    # A repeat finds it, and its result.
    again = await cli(stack, "run", "essay", RAIN, "--request-id", request_id, "-q")
    assert (again.status, again.output, again.errors) == (0, f"{result}\n", f"{id_}\n")
    tree = await cli(stack, "tree", id_)
    assert tree.output.splitlines() == [
        f"{id_} SUCCEEDED",
        "  outline SUCCEEDED job",
        "  parts SUCCEEDED 3/3",
        *(line for number in range(3) for line in (f"    {number} SUCCEEDED 1/1", "      write SUCCEEDED job")),
    ]
    steps = json.loads((await cli(stack, "tree", id_, "--json", "--path", "parts/1")).output)["steps"]
    assert [step["path"] for step in steps] == ["parts/1", "parts/1/write"]
    messages = [json.loads(line) for line in (await cli(stack, "watch", id_, "--json")).output.splitlines()]
    assert messages[-1]["result"]["value"]["value"] == essay
    async with asyncio.timeout(120):
        while id_ not in (listed := await cli(stack, "ls", "--user", "piper", "-n", "0")).output:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    row = next(line for line in listed.output.splitlines() if line.startswith(id_))
    assert row.split("\t")[1:5] == ["essay", "SUCCEEDED", "4/4", "piper"]


async def test_what_cannot_be_run_is_a_usage_error(stack: Stack) -> None:
    for arguments, said in (
        (("essay",), "give either SPEC or --file"),
        (("essay", "{"), "SPEC: "),
        (("essay", "[" * 9999), "SPEC: "),
        (("essay", '{"@type": "type.googleapis.com/of.Nobody"}'), "SPEC: "),
        (("essay", '"rain"'), 'SPEC: must be an object with "@type"'),
        (("essay", '{"@type": 5}'), 'SPEC: must be an object with "@type"'),
        (("essay", '{"@type": "type.googleapis.com/google.protobuf.StringValue"}'), "SPEC: must be an object"),
        (("refine", '{"nonsense": 1}'), "nonsense"),
        (("refine", "{}"), "topic"),
        (("nobodys", RAIN), "pipeline.custom.name"),
    ):
        ended = await cli(stack, "run", *arguments)
        assert ended.status == 2, (arguments, ended.errors)
        assert said in ended.errors
        assert "Traceback" not in ended.errors
    missing = await cli(stack, "tree", "llmpipe-piper-missing")
    assert missing.status == 3


async def test_a_step_is_answered_and_a_pipeline_left_and_cancelled(stack: Stack) -> None:
    """Ctrl-C leaves it running; a cancel ends it with the status of a cancelled job."""
    keys = (key(), key())
    answered, left = (f"llmpipe-piper-{request_id}" for request_id in keys)
    for request_id, id_ in zip(keys, (answered, left), strict=True):
        started = await cli(stack, "run", "careful", RAIN, "--request-id", request_id, "--detach")
        assert (started.status, started.output) == (0, f"{id_}\n")
    process = await start(*COMMAND, "watch", left, DURABLE_LLM_ADDRESS=stack.address("gateway"))
    assert process.stderr is not None
    while "NEEDS_ANSWER" not in (await process.stderr.readline()).decode():
        pass
    interrupt(process.pid)
    said = (await process.stderr.read()).decode()
    assert await process.wait() == 130
    assert f"durable-llm pipeline watch {left} --cursor " in said
    assert "May I" in (await cli(stack, "tree", answered)).output
    assert "RUNNING, needs an answer" in (await cli(stack, "ls", "--user", "piper")).output
    assert (await cli(stack, "answer", answered, "review/approve", "--no")).output.startswith("review/approve ")
    ended = await cli(stack, "watch", answered, "-q")
    assert (ended.status, json.loads(ended.output)["value"]) == (0, "not approved")
    assert (await cli(stack, "cancel", left, "--reason", "enough")).status == 0
    ended = await cli(stack, "watch", left, "-q")
    assert (ended.status, "enough" in ended.errors) == (5, True)
