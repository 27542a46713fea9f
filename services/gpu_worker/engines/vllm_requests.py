"""Conversion of requests and outputs between the types of vLLM and those of llm.proto."""

from typing import Any, Final

from vllm.sampling_params import StructuredOutputsParams

from llm_pb import llm_pb2

SAME_NAME: Final = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logprobs",
)
"""Fields that SamplingParams of llm.proto and of vLLM have in common, with the same meaning."""


def structured_outputs(params: llm_pb2.SamplingParams) -> StructuredOutputsParams | None:
    """Return the constraint on the output's form, if there is one."""
    kind = params.WhichOneof("structured_output")
    if kind == "json_schema":
        return StructuredOutputsParams(json=params.json_schema)
    if kind == "regex":
        return StructuredOutputsParams(regex=params.regex)
    if kind == "choice":
        return StructuredOutputsParams(choice=list(params.choice.options))
    return None


def token_logprobs(place: Any, chosen: int, most: int, decode: Any) -> llm_pb2.TokenLogprobs:
    """Return vLLM's log probabilities at one position, a mapping from token to Logprob."""
    ordered = sorted(place.items(), key=lambda item: item[1].rank)
    top = [llm_pb2.TokenLogprob(token=decode([token]), logprob=value.logprob) for token, value in ordered[:most]]
    return llm_pb2.TokenLogprobs(
        chosen=llm_pb2.TokenLogprob(token=decode([chosen]), logprob=place[chosen].logprob), top=top
    )
