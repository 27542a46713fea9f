"""The commands of the docs that cannot run here: programs, subcommands, options, services and files are there."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import yaml

from durable_llm.cli._run import durable_llm
from tests.support.blocks import blocks
from tests.support.paths import ROOT

_SETTING = re.compile(r"[A-Z][A-Z0-9_]*=.*", re.DOTALL)
COMPOSE = ROOT / "deploy" / "compose"


class Command(NamedTuple):
    """A command of a page, without what redirects it."""

    place: str
    words: list[str]


def commands_of_pages() -> list[Command]:
    found = []
    for block in blocks():
        if block.language != "console":
            continue
        text = block.text.replace("\\\n", " ")
        for line in re.findall(r"^\$ (.*(?:\n +.*)*)", text, re.MULTILINE):
            for part in re.split(r"&&|\|| > | < ", re.sub(r"[()]", " ", line)):
                try:
                    words = shlex.split(part, comments=True)
                except ValueError:
                    continue
                while words and _SETTING.fullmatch(words[0]):
                    words.pop(0)
                if words:
                    found.append(Command(block.place, words))
    return found


def of(*names: str) -> pytest.MarkDecorator:
    """Parametrize by the commands of programs."""
    found = [command for command in commands_of_pages() if command.words[0].rpartition("/")[2] in names]
    assert found
    return pytest.mark.parametrize("command", found, ids=[f"{one.place} {' '.join(one.words)[:60]}" for one in found])


@of("durable-llm")
def test_an_option_of_the_command_is_one(command: Command) -> None:
    node: click.Command = durable_llm
    words = command.words[1:]
    while isinstance(node, click.Group) and words and not words[0].startswith("-"):
        found = node.get_command(click.Context(node), words[0])
        if found is None and node.invoke_without_command:
            break
        assert found is not None, words[0]
        node, words = found, words[1:]
    options = {option for parameter in node.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.partition("=")[0] for word in words if re.match("--?[a-z]", word)} <= options


@of("python")
def test_a_module_is_one_and_knows_its_command(command: Command) -> None:
    assert command.words[1] == "-m"
    module, arguments = command.words[2], [word for word in command.words[3:] if not word.startswith("/")]
    assert importlib.util.find_spec(module) is not None
    verbs = [word for word in arguments if re.fullmatch("[a-z-]+", word) and not word.startswith("-")][:1]
    if verbs:
        told = helped((sys.executable, "-m", module, *verbs))
        assert {word for word in arguments if word.startswith("--") and word != "--file"} <= set(options_in(told))


@of("make")
def test_a_target_is_one(command: Command) -> None:
    phony = set(re.findall(r"^\.PHONY: (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {word for word in command.words[1:] if "=" not in word} <= phony


@of("docker")
def test_a_service_of_compose_is_one(command: Command) -> None:
    words = command.words[1:]
    if words[0] != "compose" or words[1] not in ("run", "exec", "restart"):
        return
    services = {
        name
        for file in COMPOSE.glob("compose*.yaml")
        for name in yaml.load(file.read_text(), Loader=yaml.BaseLoader)["services"]
    }
    named = [word for word in words[2:] if word in services]
    assert named, command.words
    if words[1] == "restart":
        assert named == words[2:]


@of("temporal")
def test_temporals_command_line_knows_it(command: Command) -> None:
    verbs = [word for word in command.words[1:] if not word.startswith("-")]
    depth = 3 if verbs[0] in ("operator", "worker") else 2
    temporal = str(Path(sys.executable).parent / "temporal")
    told = helped((temporal, *verbs[:depth])) + helped((temporal,), "options")
    assert {word for word in command.words if word.startswith("--")} <= set(options_in(told))


@of("kubectl", "envoy", "cmake", "ruby")
def test_a_file_of_the_repository_is_there(command: Command) -> None:
    for word in command.words[1:]:
        if re.match(r"(?:deploy|clients)/", word):
            assert (ROOT / word).exists()
    if command.words[:2] == ["kubectl", "create"] and (kubectl := shutil.which("kubectl")) is not None:
        subprocess.run([kubectl, "create", command.words[2], "--help"], check=True, capture_output=True)


@cache
def helped(words: tuple[str, ...], by: str = "--help") -> str:
    """Return what a program says of one of its commands."""
    ended = subprocess.run([*words, by], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def options_in(text: str) -> list[str]:
    return re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text)
