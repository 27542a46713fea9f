"""Turns documents into tokens, by the tokenizer of the base model. It is the only module here that loads tokenizers."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

from temporalio.exceptions import ApplicationError
from transformers import AutoTokenizer

from jobs.training import INVALID_DATASET, UNKNOWN_BASE_MODEL
from services.trainer.dataset import Document

_AT_ONCE: Final = 64
_FORMAT: Final = 1
"""Changes with how documents become tokens, so that no tokens of other code are taken over."""


class Tokenizing:
    """The tokenizer of a base model."""

    def __init__(self, folder: Path) -> None:
        """Load the tokenizer. Raises ApplicationError for a model without one that can end a document."""
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if self._tokenizer.eos_token_id is None:
            raise ApplicationError(
                "the base model's tokenizer has no end-of-sequence token", type=UNKNOWN_BASE_MODEL, non_retryable=True
            )

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the tokens of a document."""
        parts = (_FORMAT, self._tokenizer.backend_tokenizer.to_str(), self._tokenizer.chat_template)
        return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()

    def tokens(self, documents: Iterable[Document]) -> Iterator["array[int]"]:
        """Yield the tokens of documents, some documents at once, with the token that ends each.

        Raises ApplicationError for messages that the model's chat template refuses, or a model without one.
        """
        documents = iter(documents)
        while some := [*islice(documents, _AT_ONCE)]:
            # The texts may be longer than the context: they are cut into rows later.
            for ids in self._tokenizer([self._text(one) for one in some], add_special_tokens=False, verbose=False)[
                "input_ids"
            ]:
                yield array("i", [*ids, self._tokenizer.eos_token_id])

    def _text(self, document: Document) -> str:
        if document.text:
            return document.text
        try:
            text: str = self._tokenizer.apply_chat_template(document.messages, tokenize=False)
        except Exception as error:  # a template is a program, which raises anything
            raise ApplicationError(
                f"the base model cannot render the messages of line {document.line}: {error}",
                type=INVALID_DATASET,
                non_retryable=True,
            ) from error
        return text
