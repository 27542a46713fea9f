"""The command that makes, lists and revokes API keys."""

import asyncio
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime.auth_keys import ApiKeys, read_keys
from services.gateway import scopes
from services.gateway.keys import main
from tests.support.commands import run
from tests.support.credentials import id_of, reason


async def test_the_command_makes_lists_and_revokes_keys(tmp_path: Path) -> None:
    """Several at once lose none; the key itself is shown once and kept nowhere."""
    path = tmp_path / "keys.json"

    async def keys(*arguments: str) -> Any:
        return await run(sys.executable, "-m", "services.gateway.keys", *arguments, GATEWAY_API_KEYS_FILE=str(path))

    options = ("--tenant", "acme", "--user", "alice", "--expires", "P90D")
    made = await asyncio.gather(*(keys("create", *options) for _ in range(5)))
    assert all(ended.status == 0 for ended in made), made[0].errors
    texts = [ended.output.strip() for ended in made]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [key.tenant for key in read_keys(path, scopes.SCOPES).values()] == ["acme"] * 5
    listed = await keys("list")
    known = ApiKeys(path, scopes.SCOPES)
    for text in texts:
        assert len(text.rpartition("_")[2]) == 43
        assert await reason(known, text) == ""
        assert id_of(text) in listed.output
        assert text.rpartition("_")[2] not in listed.output + path.read_text()
    assert "  acme  alice  " in listed.output
    assert (await keys("revoke", id_of(texts[0]))).status == 0
    await known.refresh()
    assert await reason(known, texts[0]) == "CREDENTIAL_INVALID"
    assert await reason(known, texts[1]) == ""
    for wrong in (
        ["revoke", "nobody"],
        ["create", "--scopes", "jobs:raed"],
        ["create", "--user", "-"],
        ["create", "--tenant", "a/b"],
        ["create", "--expires", "2027-01-01"],
        ["create", "--expires", "2020-01-01T00:00:00Z"],
        ["create", "--expires", "P0D"],
    ):
        ended = await keys(*wrong)
        assert ended.status != 0
        assert ended.errors
        assert "Traceback" not in ended.errors
    assert os.listdir(tmp_path) == ["keys.json"]
    everybodys = await keys("create", "--scopes", "admin:metrics")
    assert everybodys.status == 0, everybodys.errors
    key = read_keys(path, scopes.SCOPES)[id_of(everybodys.output.strip())]
    assert (key.tenant, key.user_id) == ("", "")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nowhere" / "keys.json"
    with pytest.raises(SystemExit) as ended:
        main(["--file", str(path), "create"])
    assert ended.value.code == 1
    assert capsys.readouterr() == ("", f"there is no folder {path.parent} for the file of the keys, {path}\n")
