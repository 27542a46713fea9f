"""Cron expressions that schedules accept. Those that they refuse are rows of tests.support.bad_schedules."""

import pytest

from jobs.cron import Cron, parse

ALL = Cron(tuple(range(60)), tuple(range(24)), tuple(range(1, 32)), tuple(range(1, 13)), tuple(range(7)))


@pytest.mark.parametrize(
    ("expression", "values"),
    [
        ("* * * * *", {}),
        ("*/20 * * * *", {"minutes": (0, 20, 40)}),
        ("5/20 8-10,12 * * *", {"minutes": (5, 25, 45), "hours": (8, 9, 10, 12)}),
        ("0 9-17/4 * * MON-FRI", {"minutes": (0,), "hours": (9, 13, 17), "days_of_week": (1, 2, 3, 4, 5)}),
        ("* * * * 7", {"days_of_week": (0,)}),
        ("* * * * 5-7", {"days_of_week": (0, 5, 6)}),
        ("* * * * fri-sun", {"days_of_week": (0, 5, 6)}),
        ("* * * * */2", {"days_of_week": (0, 2, 4, 6)}),
        ("* * 29 feb *", {"days_of_month": (29,), "months": (2,)}),
        ("@hourly", {"minutes": (0,)}),
        ("@Weekly", {"minutes": (0,), "hours": (0,), "days_of_week": (0,)}),
        ("  0   0  1 1 * ", {"minutes": (0,), "hours": (0,), "days_of_month": (1,), "months": (1,)}),
    ],
)
def test_an_expression_is_its_values(expression: str, values: dict[str, tuple[int, ...]]) -> None:
    assert parse(expression) == ALL._replace(**values)


@pytest.mark.parametrize(
    ("expression", "minutes"),
    [("* * * * *", 1), ("*/20 * * * *", 20), ("59,1 * * * *", 2), ("0 0,23 * * *", 60), ("0 6 * * *", 24 * 60)],
)
def test_the_shortest_time_between_two_matches(expression: str, minutes: int) -> None:
    assert parse(expression).shortest_minutes == minutes
