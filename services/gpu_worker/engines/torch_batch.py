"""The model and the batch that it runs. Sequences join and leave between steps, and none changes another's tokens.

The keys and values of all sequences are in one cache, each row padded on its left to the longest. A new sequence reads
its prompt alone, a piece per step, so that the others continue meanwhile and it can be dropped at any step. Then its
row joins the cache. Masked padding adds exact zeros, so greedy output in float32 equals that of the sequence alone.

Paged attention, prefix sharing and speculative decoding are left out on purpose. Use vllm on a GPU for those.
"""

import inspect
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


@dataclass(eq=False)
class Sequence:
    """The tokens of one generation and, while it reads its prompt, their keys and values."""

    ids: list[int]
    """Prompt and output so far."""
    cached: int = 0
    """Number of ids that the model has processed."""
    cache: DynamicCache = field(default_factory=DynamicCache)


class Batch:
    """A causal model and the sequences that it generates, for one thread. A method that raises changes nothing."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device: torch.device = model.device
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        # Without it the model computes the scores of every token of the prompt, of which only the last are used.
        self._takes_logits_to_keep = "logits_to_keep" in accepted
        self.sequences: list[Sequence] = []
        """The rows of the cache, in order."""
        self._cache = DynamicCache()

    def read(self, sequence: Sequence, most: int) -> torch.Tensor | None:
        """Run the model on at most `most` tokens of a sequence that has not joined.

        Returns the scores of its next token, a vector, once all have been read; None before.
        """
        end = min(sequence.cached + most, len(sequence.ids))
        ids = torch.tensor([sequence.ids[sequence.cached : end]], device=self._device)
        positions = torch.arange(sequence.cached, end, device=self._device)[None]
        mask = torch.ones((1, end), dtype=torch.long, device=self._device)
        scores = self._forward(ids, positions, mask, sequence.cache)
        sequence.cached = end
        return scores[0] if end == len(sequence.ids) else None

    def join(self, sequence: Sequence) -> None:
        """Add a sequence that has read its prompt and been given its next token."""
        rows = [*self.sequences, sequence]
        width = max(row.cached for row in rows)
        caches = [self._cache, sequence.cache] if self.sequences else [sequence.cache]
        self._cache = cache_of(
            [
                (torch.cat([widened(keys, width) for keys, _ in same]), torch.cat([widened(v, width) for _, v in same]))
                for same in zip(*(states(cache) for cache in caches), strict=True)
            ]
        )
        self.sequences = rows
        sequence.cache = DynamicCache()

    def leave(self, leaving: Collection[Sequence]) -> None:
        """Remove sequences and the padding that only they needed. Those that have not joined are ignored."""
        kept = [row for row, sequence in enumerate(self.sequences) if sequence not in leaving]
        if len(kept) == len(self.sequences):
            return
        self.sequences = [self.sequences[row] for row in kept]
        width = max((sequence.cached for sequence in self.sequences), default=0)
        rows = torch.tensor(kept, dtype=torch.long, device=self._device)
        self._cache = cache_of(
            [(keys[rows, :, -width:], values[rows, :, -width:]) for keys, values in states(self._cache)] if kept else []
        )

    def step(self) -> torch.Tensor:
        """Run the model on every sequence's last token; return the scores of their next tokens, a row each."""
        lengths = torch.tensor([[sequence.cached] for sequence in self.sequences], device=self._device)
        width = max(sequence.cached for sequence in self.sequences)
        ids = torch.tensor([[sequence.ids[-1]] for sequence in self.sequences], device=self._device)
        mask = (torch.arange(width + 1, device=self._device)[None] >= width - lengths).long()
        try:
            scores = self._forward(ids, lengths, mask, self._cache)
        except Exception:
            # Some layers may have grown already.
            self._cache = cache_of([(keys[:, :, :width], values[:, :, :width]) for keys, values in states(self._cache)])
            raise
        for sequence in self.sequences:
            sequence.cached += 1
        return scores

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
        if self._takes_positions:
            arguments["position_ids"] = positions
        if self._takes_logits_to_keep:
            arguments["logits_to_keep"] = 1
        with torch.inference_mode():
            scores: torch.Tensor = self._model(**arguments, use_cache=True).logits[:, -1].float()
        return scores


States = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, of shape (row, head, token, number)."""


def cache_of(layers: States) -> DynamicCache:
    """Return a cache that holds the layers."""
    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


def states(cache: DynamicCache) -> States:
    """Return the layers that a cache holds."""
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def widened(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """Return keys or values with padding on the left of the tokens' axis, up to this width."""
    return torch.nn.functional.pad(tensor, (0, 0, width - tensor.shape[2], 0))


def check_model(model: Any) -> None:
    """Raise ValueError unless the model keeps plain keys and values, which is all that a Batch can pad and join."""
    sequence = Sequence(ids=[0])
    Batch(model).read(sequence, most=1)
    layers: list[Any] = sequence.cache.layers
    if {type(layer) for layer in layers} != {DynamicLayer} or any(layer.keys.dim() != 4 for layer in layers):
        raise ValueError("the model keeps a state other than keys and values; serve it with the vllm engine")
