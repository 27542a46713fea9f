"""The blocks of code that the docs show."""

import re
from typing import NamedTuple

from tests.support.paths import ROOT

FENCE = re.compile(r"^```(?P<language>\w+) ?(?P<of>[\w.]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
CLIENT = ROOT / "clients" / "python"


class Block(NamedTuple):
    """A fenced block of a page."""

    place: str
    language: str
    of: str
    """What follows the language: for JSON the name of what it is."""
    text: str


def blocks() -> list[Block]:
    """Return the blocks of all pages, those of one page in its order; of the README only the calls."""
    found = []
    for page in [*sorted((ROOT / "docs").glob("*.md")), CLIENT / "README.md", ROOT / "README.md"]:
        content = page.read_text()
        for match in FENCE.finditer(content):
            line = content[: match.start()].count("\n") + 1
            if page.parent != ROOT or "buf curl" in match["text"]:
                found.append(Block(f"{page.relative_to(ROOT)}:{line}", match["language"], match["of"], match["text"]))
    return found
