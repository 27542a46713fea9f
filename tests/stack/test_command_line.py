"""The command durable-llm: real processes, at real gateways, in pipes, files and terminals."""

import asyncio
import json
import os
import re
import shlex
import signal
import sys
import tomllib
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from deploy.local.ports import free_port
from deploy.local.stack import Stack
from durable_llm.cli._exits import Exit
from llm_pb import common_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from services.gateway.scopes import SCOPES
from tests.support.certificates import Authority
from tests.support.commands import Ended, run, start
from tests.support.credentials import KeyFile
from tests.support.jobs import new_job, run_job, webhook
from tests.support.paths import ROOT
from tests.support.receivers import Receiver, status
from tests.support.rewinding_gateway import CONTROLS, rewinding_gateway
from tests.support.terminal import Terminal
from tests.support.unsteady_gateway import Turn, serving

COMMAND = (sys.executable, "-m", "durable_llm")
ENVIRONMENT = {"DURABLE_LLM_USER": "cli", "DURABLE_LLM_MODEL": "docstrings"}
DOCUMENTED = re.compile(r"^\| (\d+) \| ", re.MULTILINE)


class Cli:
    """The command, with settings of its own."""

    def __init__(self, folder: Path, address: str) -> None:
        self.config = folder / "config.toml"
        self.environment = {**ENVIRONMENT, "DURABLE_LLM_CONFIG": str(self.config), "DURABLE_LLM_ADDRESS": address}

    async def __call__(self, *arguments: str, given: str | bytes | None = None, **environment: str) -> Ended:
        """Run the command to its end. `given` is its standard input."""
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            *arguments,
            cwd=ROOT,
            env={**os.environ, **self.environment, **environment},
            stdin=asyncio.subprocess.PIPE if given is not None else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await process.communicate(given.encode() if isinstance(given, str) else given)
        assert b"Traceback" not in errors, errors.decode()
        return Ended(process.returncode or 0, output.decode(), errors.decode())

    async def start(self, *arguments: str, **environment: str) -> asyncio.subprocess.Process:
        return await start(*COMMAND, *arguments, **{**self.environment, **environment})

    def terminal(self, *arguments: str, **environment: str) -> Terminal:
        return Terminal(*COMMAND, *arguments, **{**self.environment, **environment})

    async def submit(self, *arguments: str) -> str:
        """Submit a job and return its id."""
        ended = await self("submit", *arguments)
        assert ended.status == 0, ended.errors
        assert ended.errors == ""
        return ended.output.strip()


@pytest.fixture
def cli(tmp_path: Path, stack: Stack) -> Cli:
    return Cli(tmp_path, stack.address("gateway"))


async def result_of(stub: LlmServiceStub, workflow_id: str) -> str:
    look = await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=workflow_id))
    return look.result.output


async def test_it_prints_the_text_of_a_job_alone(cli: Cli, stub: LlmServiceStub) -> None:
    """In a pipe standard output is the job's output byte for byte, and standard error says how the job stands."""
    ended = await cli("submit", "Return the", "--watch", "--request-id", "whole", "--max-tokens", "40")
    assert ended.status == 0, ended.errors
    assert ended.output == await result_of(stub, "llmjob-cli-whole") != ""
    assert ended.errors.splitlines()[0] == "llmjob-cli-whole"
    assert ended.errors.splitlines()[-1] == "SUCCEEDED"
    for command in ("watch", "output"):
        again = await cli(command, "llmjob-cli-whole", "--quiet")
        assert (again.status, again.output, again.errors) == (0, ended.output, "")


async def test_the_text_is_utf_8_in_any_locale(cli: Cli, stub: LlmServiceStub) -> None:
    """A prompt in UTF-8 arrives as it stands, and the text leaves as it was generated."""
    odd = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"}
    ended = await cli("submit", "naïve 你好", "--watch", "--request-id", "odd", "--seed", "7", **odd)
    assert ended.status == 0, ended.errors
    plain = await run_job(stub, new_job("naïve 你好", params={"seed": 7}))
    assert ended.output == plain.final.result.output
    assert not ended.output.isascii()


@pytest.mark.parametrize("source", ["file", "stdin", "messages"])
async def test_a_prompt_comes_from_anywhere(cli: Cli, stub: LlmServiceStub, tmp_path: Path, source: str) -> None:
    """From a file and from standard input it is taken as it stands, its last newline included."""
    prompt = "First line.\nSecond, naïve line.\n"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    file = tmp_path / "given"
    file.write_text(json.dumps(messages) if source == "messages" else prompt)
    arguments = {"file": ("-f", str(file)), "stdin": ("-",), "messages": ("--messages", str(file))}[source]
    ended = await cli("submit", *arguments, "--seed", "1", "--watch", "-q", given=prompt)
    assert ended.status == 0, ended.errors
    if source == "messages":
        roles = [llm_pb2.ROLE_SYSTEM, llm_pb2.ROLE_USER]
        content: dict[str, Any] = {
            "messages": [
                llm_pb2.ChatMessage(role=role, content=message["content"])
                for role, message in zip(roles, messages, strict=True)
            ]
        }
    else:
        content = {"prompt": prompt}
    same = await run_job(stub, new_job(**content, params={"seed": 1}))
    assert ended.output == same.final.result.output


async def test_it_submits_all_that_a_job_may_ask_for(cli: Cli, stub: LlmServiceStub, receiver: Receiver) -> None:
    """A repeat with the fields that the options stand for finds the same job: they arrived."""
    url = receiver.on("/all", status(200))
    options = (
        "--model structured --temperature 0.5 --top-p 0.9 --top-k 40 --min-p 0.1 --max-tokens 12 --min-tokens 2"
        " --seed 5 --stop END --stop Q --presence-penalty 0.5 --frequency-penalty -0.5 --repetition-penalty 1.1"
        " --logprobs 2"
        " --choice yes --choice no --user bob --project p1 --request-id all --priority 4 --class background"
        " --timeout 1h30m --cache 10m"
    )
    workflow_id = await cli.submit("Well?", *options.split(), "--notify", url)
    job = llm_pb2.JobRequest(
        user_id="bob",
        request_id="all",
        project_id="p1",
        model="structured",
        prompt="Well?",
        priority=4,
        job_class=common_pb2.JOB_CLASS_BACKGROUND,
        notify=webhook(url),
        timeouts={"total": {"seconds": 5400}},
        cache={"ttl": {"seconds": 600}},
        params={
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 40,
            "min_p": 0.1,
            "max_tokens": 12,
            "min_tokens": 2,
            "seed": 5,
            "stop": ["END", "Q"],
            "presence_penalty": 0.5,
            "frequency_penalty": -0.5,
            "repetition_penalty": 1.1,
            "logprobs": 2,
            "choice": {"options": ["yes", "no"]},
        },
    )
    response = await stub.Submit(llm_pb2.SubmitRequest(job=job))
    assert response.workflow_id == workflow_id == "llmjob-bob-all"
    assert "class    BACKGROUND" in (await cli("get", workflow_id)).output
    async with asyncio.timeout(60):
        # Visibility learns of a job a moment later.
        while (await cli("ls", "-q", "--user", "bob", "--class", "background")).output.split() != [workflow_id]:  # noqa: ASYNC110
            await asyncio.sleep(0.5)
    assert (await cli("ls", "-q", "--user", "bob", "--class", "high", "--class", "standard")).output == ""


async def test_a_schema_comes_from_a_file(cli: Cli, stub: LlmServiceStub, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    named = ("--model", "structured", "--request-id", "schema")
    workflow_id = await cli.submit("x", *named, "--json-schema", str(schema))
    job = llm_pb2.JobRequest(user_id="cli", request_id="schema", model="structured", prompt="x")
    job.params.json_schema = schema.read_text()
    assert (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id == workflow_id


async def test_jobs_are_listed_and_described(cli: Cli, stub: LlmServiceStub) -> None:
    workflow_id = await cli.submit(
        "x", "--user", "lister", "--request-id", "1", "--project", "shown", "--max-tokens", "3"
    )
    await cli("output", workflow_id)
    got = await cli("get", workflow_id)
    assert re.search(r"^state +SUCCEEDED$", got.output, re.MULTILINE)
    parsed = json.loads((await cli("get", workflow_id, "--json")).output)
    assert parsed["result"]["output"] == await result_of(stub, workflow_id)
    filters = ("--user", "lister", "--state", "succeeded", "--model", "docstrings", "--project", "shown")
    async with asyncio.timeout(60):
        while not (listed := await cli("ls", *filters)).output:
            pass
    assert listed.output.split("\t")[:4] == [workflow_id, "SUCCEEDED", "docstrings", "lister"]
    assert (await cli("ls", *filters, "--quiet")).output == f"{workflow_id}\n"
    assert json.loads((await cli("ls", *filters, "--json")).output)["status"]["workflowId"] == workflow_id
    assert (await cli("ls", "--user", "lister", "--state", "failed")).output == ""
    async with cli.terminal("ls", *filters, COLUMNS="30") as terminal:
        assert await terminal.ended() == 0
    # An id has a line of its own, and the other fields follow below it.
    lines = terminal.screen.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["WORKFLOW", "ID"],
        ["STATE", "MODEL", "USER", "AGE"],
        [workflow_id],
    ]
    assert lines[3].startswith("  SUCCEEDED  docstrings  lister  ")


async def test_the_service_is_described(cli: Cli) -> None:
    models = await cli("models")
    assert models.output.splitlines()[0].split("\t")[0] == "docstrings"
    first, *_ = (await cli("models", "--json")).output.splitlines()
    assert json.loads(first)["name"] == "docstrings"
    async with asyncio.timeout(120):
        while not (workers := (await cli("workers", "--model", "docstrings", "--json")).output):
            pass
    worker = json.loads(workers.splitlines()[0])
    assert (worker["model"], worker["engine"], worker["seats"]) == ("docstrings", "simulated", 64)
    assert (await cli("workers")).output.split("\t")[:2] == [worker["worker"], "docstrings"]
    assert (await cli("workers", "--model", "other")).output == ""
    for command in (("workers", "--model", ""), ("ls", "--user", ""), ("ls", "--model", ""), ("ls", "--project", "")):
        refused = await cli(*command)
        assert (refused.status, refused.output) == (Exit.USAGE, ""), "an unset variable is not everybody"
    assert "without quotas" in (await cli("quota")).output
    assert json.loads((await cli("quota", "--json")).output) == {}


async def test_jobs_are_cancelled(cli: Cli) -> None:
    """Whoever watches such a job sees the reason and the exit status of a cancel; `output` prints nothing of it."""
    workflow_id = await cli.submit("x", "--max-tokens", "4000")
    watching = await cli.start("watch", workflow_id)
    assert watching.stdout is not None
    first = await watching.stdout.read(1)
    missing = ("llmjob-nobody-1", "llmjob-nobody-2")
    cancelled = await cli("cancel", missing[0], workflow_id, missing[1], "--reason", "not needed")
    assert cancelled.output == f"{workflow_id} cancel requested\n"
    assert cancelled.status == Exit.NOT_FOUND
    assert [id_ in line for id_, line in zip(missing, cancelled.errors.splitlines(), strict=True)] == [True, True]
    broken_off = await cli("cancel", missing[0], "", workflow_id)
    assert broken_off.status == Exit.USAGE
    assert missing[0] in broken_off.errors.splitlines()[0], "another error does not hide it"
    rest, errors = await watching.communicate()
    assert watching.returncode == Exit.CANCELLED
    assert errors.decode().splitlines()[-1] == "durable-llm: CANCELLED: not needed"
    assert (await cli("cancel", workflow_id)).output == f"{workflow_id} CANCELLED\n"
    ended = await cli("output", workflow_id)
    assert (ended.status, ended.output) == (Exit.CANCELLED, "")
    partial = await cli("output", workflow_id, "--partial")
    assert (partial.status, partial.output) == (Exit.CANCELLED, (first + rest).decode())


async def test_a_job_is_deleted_after_a_question(cli: Cli) -> None:
    """Where nobody can be asked, only --yes deletes."""
    workflow_id = await cli.submit("x", "--max-tokens", "3")
    refused = await cli("delete", workflow_id)
    assert refused.status == Exit.USAGE
    assert "--yes" in refused.errors
    async with cli.terminal("delete", workflow_id) as terminal:
        await terminal.until("[y/N]")
        terminal.type("n\n")
        assert await terminal.ended() == Exit.INTERRUPTED
    deleted = await cli("delete", "--yes", workflow_id)
    assert deleted.status == 0, deleted.errors
    assert deleted.output.startswith(f"{workflow_id} deleted")
    gone = await cli("get", workflow_id)
    assert gone.status == Exit.NOT_FOUND
    whole = await cli("delete-user", "--yes", f"nobody-{uuid.uuid4().hex}")
    assert whole.status == 0, whole.errors
    assert "0 files and 0 schedules" in whole.output


async def test_deliveries_are_listed_and_sent_again(cli: Cli, receiver: Receiver) -> None:
    workflow_id = await cli.submit("x", "--max-tokens", "3", "--notify", receiver.on("/sent-again", status(200)))
    await cli("output", workflow_id)
    listed = await cli("deliveries", workflow_id)
    id_, type_, _, state, *_ = listed.output.split("\t")
    assert (type_, state) == ("llm.v1.job.succeeded", "DELIVERED")
    again = await cli("redeliver", workflow_id, "--delivery", id_)
    assert again.output.split("\t")[0] == id_, again.errors
    assert json.loads((await cli("deliveries", workflow_id, "--json")).output)["id"] == id_


EXITS: dict[Exit, Callable[[str], tuple[str, ...]]] = {
    Exit.OK: lambda _: ("submit", "x", "--max-tokens", "2", "--watch"),
    Exit.FAILED: lambda _: ("submit", "[[fault:failed@2]] x", "--watch"),
    Exit.USAGE: lambda _: ("submit", "x", "--priority", "9"),
    Exit.NOT_FOUND: lambda _: ("watch", "llmjob-nobody-1"),
    Exit.TIMED_OUT: lambda _: ("submit", "x", "--model", "idle", "--timeout", "1s", "--watch"),
    Exit.UNAVAILABLE: lambda free: ("watch", "llmjob-nobody-1", "--address", free),
}
"""A command that ends with each exit status. Other tests end with the rest."""


@pytest.mark.parametrize("status", EXITS, ids=lambda status: status.name)
async def test_the_exit_status_says_how_it_ended(cli: Cli, status: Exit) -> None:
    """An error is one line. Nothing is said to continue where nothing runs, or nobody knows."""
    ended = await cli(*EXITS[status](f"127.0.0.1:{free_port()}"))
    assert ended.status == status, ended.errors
    errors = [line for line in ended.errors.splitlines() if line.startswith("durable-llm: ")]
    assert len(errors) == (status != Exit.OK)
    assert "continues" not in ended.errors


def test_every_exit_status_is_documented() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text()
    assert {int(status) for status in DOCUMENTED.findall(page)} == set(Exit)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("submit", "x", "--priority", "9", "--top-p", "3"), "job.priority (--priority)"),
        (("submit", "x", "--priority", "9", "--top-p", "3"), "job.params.top_p (--top-p)"),
        (("submit", "x", "--model", "gpt"), "job.model (--model)"),
        (("submit", "x", "--user", "-"), "job.user_id (--user)"),
        (("submit",), "exactly one"),
        (("submit", "x", "-f", "README.md"), "exactly one"),
        (("submit", "-f", "no-such-file"), "no-such-file cannot be read"),
        (("submit", "--messages", "README.md"), "README.md is no JSON"),
        (("submit", "x", "--timeout", "soon"), "is no duration"),
        (("submit", "x", "--notify", "ftp://x"), "--notify"),
        (("watch",), "WORKFLOW_ID"),
        (("sbumit",), "No such command"),
        (("get", "x", "--profile", "nope"), "has no profile nope"),
        (("get", "x", "--tls-ca", "README.md"), "README.md holds nothing in PEM"),
        (("get", "x", "--api-key-file", "no-such-file"), "no-such-file cannot be read"),
        (("files", "get", "x", "/nowhere/file"), "/nowhere/file: there is no folder /nowhere"),
        (("config", "set", "api_key", "secret"), "is no argument"),
    ],
)
async def test_a_mistake_is_named_with_its_fix(cli: Cli, arguments: tuple[str, ...], says: str) -> None:
    """All bad fields are named with their options, on one line."""
    ended = await cli(*arguments)
    assert ended.status == Exit.USAGE
    assert says in ended.errors
    assert ended.errors.count("\n") == 1
    assert ended.output == ""


async def test_a_watch_goes_on_at_a_gateway_that_comes_back(cli: Cli, stack: Stack, stub: LlmServiceStub) -> None:
    """When the gateway is killed and started again, standard output has every byte once."""
    gateway = stack.add("gateway")
    await gateway.start()
    await gateway.wait_ready()
    workflow_id = await cli.submit("x", "--max-tokens", "600")
    watching = await cli.start("watch", workflow_id, DURABLE_LLM_ADDRESS=stack.address(gateway.name))
    assert watching.stdout is not None
    first = await watching.stdout.read(1)
    await gateway.kill()
    await gateway.start()
    rest, errors = await watching.communicate()
    assert watching.returncode == 0, errors
    assert errors.count(b"the service does not answer; going on at byte") == 1
    assert (first + rest).decode() == await result_of(stub, workflow_id)
    await gateway.terminate()


async def test_a_break_is_said_once_until_the_service_answers(cli: Cli, stack: Stack) -> None:
    """gRPC's own errors become a plain sentence. What the service says stands as it is."""
    workflow_id = await cli.submit("x", "--max-tokens", "200")
    broken, full = Turn(messages=0), Turn(messages=0, full=True, retry_delay=timedelta(milliseconds=1))
    async with serving(stack, broken, broken, Turn(messages=1), broken, full, Turn(fails=False)) as gateway:
        ended = await cli("watch", workflow_id, DURABLE_LLM_ADDRESS=gateway.address)
    assert ended.status == 0, ended.errors
    said = [line for line in ended.errors.splitlines() if not re.fullmatch("[A-Z]+(, attempt 1)?", line)]
    assert [line.partition(";")[0] for line in said] == [
        "the service does not answer",
        "the service does not answer",
        "too many watchers",
    ]


async def test_ctrl_c_leaves_the_job_and_says_how_to_come_back(cli: Cli, stub: LlmServiceStub) -> None:
    """The command that it prints continues after the last byte: both texts together are the job's output."""
    watching = await cli.start("submit", "x", "--max-tokens", "600", "--watch", "--request-id", "left")
    assert watching.stdout is not None
    first = await watching.stdout.read(1)
    watching.send_signal(signal.SIGINT)
    rest, errors = await watching.communicate()
    assert watching.returncode == Exit.INTERRUPTED
    shown = re.search(r"durable-llm (watch llmjob-cli-left --resume-token \S+)$", errors.decode(), re.MULTILINE)
    assert shown, errors
    again = await cli(*shown[1].split())
    assert again.status == 0, again.errors
    assert (first + rest).decode() + again.output == await result_of(stub, "llmjob-cli-left")


INTERRUPTED = """
import os, signal, sys

module = sys.argv.pop(1)

def interrupt(event, arguments):
    if event == "import" and arguments[0] == module:
        os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(interrupt)
from durable_llm.cli import main
main()
"""
"""The command, with Ctrl-C as it imports the module that the first argument names."""


@pytest.mark.parametrize("module", ["click", "grpc"])
async def test_ctrl_c_ends_the_command_while_it_starts(module: str) -> None:
    """Nothing is printed, and a shell sees that Ctrl-C has ended it."""
    ended = await run(sys.executable, "-c", INTERRUPTED, module, "models")
    assert (ended.status, ended.output, ended.errors) == (-signal.SIGINT, "", "")


async def test_ctrl_c_is_handled_from_the_first_import_on() -> None:
    """Until then Python itself would print a traceback. Nothing else is imported before."""
    code = "import sys; before = {*sys.modules}; import durable_llm.cli; print(sorted({*sys.modules} - before))"
    ended = await run(sys.executable, "-c", code)
    assert ended.output == "['durable_llm', 'durable_llm.cli']\n", ended.errors


async def test_a_reader_that_goes_away_is_no_error(cli: Cli) -> None:
    """As in `durable-llm watch … | head -c 10`."""
    # Long enough that the reader goes away before its end on a busy machine, too.
    workflow_id = await cli.submit("x", "--max-tokens", "3000")
    command = f"{' '.join(COMMAND)} watch -q {workflow_id} | head -c 10; exit ${{PIPESTATUS[0]}}"
    ended = await run("bash", "-c", command, **cli.environment)
    assert (ended.status, ended.errors, len(ended.output.encode())) == (Exit.BROKEN_PIPE, "", 10)


async def test_json_is_one_object_a_line(cli: Cli, stub: LlmServiceStub) -> None:
    """The messages of the stream, with all that a program needs to continue; nothing on standard error."""
    ended = await cli("submit", "x", "--max-tokens", "20", "--request-id", "json", "--watch", "--json")
    messages = [json.loads(line) for line in ended.output.splitlines()]
    output = "".join(message["delta"]["text"] for message in messages if "delta" in message)
    assert output == await result_of(stub, "llmjob-cli-json")
    assert messages[-1]["status"]["state"] == "JOB_STATE_SUCCEEDED"
    assert ended.errors == ""
    submitted = await cli("submit", "x", "--request-id", "json-2", "--json")
    assert json.loads(submitted.output) == {"workflowId": "llmjob-cli-json-2"}


async def test_a_terminal_shows_progress_then_the_text(cli: Cli, stub: LlmServiceStub) -> None:
    async with cli.terminal("submit", "x", "--max-tokens", "30", "--request-id", "tty", "--watch") as terminal:
        assert await terminal.ended() == 0, terminal.screen
    assert "llmjob-cli-tty\n" in terminal.screen
    assert terminal.screen.endswith(f"{await result_of(stub, 'llmjob-cli-tty')}\n")


async def test_a_file_for_progress_gets_all_states(cli: Cli, tmp_path: Path) -> None:
    """They mix with no text there, although the text is on a terminal."""
    states = tmp_path / "states"
    command = shlex.join((*COMMAND, "submit", "x", "--max-tokens", "30", "--request-id", "states", "--watch"))
    async with Terminal("sh", "-c", f"{command} 2> {states}", **cli.environment) as terminal:
        assert await terminal.ended() == 0, terminal.screen
    assert states.read_text().splitlines()[0] == "llmjob-cli-states"
    assert states.read_text().splitlines()[-1] == "SUCCEEDED"


async def test_a_terminal_without_colour_is_plain(cli: Cli) -> None:
    async with cli.terminal("submit", "x", "--max-tokens", "3", "--watch", NO_COLOR="1") as terminal:
        assert await terminal.ended() == 0, terminal.screen
    assert b"\x1b" not in terminal.raw


async def test_a_chat_is_a_job_for_each_turn(cli: Cli, tmp_path: Path) -> None:
    """What the model has said belongs to the next turn. The file keeps the conversation for the next chat."""
    file = tmp_path / "talk.json"
    async with cli.terminal("chat", "--file", str(file), "--system", "Be brief.", "--max-tokens", "9") as terminal:
        await terminal.until("> ")
        terminal.type("Who are you?\n")
        await until(lambda: file.exists() and len(json.loads(file.read_text())["messages"]) == 3)
        terminal.type("\x04")
        assert await terminal.ended() == 0, terminal.screen
    ended = await cli("chat", "--file", str(file), "--max-tokens", "9", given="And now?\n")
    assert ended.status == 0, ended.errors
    kept = json.loads(file.read_text())
    assert [message["role"] for message in kept["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert kept["messages"][-1]["content"] + "\n" == ended.output
    assert kept["open_job"] == ""
    assert file.stat().st_mode & 0o077 == 0


async def test_a_chat_goes_on_with_the_answer_that_it_left(cli: Cli, stub: LlmServiceStub, tmp_path: Path) -> None:
    """A chat that is killed in mid-answer loses no turn."""
    file = tmp_path / "talk.json"
    async with cli.terminal("chat", "--file", str(file), "--max-tokens", "300") as terminal:
        await terminal.until("> ")
        terminal.type("Tell me.\n")
        await until(lambda: file.exists() and json.loads(file.read_text())["open_job"] != "")
        terminal.process.kill()
        await terminal.ended()
    open_job = json.loads(file.read_text())["open_job"]
    ended = await cli("chat", "--file", str(file), given="")
    assert ended.status == 0, ended.errors
    assert ended.output == await result_of(stub, open_job) + "\n"
    assert [message["role"] for message in json.loads(file.read_text())["messages"]] == ["user", "assistant"]


async def test_ctrl_c_at_the_prompt_of_a_chat_ends_it(cli: Cli) -> None:
    async with cli.terminal("chat") as terminal:
        await terminal.until("> ")
        while terminal.process.returncode is None:
            terminal.process.send_signal(signal.SIGINT)
            # A signal between the prompt and the wait for a key is seen with the next key, so it is in all of readline.
            # A person presses again.
            with suppress(TimeoutError):
                async with asyncio.timeout(10):
                    await terminal.process.wait()
        assert await terminal.ended() == Exit.INTERRUPTED
    assert "Traceback" not in terminal.screen


async def until(condition: Callable[[], bool]) -> None:
    """Return once the condition holds: of a file, which tells nobody that it changes."""
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
async def test_shells_get_a_completion(cli: Cli, shell: str) -> None:
    ended = await cli("completion", shell)
    assert ended.status == 0
    assert "_DURABLE_LLM_COMPLETE" in ended.output


async def test_the_completion_knows_the_commands(cli: Cli) -> None:
    """It runs the command itself, as the shell's script does."""
    asked = {"_DURABLE_LLM_COMPLETE": "bash_complete", "COMP_WORDS": "durable-llm su", "COMP_CWORD": "1"}
    assert (await cli(**asked)).output == "plain,submit\n"


async def test_help_does_not_load_grpc(cli: Cli) -> None:
    """It is shown at once, also without a service."""
    code = (
        "import sys; sys.argv = ['durable-llm', '--help']\n"
        "from durable_llm.cli import main\n"
        "try: main()\n"
        "except SystemExit: print(sorted({'grpc', 'asyncio', 'rich', 'google.protobuf'} & set(sys.modules)))"
    )
    ended = await run(sys.executable, "-c", code)
    assert "redeliver" in ended.output
    assert ended.output.endswith("[]\n"), ended.output


@pytest.mark.parametrize("name", ["click", "rich"])
async def test_without_its_extra_the_command_says_how_to_install_it(name: str) -> None:
    """The library needs neither."""
    code = (
        "import sys; sys.modules['{0}'] = None; import durable_llm; durable_llm.Client;"
        "from durable_llm.cli import main; main()"
    )
    ended = await run(sys.executable, "-c", code.format(name))
    assert ended.status == 1
    assert ended.errors.endswith("pip install 'durable-llm[cli]'\n")
    assert "Traceback" not in ended.errors


@pytest.fixture
async def guarded(stack: Stack, tmp_path: Path) -> AsyncIterator[tuple[str, KeyFile, Authority]]:
    """A gateway that asks for API keys, with TLS: its address, the file of the keys, and its CA."""
    keys, ca = KeyFile(tmp_path / "keys.json"), Authority(tmp_path)
    pair = ca.issue("gateway")
    settings = {
        "GATEWAY_API_KEYS_FILE": str(keys.path),
        "GATEWAY_TLS_CERT": str(pair.cert),
        "GATEWAY_TLS_KEY": str(pair.key),
    }
    process = stack.add("gateway", settings)
    await process.start()
    await process.wait_ready()
    yield stack.address(process.name), keys, ca
    await process.terminate()


async def test_two_profiles_are_two_callers(cli: Cli, guarded: tuple[str, KeyFile, Authority], tmp_path: Path) -> None:
    """Each has its own key. The key comes from the profile, from a file or from the environment, never from a flag."""
    address, keys, ca = guarded
    await until_known(cli, guarded, alice := keys.add(SCOPES, user_id="alice"))
    await until_known(cli, guarded, reader := keys.add(["jobs:read", "models:read"]))
    del cli.environment["DURABLE_LLM_ADDRESS"], cli.environment["DURABLE_LLM_USER"]
    for profile, key in (("work", alice), ("reader", reader)):
        for setting, value in (("address", address), ("tls_ca", str(ca.path)), ("user", "alice")):
            ended = await cli("config", "set", setting, value, "--profile", profile)
            assert ended.status == 0, ended.errors
        await cli("config", "set", "api_key", "--profile", profile, given=f"{key}\n")
    assert cli.config.stat().st_mode & 0o077 == 0
    assert tomllib.loads(cli.config.read_text())["profile"]["work"]["api_key"] == alice
    ended = await cli("config", "use", "work")
    assert ended.status == 0, ended.errors
    assert re.search(r"^\*\twork\t", (await cli("config", "list")).output, re.MULTILINE)
    shown = await cli("config", "show")
    assert alice not in shown.output
    assert "(set)" in shown.output
    submitted = await cli("submit", "x", "--max-tokens", "5", "--request-id", "mine", "--watch", "-q")
    assert submitted.status == 0, submitted.errors
    assert submitted.errors == ""

    # The flag overrides the environment, which overrides the profile in use.
    read = await cli("output", "llmjob-alice-mine", "-q", DURABLE_LLM_PROFILE="reader")
    assert (read.status, read.output) == (0, submitted.output), read.errors
    denied = await cli("cancel", "llmjob-alice-mine", DURABLE_LLM_PROFILE="reader")
    assert denied.status == Exit.NO_ACCESS
    assert "jobs:cancel" in denied.errors
    allowed = await cli("cancel", "llmjob-alice-mine", "--profile", "work", DURABLE_LLM_PROFILE="reader")
    assert allowed.output == "llmjob-alice-mine SUCCEEDED\n", allowed.errors
    file = tmp_path / "key"
    file.write_text(f"{reader}\n")
    file.chmod(0o600)
    assert (await cli("cancel", "x-1", DURABLE_LLM_API_KEY=reader)).status == Exit.NO_ACCESS
    assert (await cli("cancel", "x-1", DURABLE_LLM_API_KEY_FILE=str(file))).status == Exit.NO_ACCESS
    by_flag = await cli("cancel", "llmjob-alice-mine", "--api-key-file", str(file), DURABLE_LLM_API_KEY=alice)
    assert by_flag.status == Exit.NO_ACCESS
    wrong = await cli("models", DURABLE_LLM_API_KEY="llm_no_key")
    assert wrong.status == Exit.NO_ACCESS
    assert "DURABLE_LLM_API_KEY" in wrong.errors

    # Others may read it now.
    cli.config.chmod(0o644)
    warned = await cli("models")
    assert warned.status == 0
    assert f"chmod 600 {cli.config}" in warned.errors


async def until_known(cli: Cli, guarded: tuple[str, KeyFile, Authority], key: str) -> None:
    """Return once the gateway has read a new key."""
    address, _, ca = guarded
    async with asyncio.timeout(120):
        while (await cli("models", "--address", address, "--tls-ca", str(ca.path), DURABLE_LLM_API_KEY=key)).status:
            pass


async def test_settings_have_an_order(cli: Cli) -> None:
    """A flag, then the environment, then the profile, then the default."""
    places = {name: f"127.0.0.1:{free_port()}" for name in ("flag", "environment", "profile")}
    del cli.environment["DURABLE_LLM_ADDRESS"]
    assert (await cli("config", "set", "address", places["profile"])).status == 0
    from_environment = {"DURABLE_LLM_ADDRESS": places["environment"]}
    reached = {
        "flag": await cli("models", "--address", places["flag"], **from_environment),
        "environment": await cli("models", **from_environment),
        "profile": await cli("models", LLM_ADDRESS=""),
    }
    for name, ended in reached.items():
        assert f"listen at {places[name]}?" in ended.errors


@pytest.fixture
async def rewinding() -> AsyncIterator[str]:
    """The address of a gateway whose job starts over after its text was sent."""
    async with rewinding_gateway() as address:
        yield address


async def test_a_rewind_is_taken_back_in_a_file(cli: Cli, rewinding: str, tmp_path: Path) -> None:
    """The file holds the job's output in the end, after what was in it before."""
    text = tmp_path / "text"
    command = f"{{ printf 'before '; {' '.join(COMMAND)} watch -q llmjob-a-1; }} > {text}"
    ended = await run("bash", "-c", command, **{**cli.environment, "DURABLE_LLM_ADDRESS": rewinding})
    assert ended.status == 0, ended.errors
    assert text.read_text() == "before Once there was"


@pytest.mark.parametrize("redirection", ["| cat", ">> {}"])
async def test_a_rewind_ends_a_pipe(cli: Cli, rewinding: str, tmp_path: Path, redirection: str) -> None:
    """No reader takes two halves of different texts for one."""
    redirect = redirection.format(tmp_path / "text")
    command = f"{' '.join(COMMAND)} watch -q llmjob-a-1 {redirect}; exit ${{PIPESTATUS[0]}}"
    ended = await run("bash", "-c", command, **{**cli.environment, "DURABLE_LLM_ADDRESS": rewinding})
    assert ended.status == Exit.REWOUND
    assert "void" in ended.errors
    assert "durable-llm output llmjob-a-1" in ended.errors


async def test_a_rewind_is_shown_on_a_terminal(cli: Cli, rewinding: str) -> None:
    async with cli.terminal("watch", "llmjob-a-1", DURABLE_LLM_ADDRESS=rewinding) as terminal:
        assert await terminal.ended() == 0, terminal.screen
    assert "replaces the text from byte 4 on\n there was\n" in terminal.screen


async def test_a_terminal_shows_that_a_job_waits_again(cli: Cli, rewinding: str) -> None:
    """Text that pauses for long looks as if the command hung. Running again shows by itself."""
    async with cli.terminal("watch", "llmjob-a-paused", DURABLE_LLM_ADDRESS=rewinding) as terminal:
        assert await terminal.ended() == 0, terminal.screen
    assert terminal.screen.endswith("Once upon \nQUEUED, paused, 3 tokens, 50 %\na time\n")


async def test_a_terminal_gets_no_control_characters(cli: Cli, rewinding: str) -> None:
    """A model cannot write a terminal's title or move its cursor, but end a line by CR LF. A pipe gets the bytes."""
    async with cli.terminal("watch", "llmjob-a-controls", "-q", DURABLE_LLM_ADDRESS=rewinding) as terminal:
        assert await terminal.ended() == 0, terminal.screen
    assert b"\x1b]0;title" not in terminal.raw
    assert terminal.screen.replace("\r", "") == "\ufffd]0;title\ufffd one\ntwo\nthree\ufffdover\n"
    piped = await cli("watch", "llmjob-a-controls", "-q", DURABLE_LLM_ADDRESS=rewinding)
    assert piped.output == "".join(CONTROLS)
