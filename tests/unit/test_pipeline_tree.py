"""The tree of a pipeline's steps: what may begin, what may be asked, and when it is full."""

from datetime import UTC, datetime

import pytest

from jobs.errors import reason_of
from jobs.pipelines import MAX_NODES, MAX_STEPS, failure
from llm_pb import common_pb2, pipeline_pb2
from pipelines import StepFailed
from pipelines.tree import Tree

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def new_tree(steps: int = 0, max_path: int = 100) -> Tree:
    tree = Tree(pipeline_pb2.StepStatus(), max_path)
    for number in range(steps):
        tree.begin(f"s{number}", NOW)
    return tree


def test_what_undoes_is_not_bounded() -> None:
    """A pipeline that fails because of too many steps can still run its compensations."""
    tree = new_tree(MAX_STEPS)
    with pytest.raises(StepFailed) as failed:
        tree.begin("more", NOW)
    assert failed.value.reason == "TOO_MANY_STEPS"
    tree.begin("undo", NOW, bounded=False)


def test_steps_beyond_the_maximum_of_nodes_are_counted() -> None:
    """The state of the workflow stays bounded, and usage and counts are those of all steps."""
    root = pipeline_pb2.StepStatus()
    tree = Tree(root)
    for number in range(MAX_NODES + 2):
        tree.begin(f"s{number}", NOW)
        assert len(tree.nodes) == min(number + 1, MAX_NODES)
    assert (root.counts.total, root.counts.running) == (MAX_NODES + 2, MAX_NODES + 2)
    for number in (0, MAX_NODES, MAX_NODES + 1):
        state = pipeline_pb2.STEP_STATE_FAILED if number == MAX_NODES else pipeline_pb2.STEP_STATE_SUCCEEDED
        tree.end(f"s{number}", state, NOW, common_pb2.Usage(output_tokens=2))
    assert (root.counts.succeeded, root.counts.failed, root.counts.running) == (2, 1, MAX_NODES - 1)
    assert root.usage.output_tokens == 6


def test_a_step_that_nobody_can_see_asks_nothing() -> None:
    tree = new_tree(MAX_NODES + 1)
    tree.ask(f"s{MAX_NODES - 1}", "May I?")
    node = tree.node(f"s{MAX_NODES - 1}")
    assert node is not None
    assert node.step.state == pipeline_pb2.STEP_STATE_NEEDS_ANSWER
    with pytest.raises(StepFailed) as failed:
        tree.ask(f"s{MAX_NODES}", "May I?")
    assert failed.value.reason == "TOO_MANY_STEPS"


def test_who_waits_for_an_answer_is_counted_until_it_is_there_or_nobody_waits_any_more() -> None:
    tree = new_tree(0)
    for path in ("a/1", "a/2"):
        tree.begin(path, NOW)
        tree.ask(path, "May I?")
    group = tree.node("a")
    assert group is not None
    assert group.step.counts.needs_answer == 2
    tree.answered("a/1")
    tree.end("a/1", pipeline_pb2.STEP_STATE_SUCCEEDED, NOW, common_pb2.Usage())
    assert group.step.counts.needs_answer == 1
    tree.end("a/2", pipeline_pb2.STEP_STATE_CANCELLED, NOW, common_pb2.Usage())
    assert group.step.counts.needs_answer == 0


def test_questions_of_a_pipeline_within_are_counted_above_it() -> None:
    """Until it ends, whatever its result counts. One that comes later changes nothing."""
    tree = new_tree()
    tree.begin("a/inner", NOW, pipeline_pb2.STEP_KIND_PIPELINE)
    group = tree.node("a")
    assert group is not None
    for count in (2, 1):
        tree.questions("a/inner", count)
        inner = tree.node("a/inner")
        assert inner is not None
        assert (inner.step.counts.needs_answer, group.step.counts.needs_answer) == (count, count)
    tree.change("a/inner").counts.CopyFrom(common_pb2.WorkCounts(total=3, succeeded=3))
    tree.end("a/inner", pipeline_pb2.STEP_STATE_SUCCEEDED, NOW, common_pb2.Usage())
    tree.questions("a/inner", 1)
    assert (inner.step.counts.needs_answer, group.step.counts.needs_answer) == (0, 0)


def test_an_error_with_a_long_reason_leaves_its_step_small() -> None:
    """The reason is the type of an error of an operator's activity. Temporal refuses a tree that is too large."""
    tree = new_tree(1)
    tree.end("s0", pipeline_pb2.STEP_STATE_FAILED, NOW, common_pb2.Usage(), failure("T" * 500_000, "no"))
    node = tree.node("s0")
    assert node is not None
    assert node.ByteSize() < 1024
    assert reason_of(node.step.error) == "T" * 128


def test_a_pipeline_within_a_pipeline_has_shorter_paths() -> None:
    """The id of a step's job is the pipeline's id and the path, and has to fit."""
    tree = new_tree(max_path=5)
    tree.begin("abcde", NOW)
    with pytest.raises(ValueError, match=r"no step can have the path 'abcdef': .* room for a path of 5 characters"):
        tree.begin("abcdef", NOW)
