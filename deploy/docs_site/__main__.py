"""Builds the site of the documentation: `make docs`.

    python -m deploy.docs_site FOLDER [--root REPOSITORY]

Runs in an environment that has Sphinx: requirements/docs.txt. A link that leads to no page or to no heading fails the
build.
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


def main() -> int:
    """Build the site; return Sphinx's exit status, or 1 where a link leads to no file."""
    parser = argparse.ArgumentParser(prog="python -m deploy.docs_site", description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder of the site; what it holds is removed")
    parser.add_argument("--root", type=Path, default=_HERE.parents[1], help="the repository")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(asked.root, Path(folder))
        try:
            stage.fill()
        except FileNotFoundError as error:
            print(error, file=sys.stderr)
            return 1
        new = Path(f"{asked.folder}.new")
        shutil.rmtree(new, ignore_errors=True)
        # -n: a reference that leads nowhere is a warning; -W: a warning is an error; all are shown.
        options = ("-q", "-n", "-W", "--keep-going", "-d", f"{folder}/.doctrees", "-c", str(_HERE))
        command = (sys.executable, "-m", "sphinx", "-b", "html", *options, folder, str(new))
        built = subprocess.run(command, check=False)
        if built.returncode == 0:
            llms.write(stage, new, *_title_and_summary(stage.texts[README]))
            shutil.rmtree(asked.folder, ignore_errors=True)
            new.rename(asked.folder)
        else:
            shutil.rmtree(new, ignore_errors=True)
        return built.returncode


def _title_and_summary(readme: str) -> tuple[str, str]:
    """Return the README's title, and its paragraph that says what the suite does, without links."""
    title, _, rest = readme.removeprefix("# ").partition("\n")
    summary = next(part for part in rest.strip().split("\n\n") if part.startswith("Submit "))
    return title, re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", " ".join(summary.split()))


sys.exit(main())
