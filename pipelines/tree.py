"""The tree of a pipeline's steps."""

from datetime import datetime
from typing import Final

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from google.rpc import status_pb2

    from jobs.batches import add_usage
    from jobs.pipelines import (
        MAX_NODES,
        MAX_PATH,
        MAX_STEPS,
        MAX_TOLD_BYTES,
        PATH_RULE,
        TOO_MANY_STEPS,
        failure,
        is_path,
        parents,
        shown_error,
    )
    from llm_pb import common_pb2, internal_pb2, pipeline_pb2
    from pipelines.errors import StepFailed

_COUNTS: Final = {
    pipeline_pb2.STEP_STATE_SUCCEEDED: "succeeded",
    pipeline_pb2.STEP_STATE_FAILED: "failed",
    pipeline_pb2.STEP_STATE_CANCELLED: "cancelled",
}


class Tree:
    """The steps of a pipeline, and what is above them. Its version grows with each change."""

    def __init__(self, root: pipeline_pb2.StepStatus, max_path: int = MAX_PATH) -> None:
        """`root` is the node of the pipeline itself. It is kept up to date. `max_path` is in characters."""
        self._max_path = max_path
        self.version = 1
        self._root = root
        self._nodes: dict[str, internal_pb2.PipelineNode] = {}
        self._above: set[str] = set()
        """Paths that have steps below them."""
        self._steps: set[str] = set()
        self._questions: dict[str, int] = {}
        """How many steps of a pipeline that is a step wait for an answer, by its path."""

    @property
    def nodes(self) -> list[internal_pb2.PipelineNode]:
        """All nodes but the root, in the order in which they began."""
        return [*self._nodes.values()]

    @property
    def left(self) -> int:
        """How many steps may still begin."""
        return MAX_STEPS - len(self._steps)

    def changed_since(self, version: int) -> list[internal_pb2.PipelineNode]:
        """Return the nodes that have changed since a version."""
        return [node for node in self._nodes.values() if node.version > version]

    def part(self, first: int) -> list[internal_pb2.PipelineNode]:
        """Return nodes from the number `first` on: as many as MAX_TOLD_BYTES have room for, and at least one."""
        size = 0
        found: list[internal_pb2.PipelineNode] = []
        for node in self.nodes[first:]:
            size += node.ByteSize()
            if found and size > MAX_TOLD_BYTES:
                break
            found.append(node)
        return found

    def node(self, path: str) -> internal_pb2.PipelineNode | None:
        """Return the node of a path; None where there is none, or the step is only counted."""
        return self._nodes.get(path)

    def begin(
        self,
        path: str,
        now: datetime,
        kind: "pipeline_pb2.StepKind.ValueType" = pipeline_pb2.STEP_KIND_ACTIVITY,
        *,
        bounded: bool = True,
    ) -> None:
        """Add a step that runs. Raises ValueError for a bad path or one that is taken.

        Raises StepFailed for one too many, unless it is not `bounded`.
        """
        if not is_path(path):
            raise ValueError(f"no step can have the path {path!r}: {PATH_RULE}")
        if len(path) > self._max_path:
            message = f"the id of this pipeline leaves room for a path of {self._max_path} characters"
            raise ValueError(f"no step can have the path {path!r}: {message}")
        if path in self._steps or path in self._above or self._steps.intersection(parents(path)):
            raise ValueError(f"the pipeline has a step at {path!r} already")
        if bounded and len(self._steps) >= MAX_STEPS:
            raise StepFailed(path, failure(TOO_MANY_STEPS, f"a pipeline has at most {MAX_STEPS} steps"))
        self._steps.add(path)
        for above in parents(path):
            if above:
                self._above.add(above)
                self._add(above, now, pipeline_pb2.STEP_KIND_GROUP)
            self._count(above, "total", 1)
            self._count(above, "running", 1)
            if (node := self._status(above)) is not None:
                node.state = pipeline_pb2.STEP_STATE_RUNNING
                node.ClearField("end_time")
        self._add(path, now, kind)

    def change(self, path: str) -> pipeline_pb2.StepStatus:
        """Return the status of a step for a change of it. What is changed of a step that is only counted is lost."""
        node = self._nodes.get(path)
        if node is None:
            return pipeline_pb2.StepStatus()
        self._touch(path)
        return node.step

    def ask(self, path: str, question: str) -> None:
        """Note that a step waits for an answer. Raises StepFailed for one that is only counted: nobody would see it."""
        if path not in self._nodes:
            message = f"the step is not among the first {MAX_NODES} nodes, so that nobody can answer it"
            raise StepFailed(path, failure(TOO_MANY_STEPS, message))
        step = self.change(path)
        step.state, step.question = pipeline_pb2.STEP_STATE_NEEDS_ANSWER, question
        self._count_above(path, "needs_answer", 1)

    def answered(self, path: str) -> None:
        """Note that a step has its answer, or that nobody can answer it any more."""
        step = self.change(path)
        if step.state == pipeline_pb2.STEP_STATE_NEEDS_ANSWER:
            step.state = pipeline_pb2.STEP_STATE_RUNNING
            self._count_above(path, "needs_answer", -1)

    def questions(self, path: str, count: int) -> None:
        """Note how many steps of a pipeline that is a step wait for an answer. One that does not run has none."""
        node = self._nodes.get(path)
        if node is None or node.step.state != pipeline_pb2.STEP_STATE_RUNNING:
            return
        more = count - self._questions.get(path, 0)
        self._questions[path] = count
        self.change(path).counts.needs_answer = count
        self._count_above(path, "needs_answer", more)

    def end(
        self,
        path: str,
        state: "pipeline_pb2.StepState.ValueType",
        now: datetime,
        usage: common_pb2.Usage,
        error: status_pb2.Status | None = None,
    ) -> None:
        """Note that a step has ended."""
        self.answered(path)
        if self._questions.get(path):
            self.questions(path, 0)
        step = self.change(path)
        step.state = state
        step.usage.CopyFrom(usage)
        step.end_time.FromDatetime(now)
        if error is not None:
            step.error.CopyFrom(shown_error(error))
        for above in parents(path):
            counted = self._status(above)
            self._count(above, "running", -1)
            self._count(above, _COUNTS[state], 1)
            if counted is not None:
                add_usage(counted.usage, usage)
                if above and not counted.counts.running:
                    counted.state = state
                    counted.end_time.FromDatetime(now)

    def touch(self) -> None:
        """Note that something outside of the nodes has changed."""
        self.version += 1

    def _status(self, path: str) -> pipeline_pb2.StepStatus | None:
        if not path:
            return self._root
        node = self._nodes.get(path)
        return None if node is None else node.step

    def _add(self, path: str, now: datetime, kind: "pipeline_pb2.StepKind.ValueType") -> None:
        if path in self._nodes or len(self._nodes) >= MAX_NODES:
            return
        step = pipeline_pb2.StepStatus(path=path, state=pipeline_pb2.STEP_STATE_RUNNING, kind=kind)
        step.start_time.FromDatetime(now)
        self._nodes[path] = internal_pb2.PipelineNode(step=step, number=len(self._nodes))
        self._touch(path)

    def _count_above(self, path: str, field: str, more: int) -> None:
        for above in parents(path):
            self._count(above, field, more)

    def _count(self, path: str, field: str, more: int) -> None:
        if (status := self._status(path)) is not None:
            setattr(status.counts, field, getattr(status.counts, field) + more)
            self._touch(path)

    def _touch(self, path: str) -> None:
        self.version += 1
        if (node := self._nodes.get(path)) is not None:
            node.version = self.version
