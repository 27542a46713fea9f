"""What lists of jobs, batches and pipelines share, and requests to cancel several of these."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from durable_llm.cli._stdout import write_json, write_line, write_table

_T = TypeVar("_T", bound=Any)

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


def cancel_each(
    ids: Iterable[str], cancel: Callable[[str], Any], ended: Callable[[Any], str], *, as_json: bool
) -> None:
    """Request that each stops, and print what `ended` says of its status: its state, or nothing while it is open."""
    for id_ in ids:
        status = cancel(id_)
        write_json(status) if as_json else write_line(f"{id_} {ended(status) or 'cancel requested'}")
