"""The pipeline `refine`: write, criticise and check an article until it is good, then edit the best draft."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from llm_pb import pipeline_pb2
from pipelines.program import Pipeline
from pipelines.registry import pipeline

NAME: Final = "refine"
_THRESHOLD: Final = 8.0
_MAX_ROUNDS: Final = 10
_PATIENCE: Final = 3
_TIMEOUTS: Final = {"write": 5, "critique": 3, "check": 5, "edit": 3}
"""Maximum time of each step, in minutes."""
_CRITIQUE: Final[Mapping[str, Any]] = {
    "type": "object",
    "properties": {
        "score": {"type": "number", "minimum": 0, "maximum": 10},
        "strengths": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        "weaknesses": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        "suggestions": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        "facts_doubtful": {"type": "boolean"},
    },
    "required": ["score", "strengths", "weaknesses", "suggestions", "facts_doubtful"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Draft:
    """A draft that was judged."""

    round: int
    text: str
    score: float
    remarks: str
    """What critique and check have found."""


@pipeline(NAME, pipeline_pb2.RefineSpec, pipeline_pb2.RefineResult)
async def refine(llm: Pipeline, spec: pipeline_pb2.RefineSpec) -> pipeline_pb2.RefineResult:
    """See RefineSpec."""
    steps = _Steps(spec)
    threshold = spec.quality_threshold if spec.HasField("quality_threshold") else _THRESHOLD
    last = best = await steps.round(llm, 1, None)
    while best.score < threshold and last.round < (spec.max_rounds or _MAX_ROUNDS):
        if last.round - best.round >= (spec.patience or _PATIENCE):
            break
        last = await steps.round(llm, last.round + 1, last)
        if last.score > best.score:
            best = last
    asked = f"Edit this article on {spec.topic} for language and form, and mend what the remarks name."
    article = await steps.generate(llm, "edit", f"{asked}\n\nArticle:\n{best.text}\n\nRemarks:\n{best.remarks}")
    return pipeline_pb2.RefineResult(
        article=await article.read(),
        score=best.score,
        below_threshold=best.score < threshold,
        rounds=last.round,
        best_round=best.round,
    )


class _Steps:
    """The steps of a refinement."""

    def __init__(self, spec: pipeline_pb2.RefineSpec) -> None:
        self._spec = spec

    async def round(self, llm: Pipeline, number: int, last: Draft | None) -> Draft:
        """Write a draft and judge it."""
        here, topic = llm.within(f"rounds/{number}"), self._spec.topic
        prompt = f"Write the draft of round {number} of an article on {topic}."
        if last is not None:
            prompt += f"\n\nYour last draft:\n{last.text}\n\nRemarks on it:\n{last.remarks}"
        text = await (await self.generate(here, "write", prompt)).read()
        asked = f"Criticise the draft of round {number} of an article on {topic}. Score it from 0 to 10."
        critique = (await self.generate(here, "critique", f"{asked}\n\n{text}", _CRITIQUE)).json
        score = min(max(float(critique["score"]), 0.0), 10.0)
        here.note("critique", {"score": score})
        remarks = [*critique["weaknesses"], *critique["suggestions"]]
        if critique["facts_doubtful"]:
            asked = f"Check the facts in the draft of round {number} of an article on {topic}. Name each wrong one."
            remarks.append(await (await self.generate(here, "check", f"{asked}\n\n{text}")).read())
        return Draft(number, text, score, "\n".join(f"- {remark}" for remark in remarks))

    async def generate(self, llm: Pipeline, step: str, prompt: str, schema: Mapping[str, Any] | None = None) -> Any:
        """Run the job of a step."""
        spec = self._spec
        within = timedelta(minutes=_TIMEOUTS[step])
        if step in spec.step_timeouts:
            within = spec.step_timeouts[step].ToTimedelta()
        return await llm.generate(
            step,
            model=spec.models[step] if step in spec.models else spec.models["write"],
            messages=[{"role": "user", "content": prompt}],
            schema=schema,
            timeout=within,
        )
