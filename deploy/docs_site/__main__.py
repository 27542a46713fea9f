"""Builds the site of the documentation: `make docs`.

    python -m deploy.docs_site FOLDER [--root REPOSITORY]

Runs in an environment that has Sphinx: requirements/docs.txt. A link that leads to no page or to no heading fails the
build. The folder is replaced: one that holds something else than such a site is refused.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from deploy.docs_site import llms
from deploy.docs_site.pages import README
from deploy.docs_site.stage import Stage

_HERE: Final = Path(__file__).parent
_OURS: Final = "llms.txt"
"""The file that says that a folder holds a site of this program, so that it may be removed."""


def main() -> int:
    """Build the site; return Sphinx's exit status, or 1 for a link to no file or a folder that holds something else."""
    parser = argparse.ArgumentParser(prog="python -m deploy.docs_site", description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder of the site: new, empty, or a site from before")
    parser.add_argument("--root", type=Path, default=_HERE.parents[1], help="the repository")
    asked = parser.parse_args()
    site = asked.folder.resolve()
    if site.exists() and not site.is_dir():
        print(f"{site} is no folder", file=sys.stderr)
        return 1
    if site.exists() and any(site.iterdir()) and not (site / _OURS).exists():
        print(f"{site} holds other files than a site: name a new or an empty folder", file=sys.stderr)
        return 1
    site.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        # On the site's file system, so that a rename replaces the site.
        tempfile.TemporaryDirectory(dir=site.parent, prefix=f".{site.name}-") as workplace,
    ):
        stage = Stage(asked.root, Path(folder))
        try:
            stage.fill()
        except FileNotFoundError as error:
            print(error, file=sys.stderr)
            return 1
        new = Path(workplace, "new")
        # -n: a reference that leads nowhere is a warning; -W: a warning is an error; all are shown.
        options = ("-q", "-n", "-W", "--keep-going", "-d", f"{folder}/.doctrees", "-c", str(_HERE))
        command = (sys.executable, "-m", "sphinx", "-b", "html", *options, folder, str(new))
        built = subprocess.run(command, check=False)
        if built.returncode == 0:
            llms.write(stage, new, *_title_and_summary(stage.texts[README]))
            shutil.rmtree(site, ignore_errors=True)
            new.rename(site)
        return built.returncode


def _title_and_summary(readme: str) -> tuple[str, str]:
    """Return the README's title, and its paragraph that says what the suite does, without links."""
    title, _, rest = readme.removeprefix("# ").partition("\n")
    summary = next(part for part in rest.strip().split("\n\n") if part.startswith("Submit "))
    return title, re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", " ".join(summary.split()))


sys.exit(main())
