"""The pages of the site, as the README lists them: one section for each heading, one page for each row of its table."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Final, NamedTuple

README: Final = "README.md"
BEGIN: Final = "\n## Where to read on\n"
_ROW: Final = re.compile(r"^\| (?P<note>[^|]+) \| \[[^]]+\]\((?P<path>[^)#]+)\) \|$")
# A fence may be longer than three; what is in it is no Markdown.
_FENCE: Final = re.compile(r"^(`{3,})[^\n]*\n.*?^\1$", re.MULTILINE | re.DOTALL)
_LINK: Final = re.compile(r"\]\((?!https?:|mailto:)(?P<path>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")


class Page(NamedTuple):
    """A page of the navigation."""

    path: str
    """Its file, relative to the repository's root."""
    note: str
    """What a reader wants who needs it."""


class Link(NamedTuple):
    """A relative link of a page."""

    path: str
    """The file or folder, relative to the repository's root."""
    anchor: str
    """With its #. Empty: the link names no heading."""


def sections(root: Path) -> dict[str, list[Page]]:
    """Return the pages by section, in the order in which a reader needs them. Raises ValueError without any."""
    found: dict[str, list[Page]] = {}
    for line in (root / README).read_text().partition(BEGIN)[2].splitlines():
        if line.startswith("## "):
            break
        if line.startswith("### "):
            found[line.removeprefix("### ")] = []
        elif row := _ROW.match(line):
            if not found:
                raise ValueError(f"{README}: a row comes before the first heading of a section")
            found[list(found)[-1]].append(Page(row["path"], row["note"]))
    if not found:
        raise ValueError(f"{README} has no section below {BEGIN.strip()!r}")
    return found


def with_links(text: str, page: str, changed: Callable[[Link], str]) -> str:
    """Return the Markdown with the target of each relative link replaced by `changed`, code blocks left as they are."""
    folder = PurePosixPath(page).parent

    def replaced(match: re.Match[str]) -> str:
        path = normpath(folder / match["path"]) if match["path"] else page
        return f"]({changed(Link(path, match['anchor'] or ''))})"

    pieces, end = [], 0
    for fence in _FENCE.finditer(text):
        pieces += [_LINK.sub(replaced, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, _LINK.sub(replaced, text[end:])])


def links(text: str, page: str) -> Iterator[Link]:
    """Yield the relative links of a page."""
    found: list[Link] = []

    def note(link: Link) -> str:
        found.append(link)
        return ""

    with_links(text, page, note)
    yield from found
