"""Options that several commands share."""

from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from durable_llm.cli._connection import Connection
from durable_llm.cli._exits import from_service
from durable_llm.cli._profiles import Profiles, config_path
from durable_llm.cli._text import parse_duration

F = TypeVar("F", bound=Callable[..., Any])
_FLAGS = ("address", "api_key_file", "tls", "tls_ca", "tls_cert", "tls_key")


class Duration(click.ParamType[timedelta]):
    """A duration such as 90s, 5m or 1h30m."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Return the duration. Fails with a usage error."""
        try:
            return value if isinstance(value, timedelta) else parse_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def connection_options(command: F) -> F:
    """Add the options of a connection. The command gets them as its first argument, a Connection."""

    @wraps(command)
    def with_connection(*args: Any, profile: str, **values: Any) -> Any:
        flags = {name: values.pop(name) for name in _FLAGS}
        if flags["tls"] is not None:
            flags["tls"] = str(flags["tls"]).lower()
        connection = Connection.read(flags, profile)
        try:
            return command(connection, *args, **values)
        except Exception as error:
            translated = from_service(error, connection.address)
            if translated is error:
                raise
            raise translated from error

    options = (
        click.option("--profile", default="", help="Profile to use.", shell_complete=_profile_names),
        click.option("--address", help="host:port of the gateway. [default: 127.0.0.1:50051]"),
        click.option("--api-key-file", help="File that holds the API key. DURABLE_LLM_API_KEY holds the key itself."),
        click.option("--tls/--no-tls", default=None, help="Use TLS. [default: with a key that goes to another host]"),
        click.option("--tls-ca", help="File with the CAs to trust, in PEM. [default: those of gRPC]"),
        click.option("--tls-cert", help="File with a client certificate, in PEM."),
        click.option("--tls-key", help="File with the key of the client certificate, in PEM."),
    )
    for option in reversed(options):
        with_connection = option(with_connection)
    return with_connection  # type: ignore[return-value]


def json_option(command: F) -> F:
    """Add --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")(command)


def quiet_option(command: F) -> F:
    """Add --quiet."""
    return click.option("-q", "--quiet", is_flag=True, help="Show no progress on standard error.")(command)


_SAMPLING: tuple[tuple[str, Any, str], ...] = (
    ("temperature", float, "0 (greedy) to 2."),
    ("top_p", float, "Keep the most probable tokens whose probabilities add up to this."),
    ("top_k", int, "Keep this many of the most probable tokens."),
    ("min_p", float, "Drop tokens below this share of the highest probability."),
    ("max_tokens", int, "Maximum number of output tokens."),
    ("min_tokens", int, "Minimum number of output tokens."),
    ("seed", int, "Makes sampling reproducible."),
    ("presence_penalty", float, "Penalises tokens that occur in the output; -2 to 2."),
    ("frequency_penalty", float, "Penalises tokens by the number of their occurrences; -2 to 2."),
    ("repetition_penalty", float, "Divides the scores of tokens that occur in prompt or output; above 0, at most 2."),
)
"""Fields of SamplingParams, each with its type and meaning. The gateway checks the values."""


def sampling_options(command: F) -> F:
    """Add the options of SamplingParams that have one value. The command gets those that are set as `sampling`."""

    @wraps(command)
    def with_sampling(*args: Any, stop: tuple[str, ...], **values: Any) -> Any:
        given = {name: values.pop(name) for name, *_ in _SAMPLING}
        sampling: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if stop:
            sampling["stop"] = stop
        return command(*args, sampling=sampling, **values)

    with_sampling = click.option("--stop", multiple=True, help="Stop before this text. May be repeated.")(with_sampling)
    for name, kind, text in reversed(_SAMPLING):
        with_sampling = click.option(f"--{name.replace('_', '-')}", name, type=kind, help=text)(with_sampling)
    return with_sampling  # type: ignore[return-value]


def read_text(path: str) -> str:
    """Return the text of a file, or of standard input for `-`, as it stands. Raises a usage error."""
    import sys

    try:
        return (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{path} is not in UTF-8: byte {error.start} is wrong") from error
    except OSError as error:
        raise click.UsageError(f"{path} cannot be read: {error.strerror}") from error


def _profile_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in Profiles(config_path()).named if name.startswith(incomplete)]
