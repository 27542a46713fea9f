"""Small files that hold keys: nothing of one that could not be written stays behind."""

from pathlib import Path

import pytest

from encryption import durable_file


def test_a_file_that_cannot_be_written_leaves_no_draft(tmp_path: Path) -> None:
    """Its text ends in what no file can hold."""
    with pytest.raises(UnicodeEncodeError):
        durable_file.replace(tmp_path / "keyring.json", "key " * 10_000 + "\udcff")
    assert not [*tmp_path.iterdir()]


def test_a_file_that_cannot_be_renamed_leaves_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "keyring.json"
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        durable_file.replace(path, "key")
    assert [*tmp_path.iterdir()] == [path]
