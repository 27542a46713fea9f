"""Train models/docstrings, the small model that the tests and the first run use: `python -m models.train`.

The model is a Llama of 1.6 million parameters with its own byte-level tokenizer. Training on the docstrings of the
Python that runs this module takes about ten minutes on two CPU cores. The output reads like such text, without being
true. The model is a real checkpoint in Hugging Face format that transformers and vllm load, small enough for the
repository.

The seed, the Python version and the thread count fix the result on one machine. Another processor rounds differently.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from models.corpus import documents
from models.tokens import CHAT_TEMPLATE, END_OF_TEXT, END_OF_TURN, SPECIAL

# The classes of transformers take arguments that their annotations do not name.
hugging_face: Any = transformers

SEED: Final = 20
VOCABULARY: Final = 2048
CONTEXT: Final = 2048
# Rows are short at first because that is faster. In the last LONG_SHARE of the steps they have the length of the whole
# context, so that the model learns to attend over every distance.
STEP_TOKENS: Final = 4096
SHORT_ROW: Final = 512
LONG_SHARE: Final = 0.2
PEAK_RATE: Final = 4e-3
WARM_UP: Final = 60
# vLLM's CPU attention supports head dimensions of 32, 64, 80, ...
SHAPE: Final = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
}


def train_tokenizer(texts: list[str]) -> Any:
    """Train a tokenizer on the texts. Its alphabet is the 256 bytes, so it encodes any text without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return hugging_face.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=SPECIAL[1:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: Any) -> Any:
    """Return the untrained model."""
    end_of_text, end_of_turn = (tokenizer.convert_tokens_to_ids(token) for token in (END_OF_TEXT, END_OF_TURN))
    model = hugging_face.LlamaForCausalLM(
        hugging_face.LlamaConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=end_of_text,
            eos_token_id=[end_of_text, end_of_turn],
            pad_token_id=end_of_text,
            **SHAPE,
        )
    )
    # Defaults of the sampling parameters that a request leaves unset. At temperature 1 so small a model is incoherent.
    model.generation_config = hugging_face.GenerationConfig(
        bos_token_id=end_of_text,
        eos_token_id=[end_of_text, end_of_turn],
        pad_token_id=end_of_text,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
    )
    return model


def as_stream(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Return all texts as one row of token ids."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return torch.tensor([token for encoding in encoded for token in encoding.ids])


def rate(step: int, steps: int) -> float:
    """Return the learning rate of a step: a linear warm-up, then a cosine decay to a fiftieth of PEAK_RATE."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    done = (step - WARM_UP) / (steps - WARM_UP)
    return PEAK_RATE * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)


def rows_at(stream: torch.Tensor, step: int, steps: int) -> torch.Tensor:
    """Return the step's rows, taken from the stream at random offsets."""
    length = SHORT_ROW if step < steps * (1 - LONG_SHARE) else CONTEXT
    starts = torch.randint(len(stream) - length, (STEP_TOKENS // length,))
    return torch.stack([stream[start : start + length] for start in starts])


def train(model: Any, stream: torch.Tensor, steps: int) -> float:
    """Train the model in place, print the progress, and return the mean loss of the last hundred steps."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    losses: list[float] = []
    started = time.monotonic()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        rows = rows_at(stream, step, steps)
        # bfloat16 is a third faster on a CPU with such instructions, and the loss is the same to two decimals.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 49:
            print(f"step {step + 1}: loss {sum(losses[-50:]) / 50:.3f}, {time.monotonic() - started:.0f} s", flush=True)
    return sum(losses[-100:]) / len(losses[-100:])


def held_out_loss(model: Any, stream: torch.Tensor) -> float:
    """Return the mean loss per token on documents that the model was not trained on."""
    model.eval()
    rows: Any = stream[: len(stream) // SHORT_ROW * SHORT_ROW].view(-1, SHORT_ROW)
    total = 0.0
    with torch.inference_mode():
        for part in rows.split(8):
            total += model(input_ids=part, labels=part, use_cache=False).loss.item() * len(part)
    return total / len(rows)


def main() -> None:
    """Train, evaluate and save the model; print the facts as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=1400, help="optimizer steps of 4096 tokens each")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--into", type=Path, default=Path(__file__).parent / "docstrings", help="folder to write")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    learned, held_out = documents(SEED)
    tokenizer = train_tokenizer(learned)
    stream = as_stream(tokenizer, learned)
    model = new_model(tokenizer)
    facts: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": len(stream),
        "steps": arguments.steps,
        "loss": round(train(model, stream, arguments.steps), 3),
    }
    # bfloat16 halves the size. Every engine still loads the same weights.
    model = model.to(torch.bfloat16)
    model.save_pretrained(arguments.into)
    tokenizer.save_pretrained(arguments.into)
    facts["held_out_loss"] = round(held_out_loss(model.float(), as_stream(tokenizer, held_out)), 3)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
