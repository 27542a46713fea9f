"""The wire only grows: `buf breaking` compares proto/ with the descriptors of earlier versions, in protos/.

0.1.0.binpb has the messages of version 0.1.0, some of which have moved to another file since. before-0.2.0.binpb has
those of the first commit after the move.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.commands import Ended, run
from tests.support.paths import ROOT
from tests.support.stacks import tool

IMAGES = Path(__file__).parent / "protos"
WIRE_JSON = json.dumps(
    {
        "version": "v2",
        "modules": [{"path": "proto", "breaking": {"use": ["WIRE_JSON"]}}, {"path": "third_party/googleapis"}],
    }
)
"""The rules of buf that allow a message to move to another file. Those of buf.yaml, FILE, do not."""
RULES = {"0.1.0.binpb": ("--config", WIRE_JSON)}
"""Options of buf for an image that the rules of buf.yaml do not suit."""


async def breaking(image: str, *options: str, root: Path = ROOT) -> Ended:
    return await run(tool("buf"), "breaking", "proto", "--against", str(IMAGES / image), *options, cwd=root)


@pytest.mark.parametrize("image", sorted(path.name for path in IMAGES.iterdir()))
async def test_the_protos_have_only_grown(image: str) -> None:
    ended = await breaking(image, *RULES.get(image, ()))
    assert ended.status == 0, ended.output


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("  int32 default_max_tokens = 8;\n", "", "default_max_tokens"),
        ("  int32 default_max_tokens = 8;", "  int64 default_max_tokens = 8;", "changed type"),
    ],
    ids=["removed", "another type"],
)
async def test_a_change_that_is_no_addition_is_found(before: str, after: str, problem: str, tmp_path: Path) -> None:
    for name in ("proto", "third_party"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    proto = tmp_path / "proto" / "internal.proto"
    text = proto.read_text()
    assert before in text
    proto.write_text(text.replace(before, after, 1))
    ended = await breaking("before-0.2.0.binpb", root=tmp_path)
    assert ended.status != 0
    assert problem in ended.output
