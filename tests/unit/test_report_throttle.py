"""The interval of an attempt's reports when many attempts run concurrently."""

from contextlib import ExitStack
from datetime import timedelta

import pytest

from services.gpu_worker.report_throttle import ReportThrottle


@pytest.mark.parametrize(("attempts", "seconds"), [(0, 2), (1, 2), (16, 2), (64, 8), (256, 32)])
def test_a_worker_as_a_whole_reports_no_more_often_beyond_some_attempts(attempts: int, seconds: float) -> None:
    throttle = ReportThrottle()
    with ExitStack() as running:
        for _ in range(attempts):
            running.enter_context(throttle.attempt())
        assert throttle.seconds(timedelta(seconds=2)) == seconds
    assert throttle.seconds(timedelta(seconds=2)) == 2


@pytest.mark.parametrize(("attempts", "seconds"), [(1, 0), (16, 0), (64, 0.016), (256, 0.064)])
def test_a_worker_as_a_whole_publishes_no_more_often_beyond_some_attempts(attempts: int, seconds: float) -> None:
    throttle = ReportThrottle(4000)
    with ExitStack() as running:
        for _ in range(attempts):
            running.enter_context(throttle.attempt())
        assert throttle.output_seconds == seconds
