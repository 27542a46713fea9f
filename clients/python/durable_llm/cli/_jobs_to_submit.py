"""From options to a JobRequest."""

import getpass
import json
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from durable_llm.cli._connection import Connection
from durable_llm.cli._options import read_text

if TYPE_CHECKING:
    from durable_llm import JobRequest


def job_for(
    connection: Connection,
    *,
    user: str | None = None,
    project: str | None = None,
    model: str | None = None,
    request_id: str | None = None,
    timeout: timedelta | None = None,
    params: dict[str, Any],
    **fields: Any,
) -> "JobRequest":
    """Return a job with the defaults of the profile. Raises a usage error."""
    from durable_llm._requests import job_request

    settings = connection.settings
    model = model or settings.get("model")
    if not model:
        raise click.UsageError("Name a model: --model NAME, or the profile's model. `durable-llm models` lists them.")
    values = {
        "user_id": user_of(user, settings),
        "request_id": request_id or uuid.uuid4().hex,
        "project_id": project or settings.get("project", ""),
        "model": model,
        "params": params,
        "timeouts": {"total": timeout} if timeout is not None else {},
        **fields,
    }
    try:
        return job_request(None, values)
    except (ValueError, TypeError) as error:
        raise click.UsageError(str(error)) from error


def user_of(user: str | None, settings: Mapping[str, str]) -> str:
    """Return the user that is named, or that of the profile, or the login name. Raises a usage error."""
    try:
        return user or settings.get("user") or getpass.getuser()
    except (KeyError, OSError):
        raise click.UsageError("Name a user: --user NAME. This machine has no name for yours.") from None


def content_of(prompt: str | None, file: str | None, messages: str | None) -> dict[str, Any]:
    """Return the field `prompt` or `messages` of a job from exactly one source. Raises a usage error."""
    if sum(given is not None for given in (prompt, file, messages)) != 1:
        raise click.UsageError("Give exactly one of PROMPT (`-` for standard input), --file and --messages.")
    if messages is not None:
        return {"messages": read_messages(messages)}
    if file is not None:
        return {"prompt": read_text(file, "--file")}
    return {"prompt": read_text("-", "PROMPT") if prompt == "-" else prompt}


def read_messages(path: str) -> list[dict[str, str]]:
    """Return the messages in a file: a JSON list in OpenAI's form. Raises a usage error."""
    from durable_llm._requests import chat_message

    try:
        messages = json.loads(read_text(path, "--messages"))
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"--messages: {path} is no JSON: {error}") from error
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and all(isinstance(value, str) for value in message.values()) for message in messages
    ):
        raise click.UsageError(f'--messages: {path} must hold a list such as [{{"role": "user", "content": "Hello"}}]')
    for index, message in enumerate(messages):
        try:
            chat_message(message)
        except UnicodeError:
            words = f"message {index} of {path} holds half a surrogate pair, which is no character"
            raise click.UsageError(f"--messages: {words}") from None
        except (ValueError, TypeError) as error:
            raise click.UsageError(f"--messages: message {index} of {path}: {error}") from error
    return messages


def target_of(target: str) -> dict[str, Any]:
    """Return the NotifyTarget that a URL, nats:SUBJECT, kafka:TOPIC or postgres:TABLE names."""
    kind, _, rest = target.partition(":")
    if kind == "nats":
        return {"nats": {"subject": rest}}
    if kind == "kafka":
        return {"kafka": {"topic": rest}}
    if kind == "postgres":
        return {"postgres": {"table": rest}}
    return {"webhook": {"url": target}}
