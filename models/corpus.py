"""What the small model learns from: the docstrings of the Python installation that runs this.

Two kinds of document come out of the same docstrings. A reference page is one whole module, signatures and texts in
the order of its source: long, so that a plain prompt has something to go on with. A chat asks about one name and gets
that name's docstring: short, so that the chat template means something and an answer ends.
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

# Not the library itself: its tests, an editor, a frozen grammar, demonstrations.
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
    """Dotted, from the module on."""
    signature: str
    """The name, with the arguments of a function."""
    doc: str
    """Its docstring, cleaned as inspect.getdoc would."""


def reference_pages() -> Iterator[list[Entry]]:
    """Yield the documented names of each module, in the order of its source; the built-in names are one page more."""
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
    """Yield the node's own docstring and those below it, depth first."""
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
    """Return the documents to learn from and those held out, every twentieth page, in an order fixed by the seed."""
    rng = random.Random(seed)
    learned: list[str] = []
    held_out: list[str] = []
    for number, entries in enumerate(reference_pages()):
        into = held_out if number % 20 == 19 else learned
        into.append(page_text(entries))
        into.extend(chat_text(entry, rng) for entry in entries)
    rng.shuffle(learned)
    return learned, held_out
