"""`make pipeline` makes a package that is well formed and whose test passes as it is."""

import subprocess
import sys
from pathlib import Path

import pytest

from deploy.new_pipeline import main
from tests.support.paths import ROOT


def test_a_new_pipeline_runs_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "haiku"
    make = [sys.executable, "-m", "deploy.new_pipeline"]
    made = subprocess.run([*make, "haiku", folder], cwd=ROOT, capture_output=True, text=True, check=True)
    files, _, commands = made.stdout.partition("\n\n")
    assert files.split() == [str(folder / file) for file in ("pyproject.toml", "haiku.py", "test_haiku.py")]
    for command in (f"make test T={folder}", f"pip install --editable {folder}", "durable-llm pipeline run haiku "):
        assert command in commands
    rules = ["--config", str(ROOT / "pyproject.toml")]
    for check in (["check", "--ignore", "S101,INP001", *rules], ["format", "--check", *rules]):
        subprocess.run([sys.executable, "-m", "ruff", *check, folder], cwd=ROOT, check=True)
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", folder, "-c", "/dev/null"]
    subprocess.run([*pytest_, folder], cwd=ROOT, check=True)
    # Nothing that is there is overwritten, and no bad name becomes a file.
    for name in ("haiku", "Ha-iku"):
        assert subprocess.run([*make, name, folder], cwd=ROOT, capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize("name", ["class", "asyncio", "pipelines", "refine", "pytest"])
def test_a_name_that_could_not_be_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Of a word of Python, of a module that the package would hide, and of a pipeline that comes along."""
    assert main([name, str(tmp_path / "new")]) == 1
    assert repr(name) in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
