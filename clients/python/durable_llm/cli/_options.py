"""Options that several commands share."""

import os
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


class Text(click.ParamType[str]):
    """A text in UTF-8: the bytes of the shell, whatever Python takes for the encoding of the locale."""

    name = "text"

    def __init__(self, *, may_be_empty: bool = True) -> None:
        """`may_be_empty` is False where an empty text would stand for another one, such as an unset variable's."""
        self._may_be_empty = may_be_empty

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text. Fails with a usage error."""
        try:
            text = os.fsencode(value).decode()
        except UnicodeError:
            self.fail("It is not in UTF-8.", param, ctx)
        if not (text or self._may_be_empty):
            self.fail("It is empty.", param, ctx)
        return text


NAME = Text(may_be_empty=False)


def require_text_name(argument: str, path: str) -> None:
    """Raise a usage error for a file that is to be uploaded and whose name is no text."""
    try:
        os.fsencode(os.path.basename(path)).decode()
    except UnicodeError:
        raise click.UsageError(f"{argument}: the name of {path!r} is not in UTF-8") from None


class WholeNumber(click.ParamType[int]):
    """A whole number that a field of a job can hold. The gateway knows the narrower range of each field."""

    name = "integer"

    def __init__(self, bits: int = 32) -> None:
        """`bits` is the size of the field."""
        self._bound: int = 2 ** (bits - 1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number. Fails with a usage error."""
        number: int = click.INT.convert(value, param, ctx)
        if not -self._bound <= number < self._bound:
            self.fail(f"{value} is out of range: no field holds it.", param, ctx)
        return number


class Limit(click.ParamType[Any]):
    """A limit. 0 in its field means that there is none."""

    def __init__(self, numbers: click.ParamType[Any]) -> None:
        """`numbers` are those that the field of the message can hold."""
        self._numbers = numbers
        self.name = numbers.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the limit. Fails with a usage error."""
        limit = self._numbers.convert(value, param, ctx)
        if limit <= 0:
            self.fail(f"{value} is no limit: give more than 0, or leave the option out for none.", param, ctx)
        return limit


class ClassName(click.Choice[str]):
    """A class of jobs by its name, such as background. It becomes the name of the enum's value."""

    def __init__(self) -> None:
        """Offer the classes of this version."""
        super().__init__(("high", "standard", "background", "scheduled"), case_sensitive=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name of the value. Fails with a usage error."""
        return f"JOB_CLASS_{super().convert(value, param, ctx).upper()}"


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

    file = click.Path()
    options = (
        click.option("--profile", default="", help="Profile to use.", shell_complete=_profile_names),
        click.option("--address", help="host:port of the gateway. [default: 127.0.0.1:50051]"),
        click.option(
            "--api-key-file", type=file, help="File that holds the API key. DURABLE_LLM_API_KEY holds the key itself."
        ),
        click.option("--tls/--no-tls", default=None, help="Use TLS. [default: with a key that goes to another host]"),
        click.option("--tls-ca", type=file, help="File with the CAs to trust, in PEM. [default: those of gRPC]"),
        click.option("--tls-cert", type=file, help="File with a client certificate, in PEM."),
        click.option("--tls-key", type=file, help="File with the key of the client certificate, in PEM."),
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
    ("top_k", WholeNumber(), "Keep this many of the most probable tokens."),
    ("min_p", float, "Drop tokens below this share of the highest probability."),
    ("max_tokens", WholeNumber(), "Maximum number of output tokens."),
    ("min_tokens", WholeNumber(), "Minimum number of output tokens."),
    ("seed", WholeNumber(bits=64), "Draw the same random numbers as other jobs of this seed."),
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


def take_text(command: click.Command) -> None:
    """Make every parameter of a command that has no type of its own a Text, those of its commands included."""
    for parameter in command.params:
        if parameter.type is click.STRING:
            parameter.type = Text()
    if isinstance(command, click.Group):
        for further in command.commands.values():
            take_text(further)


def read_text(path: str, name: str) -> str:
    """Return the text of a file, or of standard input for `-`, as it stands.

    Raises a usage error with the `name` of the parameter that has the path.
    """
    import sys

    try:
        return (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{name}: {path} is not in UTF-8: byte {error.start} is wrong") from error
    except OSError as error:
        raise click.UsageError(f"{name}: {path} cannot be read: {error.strerror}") from error


def _profile_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in Profiles(config_path()).named if name.startswith(incomplete)]
