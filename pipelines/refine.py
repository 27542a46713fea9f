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
_REMARKS: Final = 3
_REMARK_LENGTH: Final = 160


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
        self._form = _critique_form(spec)
        self._of_texts: dict[str, Any] = {"max_tokens": spec.max_tokens} if spec.HasField("max_tokens") else {}

    async def round(self, llm: Pipeline, number: int, last: Draft | None) -> Draft:
        """Write a draft and judge it."""
        here, topic = llm.within(f"rounds/{number}"), self._spec.topic
        prompt = f"Write the draft of round {number} of an article on {topic}."
        if last is not None:
            prompt += f"\n\nYour last draft:\n{last.text}\n\nRemarks on it:\n{last.remarks}"
        text = await (await self.generate(here, "write", prompt)).read()
        asked = f"Criticise the draft of round {number} of an article on {topic}. Score it from 0 to 10."
        critique = (await self.generate(here, "critique", f"{asked}\n\n{text}", self._form)).json
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
            **({} if schema else self._of_texts),
        )


def _critique_form(spec: pipeline_pb2.RefineSpec) -> Mapping[str, Any]:
    """Return the JSON Schema of a critique."""
    remark: dict[str, Any] = {"type": "string"}
    if length := spec.max_remark_length if spec.HasField("max_remark_length") else _REMARK_LENGTH:
        remark["maxLength"] = length
    remarks = {"type": "array", "items": remark, "maxItems": spec.max_remarks or _REMARKS}
    properties = {
        "score": {"type": "number", "minimum": 0, "maximum": 10},
        **dict.fromkeys(("strengths", "weaknesses", "suggestions"), remarks),
        "facts_doubtful": {"type": "boolean"},
    }
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
