"""Data sets: JSONL in which each line is a document. Equal ones count once, some are held out.

A document is known by the hash of its words, so that case and white space make no other document of it.
"""

import hashlib
import heapq
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from temporalio.exceptions import ApplicationError

from jobs.training import INVALID_DATASET, LEAKED_DATASET, LIMIT_EXCEEDED

MAX_LINE_BYTES: Final = 4 * 1024 * 1024
MAX_MESSAGES: Final = 1000
_HELD_OUT: Final = 20
"""One of so many documents is held out, where no file of held-out documents is given."""
_PIECE_BYTES: Final = 1024 * 1024
_SHOWN: Final = 5
"""Maximum number of lines that an error names."""
_ROLES: Final = ("system", "user", "assistant")


class Document(NamedTuple):
    """A document of a data set."""

    line: int
    """The number of its line, from 1."""
    text: str
    """Empty for messages."""
    messages: list[dict[str, str]]
    """As role and content. Empty for a text."""

    @property
    def digest(self) -> bytes:
        """The hash of the words."""
        parts = [self.text, *(f"{one['role']}\0{one['content']}" for one in self.messages)]
        words = "\1".join(" ".join(part.split()).casefold() for part in parts)
        return hashlib.sha256(words.encode()).digest()[:16]


class Contents(NamedTuple):
    """What there is in the files of a training."""

    documents: int
    """Number of documents, equal ones included."""
    held_out_documents: int
    """Number of documents in the file of held-out ones."""
    held_out: frozenset[bytes]
    """The hashes of the documents that are held out."""


class Invalid(ValueError):
    """A line is no document."""


def inspect(
    dataset: Path, held_out: Path | None, max_documents: int, progressed: Callable[[], object] = lambda: None
) -> Contents:
    """Read the files of a training. Calls `progressed` for each MiB.

    Raises ApplicationError, which is not retried, for what cannot be trained on.
    """
    lines: dict[bytes, int] = {}
    documents = 0
    for document in read(dataset, "dataset", max_documents, progressed):
        documents += 1
        lines.setdefault(document.digest, document.line)
    if held_out is None:
        if len(lines) < 2:
            raise _refused(INVALID_DATASET, "dataset has fewer than two documents that differ: one is held out")
        chosen = heapq.nsmallest(-(-len(lines) // _HELD_OUT), lines)
        return Contents(documents, 0, frozenset(chosen))
    others: set[bytes] = set()
    number = 0
    for document in read(held_out, "held_out", max_documents, progressed):
        number += 1
        others.add(document.digest)
    if not lines or not others:
        raise _refused(INVALID_DATASET, f"{'held_out' if lines else 'dataset'} has no document")
    if leaked := sorted(lines[digest] for digest in others & lines.keys()):
        shown = ", ".join(map(str, leaked[:_SHOWN]))
        raise _refused(
            LEAKED_DATASET, f"{len(leaked)} documents of dataset are in held_out as well, on its lines {shown}"
        )
    return Contents(documents, number, frozenset(others))


def read(
    path: Path, field: str, max_documents: int, progressed: Callable[[], object] = lambda: None
) -> Iterator[Document]:
    """Yield the documents of a file. Calls `progressed` for each MiB.

    Raises ApplicationError, which is not retried, after its last line.
    """
    problems: list[str] = []
    count = number = size = 0
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            size += len(line)
            if size >= _PIECE_BYTES:
                size = 0
                progressed()
            if len(line) > MAX_LINE_BYTES:
                raise _refused(INVALID_DATASET, f"{field}: line {number} has more than {MAX_LINE_BYTES} bytes")
            if not line.strip():
                continue
            count += 1
            if count > max_documents:
                raise _refused(LIMIT_EXCEEDED, f"{field} has more than {max_documents} documents")
            try:
                yield _document(number, line)
            except Invalid as error:
                problems.append(f"line {number} {error}")
                if len(problems) == _SHOWN:
                    break
    if problems:
        raise _refused(INVALID_DATASET, f"{field}: {'; '.join(problems)}")


def _document(number: int, line: bytes) -> Document:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        # Of bytes json would take UTF-16 as well.
        raise Invalid(f"is no UTF-8 from byte {error.start} on") from None
    except (ValueError, RecursionError):
        raise Invalid("is no JSON") from None
    if not isinstance(value, dict) or ("text" in value) == ("messages" in value):
        raise Invalid('must be an object with either "text" or "messages"')
    if "text" in value:
        return Document(number, _text(value["text"], "text"), [])
    messages = value["messages"]
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        raise Invalid(f"has messages that are no array of 1 to {MAX_MESSAGES}")
    read = [_message(message) for message in messages]
    if not any(message["role"] == "assistant" for message in read):
        raise Invalid("has no message of the assistant, so nothing to learn")
    return Document(number, "", read)


def _message(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or value.get("role") not in _ROLES:
        raise Invalid(f"has a message whose role is none of {', '.join(_ROLES)}")
    return {"role": value["role"], "content": _text(value.get("content"), "content")}


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Invalid(f"has a {field} that is no text, or empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Invalid(f"has a {field} with half a surrogate pair") from None
    return value


def _refused(reason: str, message: str) -> ApplicationError:
    return ApplicationError(message, type=reason, non_retryable=True)
