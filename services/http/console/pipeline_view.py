"""What pages show of a pipeline and its steps."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from durable_llm import FINAL_STATES
from durable_llm._enums import name_of
from durable_llm._prices import amount
from llm_pb import common_pb2, llm_pb2, pipeline_pb2
from services.http.console.formats import between, number, state, words_of
from services.http.console.job_view import Problem, problem_of
from services.http.rest.messages import to_json

_LEFT: Final = {
    "output_tokens": "Output tokens left",
    "prompt_tokens": "Prompt tokens left",
    "cost_micros": "Cost left",
}


_PLACES: Final = {
    # A gateway of an earlier version tells no kind.
    pipeline_pb2.STEP_KIND_UNSPECIFIED: "/console/jobs/",
    pipeline_pb2.STEP_KIND_JOB: "/console/jobs/",
    pipeline_pb2.STEP_KIND_BATCH: "/console/batches/",
    pipeline_pb2.STEP_KIND_PIPELINE: "/console/pipelines/",
}


@dataclass
class Node:
    """A step, or what has steps below it, for templates."""

    step: pipeline_pb2.StepStatus
    below: "list[Node]" = field(default_factory=list)

    @property
    def name(self) -> str:
        """The last name of the path."""
        return self.step.path.rpartition("/")[2]

    @property
    def words(self) -> str:
        """How the step stands, in words."""
        if self.step.queued:
            return "Queued"
        return words_of(pipeline_pb2.StepState, self.step.state, "STEP_STATE_")

    @property
    def place(self) -> str:
        """The path of the page of what the step is; empty where it has none."""
        return _PLACES.get(self.step.kind, "") if self.step.workflow_id else ""

    @property
    def counts(self) -> str:
        """How many of the pieces of the step are done; empty for a step without pieces."""
        counts = self.step.counts
        if not counts.total:
            return ""
        failed = f", {number(counts.failed)} failed" if counts.failed else ""
        return f"{number(counts.succeeded)} of {number(counts.total)}{failed}"

    @property
    def training(self) -> Sequence[tuple[str, str]]:
        """How far the training is that the step runs: names and values."""
        return _training(self.step) if self.step.HasField("training") else ()

    @property
    def needs_answer(self) -> bool:
        """Whether a person can answer the step now."""
        return self.step.state == pipeline_pb2.STEP_STATE_NEEDS_ANSWER

    @property
    def problem(self) -> Problem | None:
        """Why the step failed or was cancelled; None if it did not."""
        return problem_of(self.step.error) if self.step.HasField("error") else None

    @property
    def summary(self) -> Sequence[tuple[str, str]]:
        """The answer that the step has got, and what the pipeline notes of the step: names and values."""
        answer = [("", "approved" if self.step.approved else "declined")] if self.step.HasField("approved") else []
        return answer + self._noted()

    def _noted(self) -> list[tuple[str, str]]:
        try:
            noted = json.loads(self.step.summary_json or "{}")
        except ValueError:
            noted = None
        if not isinstance(noted, dict):
            return [("", self.step.summary_json)]
        if self.step.HasField("approved") and noted == {"approved": self.step.approved}:
            # The answer is shown in words.
            return []
        return [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in noted.items()]


def tree_of(steps: Iterable[pipeline_pb2.StepStatus]) -> list[Node]:
    """Return the nodes below the root, each with those below it. What is above a step comes before it."""
    nodes: dict[str, Node] = {}
    tops: list[Node] = []
    for step in steps:
        node = nodes[step.path] = Node(step)
        above = nodes.get(step.path.rpartition("/")[0])
        (tops if above is None else above.below).append(node)
    return tops


class PipelineView:
    """A pipeline, for templates."""

    def __init__(self, status: pipeline_pb2.PipelineStatus, steps: Iterable[pipeline_pb2.StepStatus] = ()) -> None:
        """`steps` are its steps, where they are known."""
        self.status = status
        self._training = next((_training(step) for step in steps if step.HasField("training")), ())
        self.root = status.root
        self.final = status.state in FINAL_STATES
        self.state_name = name_of(llm_pb2.JobState, status.state)
        self.words = state(status.state)
        if status.root.counts.needs_answer and not self.final:
            self.words = words_of(pipeline_pb2.StepState, pipeline_pb2.STEP_STATE_NEEDS_ANSWER, "STEP_STATE_")
        self.done = status.root.counts.total - status.root.counts.running
        """Number of steps that have ended."""
        self.problem = problem_of(status.root.error) if status.root.HasField("error") else None

    @property
    def facts(self) -> Sequence[tuple[str, str]]:
        """The numbers of the pipeline: a name and a value."""
        root, counts = self.root, self.root.counts
        facts = [("Steps", number(counts.total)), ("Succeeded", number(counts.succeeded))]
        if not self.final:
            facts.append(("Running", number(counts.running)))
        facts += [(end.capitalize(), number(n)) for end in ("failed", "cancelled") if (n := getattr(counts, end))]
        facts += self._training
        facts.append(("Output tokens", number(root.usage.output_tokens)))
        if root.usage.HasField("cost_micros"):
            facts.append(("Cost", amount(root.usage.cost_micros)))
        facts += _left(self.status.left)
        if root.HasField("end_time") and root.HasField("start_time"):
            facts.append(("Duration", between(root.start_time, root.end_time)))
        return facts


def _training(step: pipeline_pb2.StepStatus) -> Sequence[tuple[str, str]]:
    """Return how far a training is: names and values."""
    training = step.training
    done = [("Training step", f"{number(training.step)} of {number(training.steps)}")]
    if training.step:
        done.append(("Loss", f"{training.loss:.4f}"))
        done.append(("Tokens/s", number(round(training.tokens_per_second))))
    return done


def _left(budget: common_pb2.Budget) -> list[tuple[str, str]]:
    """Return what is left of the limits that a budget has. One that is spent is -1 in it."""
    values = [(name, max(0, getattr(budget, field))) for field, name in _LEFT.items() if getattr(budget, field)]
    return [(name, amount(value) if name == _LEFT["cost_micros"] else number(value)) for name, value in values]


def result_of(result: pipeline_pb2.PipelineResult) -> str:
    """Return what a pipeline has made, as text: of a message with one text that text, of another one its JSON."""
    value = to_json(result).get("value", {})
    if isinstance(text := value.get("value"), str) and value["@type"].endswith("/google.protobuf.StringValue"):
        return text
    return json.dumps(value, indent=2, ensure_ascii=False)
