"""Loads a model for the torch engine, with its tokenizer and its defaults, from a folder in Hugging Face format."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from llm_pb import llm_pb2
from services.gpu_worker.engines.output_text import Decode, decoder
from services.gpu_worker.engines.torch_batch import check_model
from services.gpu_worker.engines.torch_sampling import WITH_MODEL_DEFAULT


class TorchOptions(BaseModel):
    """The torch engine's options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str | None = None
    """A torch device such as "cuda:1" or "cpu". Default: the GPU if there is one."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] | None = None
    """Type of the numbers in computations; "auto" is that of the checkpoint. Default: float32 on a CPU, else auto."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of a step. Default: torch's own, all cores."""
    context_tokens: int | None = Field(None, ge=2)
    """Maximum number of tokens of prompt and output together. Its default and upper bound are the model's own
    maximum."""
    prefill_tokens: int = Field(512, ge=1)
    """Maximum number of prompt tokens that are read in one step, between two steps of the running generations."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run."""

    model: Any
    tokenizer: Any
    context_tokens: int
    end_ids: frozenset[int]
    """Tokens that end an answer."""
    defaults: dict[str, Any]
    """The model's own sampling parameters, from its generation_config.json."""
    gpu: llm_pb2.GpuInfo
    decode: Decode
    """Returns the text of tokens, special ones left out."""
    decode_token: Decode
    """Returns the text of tokens as logprobs show it, special or not."""

    @property
    def vocab_size(self) -> int:
        """Number of scores of each token. Some of them may belong to no token."""
        return int(self.model.config.get_text_config().vocab_size)


def load_model(path: str, options: TorchOptions) -> LoadedModel:
    """Load a model, which takes seconds to minutes. Raises the exceptions of transformers and torch."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = options.dtype or ("float32" if device.type == "cpu" else "auto")
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model.to(device).eval()
    check_model(model)
    text_config = model.config.get_text_config()
    made_for = getattr(text_config, "max_position_embeddings", None) or tokenizer.model_max_length
    changed = model.generation_config.to_diff_dict()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        context_tokens=min(made_for, options.context_tokens or made_for),
        end_ids=frozenset(
            end_id
            for source in (model.generation_config.eos_token_id, tokenizer.eos_token_id)
            if source is not None
            for end_id in (source if isinstance(source, list) else [source])
        ),
        defaults={name: changed[name] for name in WITH_MODEL_DEFAULT if changed.get(name) is not None},
        gpu=gpu_info(device),
        decode=decoder(tokenizer),
        decode_token=decoder(tokenizer, skip_special_tokens=False),
    )


def gpu_info(device: torch.device) -> llm_pb2.GpuInfo:
    """Return the description of the device, for results."""
    if device.type != "cuda":
        return llm_pb2.GpuInfo(name=device.type)
    properties = torch.cuda.get_device_properties(device)
    return llm_pb2.GpuInfo(name=properties.name, memory_bytes=properties.total_memory, count=1)
