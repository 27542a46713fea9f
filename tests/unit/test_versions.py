"""The versions of the suite and of its client, which are released together."""

import re
import tomllib
from typing import Any

from packaging.requirements import Requirement

from tests.support.paths import ROOT


def project(path: str) -> dict[str, Any]:
    return dict(tomllib.loads((ROOT / path).read_text())["project"])


SUITE, CLIENT = project("pyproject.toml"), project("clients/python/pyproject.toml")
VERSION: str = SUITE["version"]


def test_the_suite_requires_the_client_of_its_own_minor_version() -> None:
    """The client holds the generated code, without whose messages the suite cannot run."""
    major, minor, _ = map(int, VERSION.split("."))
    (client,) = [one for one in map(Requirement, SUITE["dependencies"]) if one.name == CLIENT["name"]]
    assert client.specifier.contains(CLIENT["version"])
    assert not client.specifier.contains(f"{major}.{minor - 1}.9")
    assert not client.specifier.contains(f"{major}.{minor + 1}.0")
    assert CLIENT["version"] == VERSION


def test_the_newest_changes_are_those_of_this_version() -> None:
    (newest, *_) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest == VERSION


def test_a_version_that_code_calls_earlier_is_not_this_one() -> None:
    folders = ("feed", "jobs", "proto", "runtime", "services", "workflows")
    files = [path for name in folders for end in ("py", "proto") for path in (ROOT / name).rglob(f"*.{end}")]
    named = {version for path in files for version in re.findall(r"\bversion (\d+\.\d+\.\d+)", path.read_text())}
    assert named
    assert VERSION not in named
