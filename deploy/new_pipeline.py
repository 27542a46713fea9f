"""`make pipeline NAME=haiku`: a package with a new pipeline and its test, for an operator to go on from.

    python -m deploy.new_pipeline NAME FOLDER

It writes FOLDER/pyproject.toml, whose entry point names the module to the gateway, FOLDER/haiku.py and
FOLDER/test_haiku.py, and prints the commands that come next. It changes no file that is there.
"""

import argparse
import keyword
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from llm_pb import pipeline_pb2

_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
_TAKEN: Final = {field.name for field in pipeline_pb2.PipelineRequest.DESCRIPTOR.oneofs_by_name["spec"].fields}
"""Names of pipelines that come along, which are no modules."""

_PROJECT: Final = """\
[project]
name = "@name@"
version = "0.1.0"
requires-python = ">=3.11"

[project.entry-points."durable_llm.pipelines"]
@name@ = "@name@"

[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[tool.setuptools]
py-modules = ["@name@"]
"""
_CODE: Final = '''\
"""The pipeline @name@."""

from google.protobuf.wrappers_pb2 import StringValue

from pipelines import Pipeline, pipeline


@pipeline("@name@", StringValue, StringValue)
async def @name@(llm: Pipeline, topic: StringValue) -> StringValue:
    """Write a text on a topic by an outline."""
    outline = await llm.generate("outline", model="docstrings", prompt=f"Outline of {topic.value}:", max_tokens=30)
    text = await llm.generate("write", model="docstrings", prompt=outline.text, max_tokens=60)
    return StringValue(value=text.text)
'''
_TEST: Final = '''\
"""The pipeline @name@ on a whole stack with the simulated engine, which needs no model."""

import asyncio
import os
from pathlib import Path

from google.protobuf.any_pb2 import Any
from google.protobuf.wrappers_pb2 import StringValue

from deploy.local.settings import StackSettings
from deploy.local.stack import Stack
from durable_llm import AsyncClient

HERE = Path(__file__).parent


def test_a_text_is_written_by_an_outline(tmp_path: Path) -> None:
    """The pipeline returns a text, and has two steps."""
    asyncio.run(run(tmp_path))


async def run(folder: Path) -> None:
    """Run the pipeline, and look at its result and its steps."""
    settings = StackSettings.with_free_ports(state_dir=folder / "stack", engine="simulated")
    async with (
        Stack(settings, environment={"gateway": {"PYTHONPATH": installed(folder)}}) as stack,
        AsyncClient(stack.address("gateway")) as client,
    ):
        topic = Any()
        topic.Pack(StringValue(value="rain"))
        started = await client.pipelines.submit(user_id="me", custom={"name": "@name@", "input": topic})
        ended = await client.pipelines.result(started.pipeline_id)
    text = StringValue()
    assert ended.result.value.Unpack(text), ended.status
    assert text.value
    assert [step.path for step in ended.steps] == ["outline", "write"]


def installed(folder: Path) -> str:
    """Return the PYTHONPATH of a gateway for which the package is installed."""
    metadata = folder / "@name@-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\\nName: @name@\\nVersion: 0\\n")
    (metadata / "entry_points.txt").write_text("[durable_llm.pipelines]\\n@name@ = @name@\\n")
    return os.pathsep.join(filter(None, (str(folder), str(HERE), os.environ.get("PYTHONPATH", ""))))
'''
_NEXT: Final = """
Run its test, which starts a whole stack:
    make test T=@folder@
Install it into the environment of every gateway. A gateway reads its entry point as it starts:
    .venv/bin/python -m pip install --editable @folder@
Start the stack, or start it again:
    make up
Run it, in another terminal:
    .venv/bin/durable-llm pipeline run @name@ \\
        '{"@type": "type.googleapis.com/google.protobuf.StringValue", "value": "rain"}'
docs/pipelines.md says what its code can call.
"""


def main(arguments: list[str]) -> int:
    """Write the files. Return 1, with the reason on stderr, for a bad name or a file that is there."""
    parser = argparse.ArgumentParser(prog="make pipeline", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args(arguments)
    name: str = asked.name
    folder: Path = asked.folder
    if _NAME.fullmatch(name) is None:
        print(f"NAME must be a Python name of small letters, digits and _, not {name!r}", file=sys.stderr)
        return 1
    if keyword.iskeyword(name) or find_spec(name) is not None or name in _TAKEN:
        print(f"NAME is that of a word of Python, a module or a pipeline that there is: {name!r}", file=sys.stderr)
        return 1
    files = {"pyproject.toml": _PROJECT, f"{name}.py": _CODE, f"test_{name}.py": _TEST}
    if there := [str(folder / file) for file in files if (folder / file).exists()]:
        print(f"{', '.join(there)}: there already; nothing was written", file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_text(content.replace("@name@", name))
        print(folder / file)
    print(_NEXT.replace("@name@", name).replace("@folder@", shlex.quote(str(folder))), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
