"""Writes what language models read, in the form of https://llmstxt.org: llms.txt, llms-full.txt, the pages' Markdown.

llms.txt lists the pages with a note each. llms-full.txt holds them all. The Markdown of a page is next to it, under its
name with `.md` appended.
"""

import shutil
from pathlib import Path
from typing import Final

from deploy.docs_site.pages import README, Link, with_links
from deploy.docs_site.stage import Stage, relative

_SUFFIX: Final = ".html.md"


def write(stage: Stage, site: Path, title: str, summary: str) -> None:
    """Write the files into the built site."""
    for path, text in stage.texts.items():
        target = site / stage.built(path, _SUFFIX)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_linked(stage, text, path, target.relative_to(site).as_posix()))
    for path in stage.images:
        # Sphinx has a folder for all images, where only HTML finds them.
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(stage.root / path, site / path)
    (site / "llms.txt").write_text(_index(stage, title, summary))
    (site / "llms-full.txt").write_text(_all(stage))


def _linked(stage: Stage, text: str, path: str, page: str) -> str:
    def changed(link: Link) -> str:
        target = stage.built(link.path, _SUFFIX if link.path in stage.texts else ".html")
        return link.anchor if target == page and link.anchor else relative(target, page) + link.anchor

    return with_links(text, path, changed)


def _index(stage: Stage, title: str, summary: str) -> str:
    lines = [f"# {title}", "", f"> {summary}", ""]
    for section, pages in stage.sections.items():
        lines += [f"## {section}", ""]
        for page in pages:
            name = _heading(stage, page.path)
            suffix = _SUFFIX if page.path in stage.texts else ".html"
            lines.append(f"- [{name}]({stage.built(page.path, suffix)}): {page.note}")
        lines.append("")
    return "\n".join(lines)


def _all(stage: Stage) -> str:
    order = dict.fromkeys([README, *(path for path in stage.notes if path in stage.texts)])
    pages = []
    for path in order:
        text = _linked(stage, stage.texts[path], path, "llms-full.txt").strip()
        pages.append(f"Source: {stage.built(path, _SUFFIX)}\n\n{text}\n")
    return "\n---\n\n".join(pages)


def _heading(stage: Stage, path: str) -> str:
    lines = stage.texts.get(path, "").splitlines()
    return next((line.removeprefix("# ") for line in lines if line.startswith("# ")), path)
