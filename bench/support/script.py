"""Runs a script of bench/: reads its sizes from the command line and prints one JSON object."""

import argparse
import asyncio
import dataclasses
import json
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from bench.support.report import Report

S = TypeVar("S")


def run(measure: Callable[[S], Coroutine[Any, Any, Report]], defaults: S, quick: S, about: str | None) -> None:
    """Measure with the sizes of the command line, and print the report.

    `defaults` and `quick` are frozen dataclasses of numbers, strings and tuples of numbers. Each field is an option.
    `--quick` takes sizes that only check, in seconds, that the script runs.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="sizes that only check that the script runs")
    fields = dataclasses.fields(defaults)  # type: ignore[arg-type]  # a dataclass
    for field in fields:
        value = getattr(defaults, field.name)
        many: dict[str, Any] = {"nargs": "+"} if isinstance(value, tuple) else {}
        kind = type(value[0]) if isinstance(value, tuple) else type(value)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, default=None, help=f"default: {_shown(value)}", **many
        )
    asked = vars(parser.parse_args())
    base = quick if asked.pop("quick") else defaults
    chosen = {name: tuple(v) if isinstance(v, list) else v for name, v in asked.items() if v is not None}
    sizes = dataclasses.replace(base, **chosen)  # type: ignore[type-var]
    report = asyncio.run(measure(sizes))
    json.dump({**report.as_json(), "sizes": dataclasses.asdict(sizes)}, sys.stdout, indent=2)  # type: ignore[call-overload]
    print()


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
