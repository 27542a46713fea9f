"""Folders for work: those of a process that was killed are removed, those of one that lives are not."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE

from runtime.work_folders import sweep_work_folders, work_folder

_PREFIX = "durable-llm-test-"
_HOLD = """
import sys
from pathlib import Path
from runtime.work_folders import work_folder
with work_folder("durable-llm-test-", Path(sys.argv[1])) as folder:
    (folder / "weights").write_bytes(b"x" * 1000)
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_the_folders_of_killed_processes_are_removed_and_no_others(tmp_path: Path) -> None:
    with ExitStack() as stack:
        held = [
            stack.enter_context(subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdin=PIPE, stdout=PIPE))
            for _ in range(3)
        ]
        folders = [Path(process.stdout.readline().decode().strip()) for process in held if process.stdout is not None]
        other = tmp_path / f"{_PREFIX}by-hand"
        other.mkdir()
        assert sweep_work_folders(_PREFIX, tmp_path) == 0
        with work_folder(_PREFIX, tmp_path) as own:
            for process in held[:2]:
                process.kill()
                process.wait()
            assert all(folder.is_dir() for folder in folders), "kill -9 leaves it"
            assert sweep_work_folders(_PREFIX, tmp_path) == 2
            assert [folder.is_dir() for folder in (*folders, own, other)] == [False, False, True, True, True]
    # What has ended by itself has left nothing.
    assert [path.name for path in tmp_path.iterdir()] == [other.name]
    assert sweep_work_folders(_PREFIX, tmp_path) == 0


def test_what_is_no_folder_of_a_process_stays(tmp_path: Path) -> None:
    """A lock that is a link, and a folder that is one."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (tmp_path / f"{_PREFIX}a.lock").symlink_to(kept)
    (tmp_path / f"{_PREFIX}b.lock").touch()
    (tmp_path / f"{_PREFIX}b").symlink_to(kept)
    assert sweep_work_folders(_PREFIX, tmp_path) == 0
    assert kept.is_dir()
