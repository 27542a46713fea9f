"""The command durable-llm with input that is wrong, and with standard streams that are closed."""

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
import pytest

from deploy.local.stack import Stack
from durable_llm.cli._exits import Exit
from durable_llm.cli._run import durable_llm
from tests.stack.test_command_line import COMMAND, Cli
from tests.support.commands import run
from tests.support.paths import ROOT

HUGE: Final = "9" * 30
NO_UTF_8: Final = os.fsdecode(b"\xff")
EXTREMES: Final = ("", NO_UTF_8, HUGE, f"-{HUGE}", "x" * 10_000)
LEAST: Final = {
    ("submit",): ("x",),
    ("config", "set"): ("model", "x"),
    ("completion",): ("bash",),
    ("schedules", "create"): ("swept", "x", "--cron=0 0 1 1 *"),
    ("schedules", "backfill"): ("llmschedule-nobody-1", "2026-01-01", "2026-01-02"),
    ("files", "put"): ("pyproject.toml",),
    ("batch", "run"): ("pyproject.toml", os.devnull),
    ("files", "get"): (f"file-{'0' * 64}", "x"),
    ("pipeline", "run"): ("refine", '{"topic": "t", "models": {"write": "structured"}}', "--detach"),
    ("models", "alias"): ("nothing", "a", "1"),
    ("pipeline", "answer"): ("llmpipe-nobody-1", "x", "--yes"),
}
"""The arguments without which a command does nothing, where they are no id of a job."""


ASKING: Final = (("delete",), ("delete-user",), ("files", "rm"), ("models", "rm"))
"""The commands that ask before they do something."""


def commands(
    group: click.Group = durable_llm, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def sweep() -> Iterator[tuple[str, str, list[str]]]:
    """Yield each option and each argument of the commands, an extreme value for it, and the whole command line.

    An option that several commands share is tried once.
    """
    # A file that it names is written.
    known = {"--errors"}
    for path, command in commands():
        ids = ["llmjob-nobody-1" for item in command.params if isinstance(item, click.Argument)]
        least = list(LEAST.get(path, ids))
        for item in command.params:
            if isinstance(item, click.Option):
                name = item.opts[-1]
                if item.is_flag or name in known:
                    continue
                known.add(name)
                for value in EXTREMES:
                    yield name, value, [*path, *least, f"{name}={value}"]
            elif path not in LEAST:
                for value in EXTREMES:
                    yield str(item.name).upper(), value, [*path, *(["--yes"] * (path in ASKING)), "--", value]


@pytest.fixture
def cli(tmp_path: Path, stack: Stack) -> Cli:
    return Cli(tmp_path, stack.address("gateway"))


async def test_no_value_of_an_option_is_a_traceback(cli: Cli) -> None:
    """What is refused is refused by the name of the option, or of the field behind it, with a documented status."""
    cases = list(sweep())
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.command_sweep",
        cwd=ROOT,
        env={**os.environ, **cli.environment},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await process.communicate(json.dumps([arguments for *_, arguments in cases]).encode())
    wrong = []
    for (name, value, arguments), (status, words) in zip(cases, json.loads(errors), strict=True):
        named = name.removeprefix("--").removesuffix("S").replace("-", "_").lower() in words.lower().replace("-", "_")
        fine = status in set(Exit) and (status != Exit.USAGE or named)
        # The name of a file or a folder may be any bytes.
        if not fine or (value == NO_UTF_8 and status != Exit.USAGE and name not in ("--file", "--images")):
            wrong.append((name, value[:40], arguments[:2], status, words[-300:]))
    assert wrong == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("ls", "--limit", HUGE), "--limit"),
        (("schedules", "ls", "--limit", HUGE), "--limit"),
        (("chat", "--file", "/nowhere/talk.json", "--model", "x"), "--file"),
        (("submit", "x", "--max-tokens", HUGE), "--max-tokens"),
        (("submit", "x", "--seed", HUGE), "--seed"),
        (("submit", "x", "--timeout", f"{HUGE}d"), "--timeout"),
        (("submit", "x", "--timeout", "4000000d"), "--timeout"),
        (("submit", "x", "--cache", "soon"), "--cache"),
        (("submit", "x", "--request-id", ""), "--request-id"),
        (("pipeline", "run", "refine", "{}", "--request-id", ""), "--request-id"),
        (("pipeline", "answer", "llmpipe-a-1", "ask", "--yes", "--answer-id", ""), "--answer-id"),
        (("batch", "run", "pyproject.toml", os.devnull, "--request-id", ""), "--request-id"),
        (("files", "put", "pyproject.toml", "--request-id", ""), "--request-id"),
        (("pipeline", "run", "refine", "{}", "--output-tokens", "0"), "--output-tokens': 0 is no limit: give more"),
        (("pipeline", "run", "refine", "{}", "--output-tokens", "-1"), "--output-tokens': -1 is no limit: give more"),
        (("batch", "run", "pyproject.toml", os.devnull, "--max-concurrent", "0"), "--max-concurrent': 0 is no limit"),
        (("batch", "run", "pyproject.toml", os.devnull, "--max-failure-rate", "0"), "--max-failure-rate': 0 is no"),
        (("batch", "run", "pyproject.toml", ""), "OUTPUT: no file can be written"),
        (("submit", "--file", ""), "--file"),
        (("get", NO_UTF_8), "WORKFLOW_ID"),
        (("submit", NO_UTF_8), "PROMPT"),
        (("ls", "--address", "127.0.0.1:99999"), "--address"),
        (("ls", "--address", "ipv4:127.0.0.1:1,127.0.0.1:65536"), "--address"),
        (("config", "set", "model", NO_UTF_8), "VALUE"),
    ],
)
async def test_a_value_that_nothing_can_hold_is_named(cli: Cli, arguments: tuple[str, ...], says: str) -> None:
    ended = await cli(*arguments)
    assert (ended.status, ended.errors.count("\n")) == (Exit.USAGE, 1), ended.errors
    assert says in ended.errors


async def test_a_file_whose_name_is_no_text_is_not_uploaded(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / NO_UTF_8
    path.write_bytes(b"x")
    for arguments in (("files", "put", str(path)), ("batch", "run", str(path), os.devnull)):
        ended = await cli(*arguments)
        assert (ended.status, ended.errors.count("\n")) == (Exit.USAGE, 1), ended.errors
        assert "is not in UTF-8" in ended.errors


@pytest.mark.parametrize(
    "message", [{"role": "user", "content": "\ud800"}, {"role": "tool", "content": "x"}, {"name": "x"}]
)
async def test_a_message_that_cannot_be_sent_is_named(cli: Cli, tmp_path: Path, message: dict[str, str]) -> None:
    file = tmp_path / "messages.json"
    file.write_text(json.dumps([{"role": "user", "content": "x"}, message]))
    ended = await cli("submit", "--messages", str(file))
    assert ended.status == Exit.USAGE, ended.errors
    assert "--messages: message 1 of " in ended.errors


async def test_a_variable_that_is_not_in_utf_8_is_named(cli: Cli) -> None:
    ended = await cli("submit", "x", DURABLE_LLM_USER=NO_UTF_8)
    assert ended.status == Exit.USAGE, ended.errors
    assert "DURABLE_LLM_USER" in ended.errors


async def test_a_conversation_that_is_no_text_is_refused(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "\ud800"}], "open_job": ""}))
    ended = await cli("chat", "--file", str(file), given="Hello\n")
    assert ended.status == Exit.USAGE, ended.errors
    assert "holds no conversation" in ended.errors


@pytest.mark.parametrize("arguments", ["--help", "submit --help", "config show", "models", "completion bash"])
@pytest.mark.parametrize("nobody", ["| true", ">&-"])
async def test_nobody_reads_what_a_command_prints(cli: Cli, arguments: str, nobody: str) -> None:
    """A shell's `set -o pipefail` sees one status for that, whatever was to be printed."""
    # The reader has gone before the command begins.
    wait = "sleep 0.2; " if nobody.startswith("|") else ""
    command = f"{{ {wait}{' '.join(COMMAND)} {arguments}; }} {nobody}; exit ${{PIPESTATUS[0]}}"
    ended = await run("bash", "-c", command, **cli.environment)
    assert (ended.status, ended.errors) == (Exit.BROKEN_PIPE, "")


async def test_closed_standard_streams_are_no_error(cli: Cli) -> None:
    """A command that was started without any, as by a daemon, does what it is asked for."""
    command = f"{' '.join(COMMAND)} submit x --request-id closed --max-tokens 2 <&- >&- 2>&-; exit $?"
    ended = await run("bash", "-c", command, **cli.environment)
    assert ended.status == Exit.BROKEN_PIPE
    assert (await cli("output", "llmjob-cli-closed")).status == Exit.OK
