"""The fenced code blocks of the docs."""

import re
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

from tests.support.paths import ROOT

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+) ?(?P<of>[\w.-]*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
CLIENT = ROOT / "clients" / "python"


class Block(NamedTuple):
    """A fenced code block of a page."""

    place: str
    language: str
    of: str
    """Text after the language. For JSON it is the name of the message that the block shows."""
    text: str


def blocks() -> list[Block]:
    """Return the blocks of all pages in order. Of the repository's README only calls and Python are included."""
    found = []
    for page in [*sorted((ROOT / "docs").glob("*.md")), CLIENT / "README.md", ROOT / "README.md"]:
        content = page.read_text()
        for match in FENCE.finditer(content):
            place = f"{page.relative_to(ROOT)}:{content[: match.start()].count(chr(10)) + 1}"
            if page.parent != ROOT or "buf curl" in match["text"] or match["language"] == "python":
                found.append(Block(place, match["language"], match["of"], dedent(match["text"])))
    return found


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
