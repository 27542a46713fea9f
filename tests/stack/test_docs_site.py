"""The documentation as a site: `make docs`. Its links are checked as it is built."""

import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from deploy.docs_site.pages import Link, links, sections, with_links
from tests.support.commands import Ended, run
from tests.support.paths import ROOT

PYTHON = ROOT / ".tools" / "docs" / "bin" / "python"
needs_sphinx = pytest.mark.skipif(not PYTHON.exists(), reason="Sphinx is not there: make tools")
README = """# A title

Submit a [long](docs/first.md) job.

## Where to read on

### First steps

| I want to | page |
|---|---|
| begin | [docs/first.md](docs/first.md) |
| see what it does | [proto/a.proto](proto/a.proto) |

## Later
"""


async def build(site: Path, root: Path = ROOT) -> Ended:
    return await run(str(PYTHON), "-m", "deploy.docs_site", str(site), "--root", str(root), PYTHONPATH=str(ROOT))


@needs_sphinx
async def test_the_site_has_every_page_and_needs_nobody_else(tmp_path: Path) -> None:
    site = tmp_path / "site"
    ended = await build(site)
    assert (ended.status, ended.errors) == (0, "")
    pages = {page.path for pages in sections(ROOT).values() for page in pages}
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")} <= pages
    assert {"CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"} <= pages
    home = (site / "index.html").read_text()
    for page in pages:
        built = f"{page.removesuffix('.md')}.html"
        assert (site / built).exists(), built
        assert f'href="{built}"' in home, f"{built} is not in the navigation"
    assert (site / "searchindex.js").stat().st_size > 100_000
    found = Resources()
    for path in site.rglob("*.html"):
        found.feed(path.read_text())
    assert not {url for url in found.urls if re.match(r"(https?:)?//", url)}, "the site fetches from elsewhere"

    index = (site / "llms.txt").read_text()
    assert re.match(r"# .+\n\n> .+\n\n## .+\n\n- \[.+\]\(.+\): .+\n", index)
    listed = re.findall(r"^- \[[^]]+\]\(([^)]+)\): ", index, re.MULTILINE)
    assert len(listed) == len(pages)
    for name in ("llms.txt", "llms-full.txt", "index.html.md", *(each for each in listed if each.endswith(".md"))):
        for link in links((site / name).read_text(), name):
            assert (site / link.path).exists(), f"{name}: {link.path}"
    everything = (site / "llms-full.txt").read_text()
    assert all(f"Source: {each}\n" in everything for each in listed if each.endswith(".md"))


class Resources(HTMLParser):
    """Collects the addresses of what a browser loads with a page."""

    def __init__(self) -> None:
        super().__init__()
        self.urls = set[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in {"script", "img", "iframe", "source"}:
            self.urls.add(values.get("src") or "")
        elif tag == "link" and (values.get("rel") or "") in {"stylesheet", "icon", "preload"}:
            self.urls.add(values.get("href") or "")


@needs_sphinx
@pytest.mark.long
async def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    """Each is named, and the site of before stays."""
    root, site = tmp_path / "root", tmp_path / "site"
    for path, text in {
        "README.md": README,
        "docs/first.md": "# First\n\n## A part\n\n[here](#a-part) [there](../README.md#later)\n",
        "proto/a.proto": "// A file.\n",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    ended = await build(site, root)
    assert (ended.status, ended.errors) == (0, "")
    page = root / "docs" / "first.md"
    good = page.read_text()
    page.write_text(good + "\n[a](../README.md#nowhere) [b](#nothing)\n")
    ended = await build(site, root)
    assert ended.status != 0
    assert "'nowhere'" in ended.errors
    assert "'nothing'" in ended.errors
    page.write_text(good + "\n[c](second.md)\n")
    ended = await build(site, root)
    assert ended.status != 0
    assert "docs/first.md: docs/second.md does not exist" in ended.errors
    assert "A part" in (site / "docs" / "first.html").read_text()
    assert sorted(os.listdir(tmp_path)) == ["root", "site"]


@pytest.mark.parametrize("kept", ["Makefile", "docs/page.md"])
async def test_a_folder_that_holds_something_else_is_refused_and_kept(tmp_path: Path, kept: str) -> None:
    """Such as the repository itself: `python -m deploy.docs_site .`."""
    file = tmp_path / kept
    file.parent.mkdir(exist_ok=True)
    file.write_text("all: ;\n")
    command = (sys.executable, "-m", "deploy.docs_site", ".", "--root", str(ROOT))
    ended = await run(*command, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert ended.status == 1
    assert ended.errors == f"{tmp_path} holds other files than a site: name a new or an empty folder\n"
    assert file.read_text() == "all: ;\n"
    ended = await run(*command[:3], str(file), "--root", str(ROOT), PYTHONPATH=str(ROOT))
    assert (ended.status, ended.errors) == (1, f"{file} is no folder\n")


def test_links_in_code_are_left_as_they_are() -> None:
    text = "[a](b.md#c)\n```text\n[a](b.md)\n```\n[d](https://e.example) [f](#g) ![h](../i.png)\n"
    assert list(links(text, "docs/x.md")) == [Link("docs/b.md", "#c"), Link("docs/x.md", "#g"), Link("i.png", "")]
    changed = with_links(text, "docs/x.md", lambda link: f"/{link.path}{link.anchor}")
    assert changed == text.replace("(b.md#c)", "(/docs/b.md#c)").replace("(#g)", "(/docs/x.md#g)").replace("../i", "/i")


def test_a_readme_without_its_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# A title\n")
    with pytest.raises(ValueError, match="no section"):
        sections(tmp_path)
