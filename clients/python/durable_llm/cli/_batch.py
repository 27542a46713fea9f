"""Commands about batches: batch run, get, ls, results, cancel."""

import contextlib
import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from durable_llm._enums import name_of
from durable_llm.cli._connection import Connection
from durable_llm.cli._exits import CommandError, Exit, Interrupted
from durable_llm.cli._interrupts import held, interruptible
from durable_llm.cli._jobs_to_submit import target_of, user_of
from durable_llm.cli._listing import NO_ANSWER, cancel_each, ids_option, limit_option, page_size_of, print_list
from durable_llm.cli._options import (
    NAME,
    ClassName,
    Duration,
    Limit,
    WholeNumber,
    connection_options,
    json_option,
    require_text_name,
)
from durable_llm.cli._progress import Progress
from durable_llm.cli._stdout import write_json, write_line
from durable_llm.cli._text import age, say, visible

if TYPE_CHECKING:
    from llm_pb.batch_pb2 import BatchStatus

_STATES = ("validating", "running", "finalizing", "succeeded", "failed", "cancelled", "expired")
_BY_STATE = {"CANCELLED": Exit.CANCELLED, "EXPIRED": Exit.TIMED_OUT, "FAILED": Exit.FAILED}


@click.group()
def batch() -> None:
    """Run files of many jobs, follow them, read their results."""


@batch.command()
@click.argument("lines", type=click.Path(exists=True, dir_okay=False))
@click.argument("output", type=click.Path(dir_okay=False))
@click.option("--errors", default="", help="Path for what failed. [default: OUTPUT.errors]")
@click.option("--user", type=NAME, help="User whom the batch is for. [default: your login name]")
@click.option("--project", "project_id", type=NAME, help="A label to list batches by.")
@click.option("--class", "job_class", type=ClassName(), help="How urgent it is.")
@click.option("--window", type=Duration(), help="Time after which no further line begins. [default: 24h]")
@click.option("--max-concurrent", type=Limit(WholeNumber()), help="Maximum number of lines that run at once.")
@click.option(
    "--max-failure-rate", type=Limit(click.FloatRange(0, 1)), help="Share of failures that ends the batch, up to 1."
)
@click.option(
    "--notify",
    type=NAME,
    multiple=True,
    help="Deliver the outcome: URL, nats:SUBJECT, kafka:TOPIC, postgres:TABLE.",
)
@click.option("--request-id", type=NAME, help="Key of the batch. [default: the hash of LINES]")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@connection_options
def run(
    connection: Connection,
    *,
    lines: str,
    output: str,
    errors: str,
    user: str | None,
    project_id: str | None,
    job_class: str | None,
    window: timedelta | None,
    max_concurrent: int | None,
    max_failure_rate: float | None,
    notify: tuple[str, ...],
    request_id: str | None,
    quiet: bool,
) -> None:
    """Run the lines of a file and write their results in its order. A repeat of the command comes back to the batch."""
    fields: dict[str, Any] = {
        "project_id": project_id or "",
        "job_class": job_class,
        "window": window,
        "max_concurrent": max_concurrent or 0,
        "max_failure_rate": max_failure_rate or 0.0,
        "notify": [target_of(target) for target in notify],
    }
    errors = errors or f"{output}.errors"
    require_text_name("LINES", lines)
    _require_places(lines, output, errors)
    come_back = "The upload has ended. The same command goes on with it."
    try:
        with connection.connect() as client, interruptible():
            with Progress(quiet=quiet):
                started = client.batches.start(
                    lines, user_id=user_of(user, connection.settings), request_id=request_id or "", **fields
                )
            come_back = f"{started.batch_id} goes on. The same command comes back to it."
            say(started.batch_id)
            status = started
            with _Bar(quiet=quiet) as bar:
                for status in client.batches.watch(started.batch_id):
                    bar.show(status)
            for reference, path in ((status.output, output), (status.errors, errors)):
                if reference.file_id:
                    client.files.download(reference.file_id, path)
                elif path == output or os.path.exists(path):
                    # So that what an earlier command has left is not taken for the result.
                    with open(path, "wb"):
                        pass
    except KeyboardInterrupt:
        raise Interrupted(come_back) from None
    counts = status.counts
    state = _state_name(status)
    say(f"{state}: {counts.succeeded} succeeded in {output}" + _others(status, errors))
    if state != "SUCCEEDED":
        raise CommandError(visible(status.error.message), _BY_STATE.get(state, Exit.FAILED))
    if counts.failed:
        raise CommandError(f"{counts.failed} of {counts.total} lines have failed", Exit.FAILED)


@batch.command()
@click.argument("batch_id")
@json_option
@connection_options
def get(connection: Connection, *, batch_id: str, as_json: bool) -> None:
    """Print how a batch stands."""
    with connection.connect() as client:
        status = client.batches.get(batch_id)
    if as_json:
        write_json(status)
        return
    counts = status.counts
    lines = {
        "id": status.batch_id,
        "state": _state_name(status) + (", cancel requested" if status.cancel_requested else ""),
        "error": visible(status.error.message),
        "lines": str(counts.total or ""),
        "done": f"{counts.succeeded} succeeded, {counts.failed} failed" if counts.total else "",
        "stopped": str(counts.cancelled + counts.expired or ""),
        "bad": str(status.bad_lines or ""),
        "tokens": str(status.usage.output_tokens or ""),
        "output": status.output.file_id,
        "errors": status.errors.file_id,
        "created": _time(status, "create_time"),
        "expires": _time(status, "expire_time"),
        "expected": _time(status, "estimated_end_time"),
        "ended": _time(status, "end_time"),
        "trace": status.trace_id,
    }
    for name, text in lines.items():
        if text:
            write_line(f"{name:9}{text}")


@batch.command()
@click.option("--user", "user_id", type=NAME, help="Only batches of this user.")
@click.option("--project", "project_id", type=NAME, help="Only batches with this label.")
@click.option(
    "--state",
    multiple=True,
    type=click.Choice(_STATES, case_sensitive=False),
    help="Only batches in this state. May be repeated.",
)
@limit_option
@ids_option
@json_option
@connection_options
def ls(
    connection: Connection, *, state: tuple[str, ...], limit: int, quiet: bool, as_json: bool, **filters: Any
) -> None:
    """List batches: open ones first, then those that ended last."""
    states = [f"BATCH_STATE_{name.upper()}" for name in state]
    filters = {name: value or "" for name, value in filters.items()}
    with (
        connection.connect() as client,
        contextlib.closing(client.batches.list(states=states, page_size=page_size_of(limit), **filters)) as found,
    ):
        header = ("BATCH ID", "STATE", "LINES", "SUCCEEDED", "FAILED", "USER", "AGE")
        print_list(found, header, _row, limit=limit, quiet=quiet, as_json=as_json)


@batch.command()
@click.argument("batch_id")
@click.option("--cursor", default="", help="Only what came after this cursor.")
@click.option("--show-cursor", is_flag=True, help="Print the cursor to standard error after each message.")
@connection_options
def results(connection: Connection, *, batch_id: str, cursor: str, show_cursor: bool) -> None:
    """Print the items of a batch as they end, as JSON, until all have ended. Each comes once."""
    try:
        with (
            connection.connect() as client,
            interruptible(),
            contextlib.closing(client.batches.results(batch_id, cursor)) as messages,
        ):
            for message in messages:
                # Between the items and their cursor there is no Ctrl-C: the one that is shown continues after them.
                with held():
                    for item in message.items:
                        write_json(item)
                    cursor = message.cursor
                    if show_cursor:
                        say(cursor)
    except KeyboardInterrupt:
        more = f" --cursor {cursor}" if cursor else ""
        raise Interrupted(f"The batch goes on: durable-llm batch results {batch_id}{more}") from None


@batch.command()
@click.argument("batch_ids", metavar="BATCH_ID...", nargs=-1, required=True)
@click.option("--reason", default="", help="Reason for people. The batch's error shows it.")
@json_option
@connection_options
def cancel(connection: Connection, *, batch_ids: tuple[str, ...], reason: str, as_json: bool) -> None:
    """Request that batches stop. What has ended is kept, and so is what runs."""
    with connection.connect() as client:
        cancel_each(
            batch_ids,
            lambda batch_id: client.batches.cancel(batch_id, reason),
            lambda status: _state_name(status) if status.HasField("end_time") else "",
            as_json=as_json,
        )


def _require_places(lines: str, output: str, errors: str) -> None:
    """Raise a usage error for files that could not be written once the batch has ended, or would replace another."""
    for name, path in (("OUTPUT", output), ("--errors", errors)):
        folder = os.path.dirname(os.path.realpath(path))
        replaced = os.path.isfile(path) or not os.path.exists(path)
        if not path or os.path.isdir(path) or (replaced and not (os.path.isdir(folder) and os.access(folder, os.W_OK))):
            raise click.UsageError(f"{name}: no file can be written at {path}")
        if os.path.exists(path) and os.path.samefile(path, lines):
            raise click.UsageError(f"{name}: {path} is the file with the lines, which it would replace")
    if os.path.realpath(output) == os.path.realpath(errors):
        raise click.UsageError("--errors: must be another file than OUTPUT")


class _Bar:
    """The progress of a batch on standard error: a bar on a terminal, otherwise a line for each tenth."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._said: tuple[str, int] = ("", -1)
        if not quiet and sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True, highlight=False))

    def __enter__(self) -> "_Bar":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=None, rate="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, status: "BatchStatus") -> None:
        """Show how the batch stands."""
        counts, state = status.counts, _state_name(status)
        ended = counts.succeeded + counts.failed + counts.cancelled + counts.expired
        if self._bar is not None:
            rate = f"{status.tokens_per_second:.0f} tokens/s" if status.tokens_per_second else ""
            if status.HasField("estimated_end_time"):
                rate += f", until {status.estimated_end_time.ToDatetime():%H:%M:%S} UTC"
            total = counts.total or None
            self._bar.update(self._task, description=state, completed=ended, total=total, rate=rate)
            return
        tenth = 10 * ended // counts.total if counts.total else 0
        if not self._quiet and (state, tenth) != self._said:
            self._said = state, tenth
            say(f"{state} {ended}/{counts.total}" if counts.total else state)


def _row(status: "BatchStatus") -> tuple[str, ...]:
    counts = status.counts
    return (
        status.batch_id,
        _state_name(status) if status.user_id or status.HasField("end_time") else NO_ANSWER,
        *(str(counts.total), str(counts.succeeded), str(counts.failed)),
        status.user_id,
        age(status.create_time.ToDatetime()),
    )


def _others(status: "BatchStatus", errors: str) -> str:
    counts = status.counts
    others = {
        "failed": counts.failed,
        "cancelled": counts.cancelled,
        "expired": counts.expired,
        "bad": status.bad_lines,
    }
    named = ", ".join(f"{count} {name}" for name, count in others.items() if count)
    return f", {named} in {errors}" if named else ""


def _state_name(status: "BatchStatus") -> str:
    from llm_pb.batch_pb2 import BatchState

    return name_of(BatchState, status.state, "BATCH_STATE_")


def _time(status: Any, field: str) -> str:
    return getattr(status, field).ToJsonString() if status.HasField(field) else ""
