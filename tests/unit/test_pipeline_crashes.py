"""What a stream of a pipeline brings after a crash has taken back what the pipeline had just done."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from jobs.pipeline_rules import CURSOR_PATTERN
from llm_pb import internal_pb2, llm_pb2, pipeline_pb2
from services.gateway.pipelines.reader import Look
from tests.support.pipelines import Followed
from tests.support.scripted_pipelines import ID, Reader, messages_of, record_of

RUNNING, SUCCEEDED = pipeline_pb2.STEP_STATE_RUNNING, pipeline_pb2.STEP_STATE_SUCCEEDED
Node = tuple[str, "pipeline_pb2.StepState.ValueType", int]
"""Path, state and version of a node."""


def tree_of(version: int, *nodes: Node, ended: bool = False) -> internal_pb2.PipelineRecord:
    record = record_of(version)
    for number, (path, state, changed) in enumerate(nodes):
        step = pipeline_pb2.StepStatus(path=path, state=state)
        record.nodes.add(number=number, version=changed, step=step)
    if ended:
        record.status.state = llm_pb2.JOB_STATE_SUCCEEDED
    return record


class Changes:
    """A feed that has brought some changes, each with the version before."""

    available = True

    def __init__(self, *changes: tuple[int, internal_pb2.PipelineRecord]) -> None:
        self.changes = changes

    async def read(self, _: str, take: Any) -> None:
        for since, record in self.changes:
            take(internal_pb2.FeedRecord(pipeline_change={"since": since, "record": record}))
            # The reader gets each of them by itself.
            await asyncio.sleep(0.05)
        await asyncio.Event().wait()


async def followed(reader: Reader, known: Followed | None = None, *, until: Any = None, **others: Any) -> Followed:
    """Follow a pipeline from where `known` is, to its end or until what has come meets a condition."""
    seen = known or Followed()
    async with aclosing(messages_of(reader, after=seen.cursor, **others)) as messages:
        async with asyncio.timeout(10):
            async for message in messages:
                seen.take(message)
                if until is not None and until(seen):
                    break
    return seen


def shown(steps: dict[str, pipeline_pb2.StepStatus]) -> dict[str, "pipeline_pb2.StepState.ValueType"]:
    return {path: step.state for path, step in steps.items()}


FINAL = tree_of(9, ("outline", SUCCEEDED, 4), ("write", SUCCEEDED, 8), ended=True)


@pytest.mark.parametrize(
    "taken_back",
    [
        tree_of(12, ("outline", SUCCEEDED, 4), ("write", RUNNING, 12)),
        tree_of(9, ("outline", SUCCEEDED, 4), ("write", RUNNING, 9)),
        tree_of(8, ("outline", RUNNING, 3), ("write", RUNNING, 8)),
        tree_of(8, ("outline", SUCCEEDED, 4), ("write", RUNNING, 5), ("check", RUNNING, 8)),
        tree_of(8, ("outline", SUCCEEDED, 4), ("check", RUNNING, 8)),
        tree_of(8, ("write", RUNNING, 4), ("outline", SUCCEEDED, 8)),
        tree_of(3, ("outline", RUNNING, 3)),
    ],
    ids=["ahead", "as far", "another version", "more steps", "another step", "another order", "behind"],
)
@pytest.mark.parametrize("resumes", [True, False], ids=["another stream", "the same stream"])
async def test_a_reader_has_the_final_tree_at_the_end_whatever_a_crash_has_taken_back(
    taken_back: internal_pb2.PipelineRecord, resumes: bool
) -> None:
    """A reader that had a newer version than its pipeline got no steps at the end, and kept those that ran."""
    feed: dict[str, Any] = {"feed": Changes((0, taken_back))}
    if resumes:
        known = await followed(Reader(tree_of(1), answered=True), until=lambda seen: seen.steps, **feed)
        assert len(known.steps) == len(taken_back.nodes)
        seen = await followed(Reader(FINAL, answered=True), known)
    else:
        seen = await followed(Reader(*[tree_of(1)] * 3, FINAL, answered=True), **feed)
    assert shown(seen.steps) == {"outline": SUCCEEDED, "write": SUCCEEDED}
    # Who comes back once more has them all.
    seen.status.Clear()
    assert not [m async for m in messages_of(Reader(FINAL, answered=True), after=seen.cursor) if m.steps or m.rewind]


async def test_a_reader_that_is_ahead_of_its_pipeline_gets_what_there_is_as_soon_as_the_pipeline_answers() -> None:
    """It waited without a word until the pipeline had passed the version."""
    ahead = tree_of(12, ("outline", SUCCEEDED, 4), ("write", RUNNING, 10), ("check", RUNNING, 12))
    known = await followed(Reader(ahead, answered=True), until=lambda seen: seen.steps)
    now = tree_of(11, ("outline", SUCCEEDED, 4), ("write", RUNNING, 11))
    seen = await followed(Reader(now, answered=True), known, until=lambda seen: seen.messages > 1)
    assert shown(seen.steps) == {"outline": SUCCEEDED, "write": RUNNING}


async def test_changes_that_do_not_continue_those_before_them_are_of_another_tree() -> None:
    """What a crash had taken back was mixed with what came instead, which was ignored until it had a newer version."""
    one, other = ("outline", SUCCEEDED, 5), ("write", RUNNING, 4)
    lost = tree_of(5, ("outline", RUNNING, 1), ("write", SUCCEEDED, 5))
    again, more = tree_of(5, one, other), tree_of(7, ("outline", SUCCEEDED, 5), ("write", RUNNING, 7))
    del more.nodes[0]
    reader = Reader(tree_of(2, ("outline", RUNNING, 1)), tree_of(7, one, ("write", RUNNING, 7)), answered=True)
    feed = Changes((2, lost), (2, again), (5, more))
    seen = await followed(reader, until=lambda seen: seen.status.root.counts.total == 7, feed=feed, poll=60)
    assert shown(seen.steps) == {"outline": SUCCEEDED, "write": RUNNING}


async def test_a_reader_that_comes_back_gets_the_steps_that_have_changed() -> None:
    first = tree_of(6, ("outline", RUNNING, 3), ("write", RUNNING, 6))
    known = await followed(Reader(first, answered=True), until=lambda seen: seen.steps)
    known.steps.clear()
    seen = await followed(Reader(FINAL, answered=True), known)
    assert shown(seen.steps) == {"outline": SUCCEEDED, "write": SUCCEEDED}
    known = await followed(Reader(first, answered=True), until=lambda seen: seen.steps)
    known.steps.clear()
    later = tree_of(8, ("outline", RUNNING, 3), ("write", SUCCEEDED, 8), ended=True)
    assert shown((await followed(Reader(later, answered=True), known)).steps) == {"write": SUCCEEDED}


async def test_the_cursor_of_a_large_tree_is_short_enough_for_a_request() -> None:
    nodes: list[Node] = [(f"parts/{number}/write", RUNNING, number + 1) for number in range(1000)]
    tree = tree_of(1000, *nodes)
    for node in tree.nodes:
        node.step.workflow_id = f"{ID}/{node.step.path}"
    reader, whole = Reader(tree, answered=True), lambda seen: len(seen.steps) == 1000 and len(seen.outputs) == 64
    seen = await followed(reader, until=whole, follow="**")
    assert CURSOR_PATTERN.fullmatch(seen.cursor)
    seen.steps.clear()
    again = await followed(reader, seen, until=lambda now: now.outputs["parts/63/write"].count(b"x") > 9, follow="**")
    assert not again.steps


class Busy(Reader):
    """A pipeline whose tree cannot be read where a record has none."""

    async def look(self, description: Any) -> Look:
        found = await super().look(description)
        return Look(found.record, bool(found.record.nodes))


async def test_a_reader_gets_the_tree_at_the_end_although_it_cannot_be_read_at_once() -> None:
    """A gateway that had just begun did not answer in time, and the stream ended with steps that still ran."""
    running, ended = tree_of(5, ("outline", RUNNING, 3), ("write", RUNNING, 5)), internal_pb2.PipelineRecord()
    ended.status.state = llm_pb2.JOB_STATE_SUCCEEDED
    seen = await followed(Busy(running, ended, ended, ended, FINAL))
    assert shown(seen.steps) == {"outline": SUCCEEDED, "write": SUCCEEDED}
    # Where it can never be read, the stream ends nevertheless.
    seen = await followed(Busy(running, ended))
    assert (seen.status.state, shown(seen.steps)) == (
        llm_pb2.JOB_STATE_SUCCEEDED,
        {"outline": RUNNING, "write": RUNNING},
    )
