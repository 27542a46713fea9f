"""What lists of jobs, batches and pipelines share, and requests to cancel several of these."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from durable_llm.cli._stdout import write_json, write_line, write_table
from durable_llm.cli._text import say, visible

_T = TypeVar("_T", bound=Any)

NO_ANSWER = "open, no answer"
"""The state in a list of a batch or pipeline of which the service knows no more."""

limit_option = click.option(
    "-n", "--limit", type=click.IntRange(min=0, max=1_000_000_000), default=20, show_default=True, help="0: all."
)
ids_option = click.option("-q", "--quiet", is_flag=True, help="Print the ids alone.")


def page_size_of(limit: int) -> int:
    """Return the size of the pages to ask for."""
    return min(limit, 100) or 100


def print_list(
    found: Iterable[_T],
    header: tuple[str, ...],
    row: Callable[[_T], tuple[str, ...]],
    *,
    limit: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """Print up to `limit` things as a table, whose first column is the id; with `quiet` the ids alone."""
    listed = itertools.islice(found, limit or None)
    if as_json or quiet:
        for one in listed:
            write_json(one) if as_json else write_line(row(one)[0])
    else:
        write_table(header, list(map(row, listed)))


def for_each(ids: Iterable[str], act: Callable[[str], None]) -> None:
    """Call a function with each id, also after one that does not exist.

    Raises ApiError, that of the last missing id at the end. Whatever else ends it, the missing ids before are named.
    """
    from durable_llm.errors import ApiError

    missing: list[ApiError] = []
    try:
        for id_ in ids:
            try:
                act(id_)
            except ApiError as error:
                if error.code.name != "NOT_FOUND":
                    raise
                missing.append(error)
        if missing:
            raise missing.pop()
    finally:
        for other in missing:
            say(f"durable-llm: {visible(str(other))}")


def cancel_each(
    ids: Iterable[str], cancel: Callable[[str], Any], ended: Callable[[Any], str], *, as_json: bool
) -> None:
    """Request that each stops, and print what `ended` says of its status: its state, or nothing while it is open."""

    def cancel_one(id_: str) -> None:
        status = cancel(id_)
        write_json(status) if as_json else write_line(f"{id_} {ended(status) or 'cancel requested'}")

    for_each(ids, cancel_one)
