"""What a stream of a pipeline brings while the workflow of the pipeline does not answer."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from jobs.pipelines import matches
from llm_pb import internal_pb2, llm_pb2, pipeline_pb2
from tests.support.scripted_pipelines import ID, EndingFeed, Reader, SilentFeed, messages_of, record_of


async def test_a_reader_with_a_cursor_gets_no_status_from_before_it() -> None:
    """While its present task fails, a pipeline is known to a gateway as it last answered this one."""
    reader = Reader(record_of(5), record_of(5), record_of(12))
    async with aclosing(messages_of(reader, internal_pb2.PipelineCursor(version=9, run_id="a"))) as messages:
        async with asyncio.timeout(10):
            first = await anext(messages)
    assert first.status.root.counts.total == 12


async def test_a_pipeline_that_an_operator_ends_keeps_its_counts_where_it_does_not_answer() -> None:
    ended = internal_pb2.PipelineRecord()
    ended.status.state = llm_pb2.JOB_STATE_CANCELLED
    async with aclosing(messages_of(Reader(record_of(5), ended))) as messages:
        async with asyncio.timeout(10):
            seen = [message.status async for message in messages if message.HasField("status")]
    assert (seen[0].state, seen[0].root.counts.total) == (llm_pb2.JOB_STATE_RUNNING, 5)
    assert (seen[-1].state, seen[-1].root.counts.total) == (llm_pb2.JOB_STATE_CANCELLED, 5)


async def test_who_comes_back_follows_the_steps_that_were_begun() -> None:
    """Of more steps than one stream brings, those that have begun first are not those that stand first."""
    late, all_ = record_of(100), record_of(101)
    for number in range(100):
        node = all_.nodes.add(number=number, version=101)
        node.step.path, node.step.workflow_id = f"parts/{number}/write", f"{ID}/parts/{number}/write"
        if number >= 50:
            late.nodes.add(version=100).MergeFrom(node)
            late.nodes[-1].version = 100

    async def followed(reader: Reader, after: str) -> tuple[dict[str, str], str]:
        """Return the text of each step once there are 64, and the cursor."""
        texts: dict[str, str] = {}
        async with aclosing(messages_of(reader, follow="parts/*/write", after=after)) as messages:
            async with asyncio.timeout(10):
                async for message in messages:
                    if message.HasField("delta"):
                        delta = message.delta
                        texts[delta.path] = texts.get(delta.path, "") + delta.delta.text
                        after = message.cursor
                    if len(texts) == 64:
                        break
        return texts, after

    first, cursor = await followed(Reader(late, all_), "")
    second, _ = await followed(Reader(all_), cursor)
    assert f"parts/{99}/write" in first
    assert second.keys() == first.keys()


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("rounds/*/write", {"rounds/1/write"}),
        ("**", {"edit", "rounds/1/write", "rounds/1/write/a"}),
        ("**/write", {"rounds/1/write"}),
        ("rounds/**", {"rounds/1/write", "rounds/1/write/a"}),
        ("**/1/**/a/**", {"rounds/1/write/a"}),
        ("*/**/*/*", {"rounds/1/write", "rounds/1/write/a"}),
        ("*", {"edit"}),
        ("**/*/**/*/**/*/**/*/**/*", set()),
        ("rounds/1", set()),
    ],
)
def test_a_star_is_a_name_and_two_stars_are_any_number_of_names(pattern: str, paths: set[str]) -> None:
    assert {path for path in ("edit", "rounds/1/write", "rounds/1/write/a") if matches(path, pattern)} == paths


async def test_a_pipeline_that_is_about_to_end_for_long_is_followed_to_its_end() -> None:
    """No gateway runs its workflow: it was asked about a thousand times, and then no more."""
    ended = record_of(5)
    ended.status.state = llm_pb2.JOB_STATE_SUCCEEDED
    reader = Reader(*[record_of(5)] * 1100, ended)
    async with aclosing(messages_of(reader, feed=EndingFeed(), poll=0.0001)) as messages:
        async with asyncio.timeout(60):
            seen = [message.status.state async for message in messages if message.HasField("status")]
    assert seen[-1] == llm_pb2.JOB_STATE_SUCCEEDED


async def test_a_quiet_stream_gives_a_sign_of_life_however_often_its_gateway_asks() -> None:
    """A pipeline that waits for an answer for hours was silent so long, and proxies cut its streams."""
    async with aclosing(messages_of(Reader(record_of(5)), keepalive=0.05)) as messages:
        async with asyncio.timeout(10):
            first, *others = [await anext(messages) for _ in range(3)]
    assert first.HasField("status")
    assert [(message.HasField("status"), bool(message.cursor)) for message in others] == [(False, True)] * 2


async def test_a_stream_of_an_ended_pipeline_begins_with_what_its_reader_lacks() -> None:
    """It began with an empty message: who took one message of each connection never saw the end."""
    ended = record_of(5)
    ended.status.state = llm_pb2.JOB_STATE_SUCCEEDED
    ended.nodes.add(version=5).step.path = "outline"

    async def first(after: str) -> pipeline_pb2.StreamPipelineResponse:
        async with aclosing(messages_of(Reader(ended), after=after)) as messages:
            async with asyncio.timeout(10):
                return await anext(messages)

    tree = await first("")
    assert [step.path for step in tree.steps] == ["outline"]
    assert (await first(tree.cursor)).status.state == llm_pb2.JOB_STATE_SUCCEEDED


async def test_no_step_goes_back_where_a_later_part_of_the_tree_was_told_after_the_first() -> None:
    """A pipeline tells a large tree in parts. The feed then brings what has changed since the first."""
    told = record_of(10)
    told.nodes.add(version=15).step.state = pipeline_pb2.STEP_STATE_SUCCEEDED
    told.nodes[0].step.path = "write"

    class Following(SilentFeed):
        available = True

        async def read(self, _: str, take: Any) -> None:
            await asyncio.sleep(0.1)
            for since, version, state in (
                (10, 12, pipeline_pb2.STEP_STATE_RUNNING),
                (12, 15, pipeline_pb2.STEP_STATE_SUCCEEDED),
            ):
                record = record_of(version)
                record.nodes.add(version=version).step.state = state
                record.nodes[0].step.path = "write"
                take(internal_pb2.FeedRecord(pipeline_change={"since": since, "record": record}))
                await asyncio.sleep(0.1)

    seen = []
    async with aclosing(messages_of(Reader(told, answered=True), feed=Following(), poll=60)) as messages:
        async with asyncio.timeout(10):
            async for message in messages:
                seen += [step.state for step in message.steps]
                if message.status.root.counts.total == 15:
                    break
    assert {*seen} == {pipeline_pb2.STEP_STATE_SUCCEEDED}
