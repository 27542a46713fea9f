"""Refinements with scripted critiques of the simulated engine, for tests."""

import json
from typing import Any

from llm_pb import pipeline_pb2


def refinement(key: str, *scores: float, doubtful: int = 0, **changes: Any) -> pipeline_pb2.PipelineRequest:
    """Return a refinement whose critiques have these scores; that of the round `doubtful` finds facts doubtful."""
    topic = "rain"
    for number, score in enumerate(scores, 1):
        critique = {
            "score": score,
            "strengths": [],
            "weaknesses": [f"weak {number}"],
            "suggestions": ["more"],
            "facts_doubtful": number == doubtful,
        }
        topic += f"[[when Criticise the draft of round {number} : {json.dumps(critique)}]]"
    topic += "[[when Check the facts: It never rains.]]"
    pipeline = pipeline_pb2.PipelineRequest(user_id="alice", request_id=key)
    pipeline.refine.CopyFrom(pipeline_pb2.RefineSpec(topic=topic, models={"write": "docstrings"}, **changes))
    return pipeline
