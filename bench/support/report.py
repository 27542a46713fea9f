"""Builds the JSON object that every script prints, and from which `make bench` writes RESULTS.md. Its fields:

question   what a user asks
measure    what was measured, in which unit, and what was not measured
verdicts   the aims, ratios first: what, its median, min and max over the rounds, the aim, and whether it is met
results    by case and by who (suite, peer_…, floor_…): each figure's median, min and max over the rounds
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Report:
    """Collects the figures of each round and judges them."""

    def __init__(self, question: str, measure: str) -> None:
        self._head = {"question": question, "measure": " ".join(measure.split())}
        self._verdicts: list[dict[str, Any]] = []
        self._rounds: dict[str, dict[str, dict[str, list[float]]]] = {}

    def add(self, case: str, who: str, figures: Mapping[str, float]) -> None:
        """Add the figures of one round."""
        known = self._rounds.setdefault(case, {}).setdefault(who, {})
        for name, value in figures.items():
            known.setdefault(name, []).append(value)

    def has(self, case: str, who: str) -> bool:
        """Return whether the case has figures of `who`."""
        return who in self._rounds.get(case, {})

    def rounds(self, case: str, who: str, figure: str) -> list[float]:
        """Return a figure, round by round. Raises KeyError when it was not measured."""
        return self._rounds[case][who][figure]

    def ratio(
        self, case: str, figure: str, over: str, *, who: str = "suite", invert: bool = False, **aim: float
    ) -> None:
        """Judge the ratio of the figure of `who` to that of `over`, round by round. `invert` swaps the two.

        Does nothing when one of them was not measured, because its peer is not installed for example.
        """
        if self.has(case, who) and self.has(case, over):
            pairs = zip(self.rounds(case, who, figure), self.rounds(case, over, figure), strict=True)
            values = [(b / a if invert else a / b) for a, b in pairs]
            names = (over, who) if invert else (who, over)
            self.judge(f"{figure}, {names[0]} / {names[1]}, {case}", values, **aim)

    def judge(
        self, what: str, rounds: Sequence[float], *, at_most: float | None = None, at_least: float | None = None
    ) -> None:
        """Compare the median of a value with its aim. A value without an aim is only listed."""
        verdict: dict[str, Any] = {"what": what, **spread(rounds)}
        if at_most is not None:
            verdict |= {"aim": f"at most {at_most:g}", "met": verdict["median"] <= at_most}
        elif at_least is not None:
            verdict |= {"aim": f"at least {at_least:g}", "met": verdict["median"] >= at_least}
        self._verdicts.append(verdict)

    def as_json(self) -> dict[str, Any]:
        """Return the object that the script prints."""
        results = {
            case: {who: {name: spread(each) for name, each in figures.items()} for who, figures in all_.items()}
            for case, all_ in self._rounds.items()
        }
        return {**self._head, "verdicts": self._verdicts, "results": results}


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """Return median and 99th percentile. With fewer than a hundred samples the latter is close to the maximum."""
    if len(samples) < 2:
        raise ValueError(f"{len(samples)} samples are too few for quantiles")
    cuts = statistics.quantiles(samples, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98]}


def rotated(names: Iterable[str], by: int) -> list[str]:
    """Return the names from the one at `by` on, then those before it. Beyond their number `by` begins again at 0."""
    order = [*names]
    first = by % len(order)
    return order[first:] + order[:first]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum, rounded to at least three significant digits."""
    return {
        "median": _rounded(statistics.median(values)),
        "min": _rounded(min(values)),
        "max": _rounded(max(values)),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.3g}") if abs(value) < 100 else float(round(value))
