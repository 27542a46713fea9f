"""How a script of this folder runs: sizes from the command line, one JSON object to standard output."""

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
    """Measure at the sizes asked for and print the report.

    `defaults` and `quick` are frozen dataclasses of numbers, texts and tuples of numbers: each field is an option, and
    `--quick` takes the sizes that show in seconds that the script works.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="sizes that prove nothing but that the script runs")
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
