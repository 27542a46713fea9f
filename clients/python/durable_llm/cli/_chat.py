"""The command chat: a conversation whose every turn is a job."""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from durable_llm.cli._connection import Connection
from durable_llm.cli._exits import CommandError, from_service
from durable_llm.cli._follow import follow
from durable_llm.cli._interrupts import interruptible
from durable_llm.cli._jobs_to_submit import job_for
from durable_llm.cli._options import NAME, Duration, connection_options, quiet_option, sampling_options
from durable_llm.cli._stdout import on_terminal, write
from durable_llm.cli._text import say

if TYPE_CHECKING:
    from durable_llm import Client


@click.command()
@click.option(
    "-f", "--file", type=click.Path(path_type=Path), help="Keep the conversation in this file, and continue it."
)
@click.option("-s", "--system", help="Instructions that frame the conversation.")
@click.option("-m", "--model", type=NAME, help="Model that answers.")
@sampling_options
@click.option("--user", type=NAME, help="User whom the jobs are for. [default: your login name]")
@click.option("--project", type=NAME, help="Label to group and list jobs by.")
@click.option("--timeout", type=Duration(), help="Time limit of each turn.")
@quiet_option
@connection_options
def chat(
    connection: Connection,
    *,
    file: Path | None,
    system: str | None,
    sampling: dict[str, Any],
    timeout: timedelta | None,
    quiet: bool,
    **fields: Any,
) -> None:
    """Talk with a model. Each line that you type is a turn; each answer is a job of its own.

    With --file the conversation survives the end of this command: the next one begins with the answer that was being
    generated.
    """
    from durable_llm.errors import JobError, JobNotFound

    talk = Conversation(file)
    if system is not None and not talk.messages:
        talk.messages.append({"role": "system", "content": system})

    def answer(client: "Client") -> None:
        if not talk.open_job:
            request = job_for(connection, params=sampling, timeout=timeout, messages=talk.messages, **fields)
            talk.open_job = client.submit(request).workflow_id
            talk.save()
        job = client.job(talk.open_job)
        try:
            follow(job, accepted=True, quiet=quiet)
            text = job.result().output
        except (JobError, JobNotFound) as error:
            # A turn that has failed is taken back: sent again, it would fail every later one.
            talk.answered("")
            if not sys.stdin.isatty():
                raise
            say(f"durable-llm: {from_service(error, connection.address)}")
            return
        talk.answered(text)
        if not on_terminal():
            write("\n")

    with connection.connect() as client:
        if talk.open_job:
            answer(client)
        for line in _lines():
            talk.messages.append({"role": "user", "content": line})
            answer(client)


class Conversation:
    """The messages of a conversation and the job that answers the last one, in a file if there is one."""

    def __init__(self, path: Path | None) -> None:
        """Read the file, which need not exist. Raises CommandError for one that holds something else, or cannot be."""
        self.path = path
        self.messages: list[dict[str, str]] = []
        self.open_job = ""
        """Id of the job that answers the last message. Empty: the model has answered, or nobody has asked."""
        if path is None:
            return
        if not os.access(path.parent, os.W_OK):
            # No answer must be lost because of that.
            raise CommandError(f"--file: no file can be written at {path}")
        if not path.exists():
            return
        try:
            kept = json.loads(path.read_bytes())
            self.messages = [
                {"role": str(kept_one["role"]), "content": str(kept_one["content"])} for kept_one in kept["messages"]
            ]
            self.open_job = str(kept["open_job"])
            # Raises a ValueError for half a surrogate pair, which is no text.
            json.dumps(kept, ensure_ascii=False).encode()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CommandError(f"{path} holds no conversation of this command") from error

    def answered(self, text: str) -> None:
        """Add the model's answer. An empty one ends the turn as well, and is not sent again."""
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()
        self.open_job = ""
        self.save()

    def save(self) -> None:
        """Replace the file by one that only its owner may read."""
        if self.path is None:
            return
        kept = {"messages": self.messages, "open_job": self.open_job}
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(kept, file, ensure_ascii=False, indent=1)
        os.replace(name, self.path)


def _lines() -> Iterator[str]:
    """Yield what the user types, without empty lines, until the end of the input."""
    if not sys.stdin.isatty():
        yield from (line for raw in sys.stdin.buffer if (line := raw.decode(errors="replace").strip()))
        return
    # Gives the prompt an editor and a history, where Python has it.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401

    while True:
        try:
            # Without it Ctrl-C would end the process and leave the terminal as the editor has set it.
            with interruptible():
                line = os.fsencode(input("> ")).decode(errors="replace").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            raise click.Abort from None
        if line:
            yield line
