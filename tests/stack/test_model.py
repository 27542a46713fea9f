"""The small model in the repository is as its README describes it: small, real, reproducible, readable.

The tests import torch, and not the module: every process of pytest-xdist imports all modules, and torch takes seconds.
"""

import json
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.tokens import CHAT_TEMPLATE, END_OF_TEXT, END_OF_TURN, chat
from tests.support.paths import ROOT

FOLDER = ROOT / "models" / "docstrings"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32")
    return model.eval()


def greedy(tokenizer: Any, model: Any, prompt: str) -> str:
    import torch

    ids = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        made = model.generate(**ids, do_sample=False, temperature=None, top_p=None, max_new_tokens=60)
    return str(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def test_it_is_small_enough_for_the_repository() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4_000_000


def test_greedy_decoding_is_reproducible(tokenizer: Any, model: Any) -> None:
    first, second = (greedy(tokenizer, model, "Return the number of") for _ in range(2))
    assert first == second


def test_its_output_reads_like_a_docstring(tokenizer: Any, model: Any) -> None:
    text = greedy(tokenizer, model, "Return the number of")
    words = text.split()
    assert len(words) > 15
    assert sum(word.strip(string.punctuation).isalpha() for word in words) > 0.8 * len(words)
    assert text.isascii()


def test_it_answers_a_chat_and_stops(tokenizer: Any, model: Any) -> None:
    import torch

    turns = [{"role": "user", "content": "Tell me about `str.join`."}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        made = model.generate(**ids, do_sample=False, temperature=None, top_p=None, max_new_tokens=200)
    assert made[0, -1] == tokenizer.convert_tokens_to_ids(END_OF_TURN)


@given(st.text())
def test_its_tokenizer_loses_nothing_of_any_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_its_chat_template_is_the_form_it_was_trained_on(tokenizer: Any) -> None:
    turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi"), ("user", "Bye")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == chat(turns) + "<|assistant|>\n"
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_its_special_tokens_are_what_its_settings_say(tokenizer: Any) -> None:
    settings = json.loads((FOLDER / "generation_config.json").read_text())
    assert settings["eos_token_id"] == tokenizer.convert_tokens_to_ids([END_OF_TEXT, END_OF_TURN])
