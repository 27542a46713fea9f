"""A model of two layers that trains in seconds, and data sets for it."""

import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from llm_pb import common_pb2, pipeline_pb2
from models import DOCSTRINGS

_numbers = itertools.count(1)
_WORDS: Final = ["rain", "sun", "wind", "snow", "fog", "hail", "cold", "warm", "wet", "dry", "grey", "blue"]


def write_tiny_model(folder: Path) -> Path:
    """Write an untrained model of two layers with the tokenizer of the bundled model, and return its folder."""
    # A second of imports, for those alone who need a model.
    import torch
    import transformers

    hugging_face: Any = transformers
    tokenizer = hugging_face.AutoTokenizer.from_pretrained(DOCSTRINGS)
    torch.manual_seed(7)
    config = hugging_face.LlamaConfig(
        vocab_size=2048,
        max_position_embeddings=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=[0, 1],
        pad_token_id=0,
        # So that what is random in a step matters.
        attention_dropout=0.1,
    )
    hugging_face.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentences(count: int, seed: int = 1) -> list[str]:
    """Return different sentences of few words."""
    chance = random.Random(seed)
    return [f"Day {number}: {' '.join(chance.choices(_WORDS, k=12))}." for number in range(count)]


def jsonl(texts: Iterable[str]) -> bytes:
    """Return texts as a data set."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def new_training(dataset: common_pb2.FileRef, **changes: Any) -> pipeline_pb2.PipelineRequest:
    """Return a training of the tiny model under a new key."""
    number = next(_numbers)
    pipeline = pipeline_pb2.PipelineRequest(user_id="trainer", request_id=f"train-{number}")
    values = {"base_model": "tiny", "model": "tuned", "steps": 40, "learning_rate": 0.01, "step_tokens": 128, **changes}
    pipeline.training.CopyFrom(pipeline_pb2.TrainingSpec(dataset=dataset, **values))
    return pipeline
