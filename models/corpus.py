"""The training corpus of the small model: the docstrings of the Python installation that runs this module.

The same docstrings give two kinds of document. A reference page has the signatures and docstrings of one whole module,
in the order of its source. It is long, so the model learns to continue a plain prompt. A chat asks about one name, and
the answer is that name's docstring. It is short, so the model learns the chat template and ends its answers.
"""

import ast
import builtins
import inspect
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from models.tokens import END_OF_TEXT, chat

# These folders are not the library itself: they hold its tests, an editor, a frozen grammar and demonstrations.
SKIPPED: Final = {"__pycache__", "ensurepip", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}

QUESTIONS: Final = (
    "Tell me about `{}`.",
    "What does `{}` do?",
    "What is `{}`?",
    "Explain `{}`.",
    "How do I use `{}`?",
    "Describe `{}`.",
)
SYSTEM: Final = "You know the Python standard library."


class Entry(NamedTuple):
    """One documented name."""

    name: str
    """Dotted name that begins with the module."""
    signature: str
    """The name; for a function, its arguments follow."""
    doc: str
    """The docstring, cleaned as `inspect.getdoc` cleans it."""


def reference_pages() -> Iterator[list[Entry]]:
    """Yield each module's documented names in the order of its source, then one page of the built-in names."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library)
        if SKIPPED.isdisjoint(place.parts) and not place.parts[0].startswith("config-"):
            module = ".".join(place.with_suffix("").parts).removesuffix(".__init__")
            entries = list(entries_of(ast.parse(path.read_bytes()), module))
            if entries:
                yield entries
    yield list(builtin_entries())


def entries_of(node: ast.AST, name: str) -> Iterator[Entry]:
    """Yield an entry for each docstring of the node and its descendants, depth first."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        doc = ast.get_docstring(node)
        if doc:
            function = node if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else None
            yield Entry(name, f"{name}({ast.unparse(function.args)})" if function else name, doc.strip())
    for child in ast.iter_child_nodes(node):
        child_name = getattr(child, "name", None)
        yield from entries_of(child, f"{name}.{child_name}" if isinstance(child_name, str) else name)


def builtin_entries() -> Iterator[Entry]:
    """Yield the built-in functions, types and their methods, which have no source to read."""
    for name, value in sorted(vars(builtins).items()):
        if name.startswith("_") or not callable(value):
            continue
        members = sorted(vars(value).items()) if isinstance(value, type) else []
        for dotted, item in [(name, value), *((f"{name}.{key}", item) for key, item in members if key[0] != "_")]:
            doc = inspect.getdoc(item)
            if doc:
                yield Entry(dotted, dotted, doc.strip())


def page_text(entries: list[Entry]) -> str:
    """Return a module's reference page."""
    return "\n\n".join(f"{entry.signature}\n\n{entry.doc}" for entry in entries) + "\n" + END_OF_TEXT


def chat_text(entry: Entry, rng: random.Random) -> str:
    """Return a chat about one name, in the form of the model's chat template."""
    turns = [("user", rng.choice(QUESTIONS).format(entry.name)), ("assistant", entry.doc)]
    if rng.random() < 0.2:
        turns.insert(0, ("system", SYSTEM))
    return chat(turns) + END_OF_TEXT


def documents(seed: int) -> tuple[list[str], list[str]]:
    """Return the training documents, in an order fixed by the seed, and the held-out ones: every twentieth page."""
    rng = random.Random(seed)
    learned: list[str] = []
    held_out: list[str] = []
    for number, entries in enumerate(reference_pages()):
        into = held_out if number % 20 == 19 else learned
        into.append(page_text(entries))
        into.extend(chat_text(entry, rng) for entry in entries)
    rng.shuffle(learned)
    return learned, held_out
