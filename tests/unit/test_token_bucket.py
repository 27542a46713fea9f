"""The bucket of requests a second, with a clock that the tests turn."""

from hypothesis import given
from hypothesis import strategies as st

from runtime.token_bucket import TokenBucket


class Clock:
    """A clock that stands still until a test turns it."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def test_a_burst_is_allowed_and_what_follows_waits_for_its_token() -> None:
    clock = Clock()
    bucket = TokenBucket(2, 3, clock)
    assert bucket.available == 3
    assert [bucket.take() for _ in range(4)] == [0, 0, 0, 0.5]
    clock.seconds += 0.25
    assert bucket.take() == 0.25
    clock.seconds += 0.25
    assert bucket.take() == 0
    assert bucket.available == 0


def test_an_idle_bucket_does_not_overflow() -> None:
    clock = Clock()
    bucket = TokenBucket(100, 2, clock)
    clock.seconds += 3600
    assert [bucket.take() for _ in range(3)] == [0, 0, 0.01]


@given(
    per_second=st.floats(0.001, 1e6),
    burst=st.integers(1, 1000),
    waits=st.lists(st.floats(0, 100), min_size=1, max_size=100),
)
def test_never_more_than_its_rate_and_its_burst(per_second: float, burst: int, waits: list[float]) -> None:
    """Whenever calls come. And a call that comes after the wait that it was told is served."""
    clock = Clock()
    bucket = TokenBucket(per_second, burst, clock)
    began = clock.seconds
    for taken, wait in enumerate(waits, 1):
        clock.seconds += wait
        told = bucket.take()
        if told:
            # A little more, because floating point rounds.
            clock.seconds += told * (1 + 1e-6) + 1e-6
            assert bucket.take() == 0
        assert taken <= burst + (clock.seconds - began) * per_second + 1e-3
