"""How the torch engine chooses a token from a row of scores. Order and meaning of the parameters follow vLLM.

A drawn token depends only on the seed, its position in the output and the scores. It depends neither on the batch, nor
on which attempt generated the tokens before it. So a seeded generation can be continued exactly.
"""

import hashlib
import secrets
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from llm_pb import llm_pb2
from services.gpu_worker.engines.output_text import Decode

# The fields of SamplingParams that a model's generation_config.json may give another default.
WITH_MODEL_DEFAULT: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# Below this temperature the division would overflow; greedy is its limit.
GREEDY_BELOW: Final = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How one generation's tokens are chosen; see llm.proto for what each parameter means."""

    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def plain(self) -> bool:
        """Whether the token is the likeliest by the model's own scores, and nothing else is asked for."""
        return self.greedy and not self.min_tokens and self.logprobs is None and not self.penalised

    @property
    def penalised(self) -> bool:
        """Whether tokens seen so far change the scores."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)


def sampling_of(params: llm_pb2.SamplingParams, defaults: Mapping[str, Any]) -> Sampling:
    """Return the sampling of a job: as it asks, else by the model's defaults, else neutral with a random seed."""
    asked = {field.name: value for field, value in params.ListFields() if field.name in Sampling.__dataclass_fields__}
    return Sampling(**{"seed": secrets.randbits(63), **defaults, **asked})


@dataclass(frozen=True)
class SamplingContext:
    """The tokens before the one that is chosen."""

    prompt: Sequence[int]
    output: Sequence[int]
    end_ids: Collection[int]
    """Tokens that would end the output; not to be chosen before min_tokens."""


def choose(scores: torch.Tensor, sampling: Sampling, context: SamplingContext) -> int:
    """Return the next token for one row of scores (float32, on the CPU). The scores are left as they are."""
    scores = penalised(scores, sampling, context)
    if len(context.output) < sampling.min_tokens:
        going_on = scores.index_fill(0, torch.tensor(list(context.end_ids), dtype=torch.long), float("-inf"))
        # Nothing but the end follows structured output that is complete.
        if going_on.max() > float("-inf"):
            scores = going_on
    if sampling.greedy:
        return int(scores.argmax())
    return draw(candidates(scores / sampling.temperature, sampling), sampling.seed, len(context.output))


def penalised(scores: torch.Tensor, sampling: Sampling, context: SamplingContext) -> torch.Tensor:
    """Return the scores with the penalties for tokens seen so far. The repetition penalty also counts the prompt."""
    if not sampling.penalised:
        return scores
    scores = scores.clone()
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*context.prompt, *context.output}))
        old = scores[seen]
        scores[seen] = torch.where(old > 0, old / sampling.repetition_penalty, old * sampling.repetition_penalty)
    counts = Counter(context.output)
    if counts:
        made = torch.tensor(list(counts))
        scores[made] -= sampling.frequency_penalty * torch.tensor(list(counts.values())) + sampling.presence_penalty
    return scores


def candidates(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return the probabilities, zero for the tokens that min_p, top_k and top_p leave out."""
    if sampling.min_p:
        probabilities = scores.softmax(-1)
        scores = scores.masked_fill(probabilities < sampling.min_p * probabilities.max(), float("-inf"))
    if 0 < sampling.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], float("-inf"))
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        # A token stays while those before it do not yet add up to top_p; the likeliest always stays.
        probabilities[order[ordered.cumsum(-1) - ordered >= sampling.top_p]] = 0
    return probabilities


def draw(probabilities: torch.Tensor, seed: int, position: int) -> int:
    """Return a token drawn with these probabilities (they need not add up to 1)."""
    mixed = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed, "big") >> 1)
    # The first of independent exponential clocks wins. The rate of each is the probability of its token.
    clocks = torch.empty_like(probabilities).exponential_(generator=generator)
    return int((probabilities / clocks).argmax())


def token_logprobs(scores: torch.Tensor, chosen: int, most: int, decode: Decode) -> llm_pb2.TokenLogprobs:
    """Return the log probabilities at one position, by the model's own scores, before any parameter changed them."""
    logprobs = scores.log_softmax(-1)
    top = logprobs.topk(most)
    return llm_pb2.TokenLogprobs(
        chosen=llm_pb2.TokenLogprob(token=decode([chosen]), logprob=float(logprobs[chosen])),
        top=[
            llm_pb2.TokenLogprob(token=decode([token]), logprob=value)
            for token, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ],
    )
