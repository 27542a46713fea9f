"""Copies the pages, and all that they link to, into one folder, in which Sphinx builds the site.

The folder has the repository's paths, so that a link leads to the same page in both. A file that is no page, such as a
proto file or a test, becomes a page that shows it. A folder becomes a page with the names of its files.
"""

import shutil
from pathlib import Path
from posixpath import relpath
from typing import Final

from deploy.docs_site.pages import README, Link, links, sections, with_links

_LANGUAGES: Final = {
    ".cc": "cpp",
    ".go": "go",
    ".java": "java",
    ".js": "javascript",
    ".proto": "protobuf",
    ".py": "python",
    ".rb": "ruby",
    ".yaml": "yaml",
    ".yml": "yaml",
}
_IMAGES: Final = {".png", ".svg"}
_HOME: Final = "index.md"
_ALONE: Final = "---\norphan: true\n{more}---\n\n"
"""The front matter of a page that is not in the navigation."""


class Stage:
    """The folder, and the pages in it by their names in the repository."""

    def __init__(self, root: Path, folder: Path) -> None:
        """`root` is the repository, `folder` an empty folder."""
        self.root = root.resolve()
        self._folder = folder
        self.sections = sections(root)
        self.notes = {page.path: page.note for pages in self.sections.values() for page in pages}
        self.texts: dict[str, str] = {}
        """The Markdown of each page of the repository, as it stands there."""
        self.images: list[str] = []

    def fill(self) -> None:
        """Copy everything. Raises FileNotFoundError where a link leads to nothing, and names the page."""
        waiting, seen = [README, *self.notes], set[str]()
        while waiting:
            path = waiting.pop()
            if path in seen:
                continue
            seen.add(path)
            source = self.root / path
            if source.suffix == ".md":
                text = source.read_text()
                self.texts[path] = text
                for link in links(text, path):
                    if not (self.root / link.path).exists() or link.path.startswith(".."):
                        raise FileNotFoundError(f"{path}: {link.path} does not exist in the repository")
                    waiting.append(link.path)
        for path in sorted(seen):
            source, target = self.root / path, self._folder / self._staged(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path in self.texts:
                target.write_text(self._page(path))
            elif source.suffix in _IMAGES:
                shutil.copyfile(source, target)
                self.images.append(path)
            else:
                target.write_text(self._shown(path))

    def built(self, path: str, suffix: str = ".html") -> str:
        """Return the path of a file of the repository in the site, with another suffix for its Markdown."""
        staged = self._staged(path)
        return f"{staged.removesuffix('.md')}{suffix}" if staged.endswith(".md") else staged

    def _staged(self, path: str) -> str:
        if path == README:
            return _HOME
        if Path(path).suffix in {".md", *_IMAGES}:
            return path
        return f"{path}/index.md" if (self.root / path).is_dir() else f"{path}.md"

    def _page(self, path: str) -> str:
        staged = self._staged(path)

        def changed(link: Link) -> str:
            target = self._staged(link.path)
            # A link to a place of its own page needs no path.
            return link.anchor if target == staged and link.anchor else f"/{target}{link.anchor}"

        text = with_links(self.texts[path], path, changed)
        # MyST takes the language alone; `trace` is none.
        text = text.replace("```trace", "```text")
        if path == README:
            return f"{text}\n{self._navigation()}"
        return text if path in self.notes else _ALONE.format(more="") + text

    def _navigation(self) -> str:
        trees = ["```{toctree}\n:hidden:\n\nStart here <self>\n```\n"]
        for caption, pages in self.sections.items():
            names = "\n".join("/" + self._staged(page.path) for page in pages if page.path != README)
            trees.append(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{names}\n```\n")
        return "\n".join(trees)

    def _shown(self, path: str) -> str:
        source = self.root / path
        head = "" if path in self.notes else _ALONE.format(more="nosearch: true\n")
        if source.is_dir():
            names = sorted(each.name for each in source.iterdir() if not each.name.startswith(("_", ".")))
            return f"{head}# {path}\n\n" + "".join(f"- `{name}`\n" for name in names)
        text = source.read_text()
        fence = "`" * 4
        while fence in text:
            fence += "`"
        return f"{head}# {path}\n\n{fence}{_LANGUAGES.get(source.suffix, 'text')}\n{text.rstrip()}\n{fence}\n"


def relative(path: str, page: str) -> str:
    """Return a path of the site as a link on one of its pages."""
    return relpath(path, Path(page).parent.as_posix())
