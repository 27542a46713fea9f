"""Which failed calls are repeated, when, and for how long."""

import random
from dataclasses import dataclass
from datetime import timedelta

import grpc

from durable_llm.errors import ApiError, LimitReached

_PASSING = (
    grpc.StatusCode.UNAVAILABLE,
    # A call that came as a gateway stopped. A call that this client cancels does not fail.
    grpc.StatusCode.CANCELLED,
    # One try has taken too long: the next one may meet another gateway.
    grpc.StatusCode.DEADLINE_EXCEEDED,
)


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with jitter. A wait is never shorter than the service asks for by RetryInfo."""

    initial_backoff: timedelta = timedelta(milliseconds=200)
    """First wait, give or take half of it. Each further wait is twice as long."""
    max_backoff: timedelta = timedelta(seconds=10)
    """Longest wait, give or take half of it."""
    connect_timeout: timedelta = timedelta(seconds=10)
    """Silence after which a service that has never answered is given up: its address may be wrong."""
    give_up_after: timedelta = timedelta(minutes=5)
    """Silence after which a service that has answered before, or that refuses calls for a limit, is given up."""

    def backoff(self, error: ApiError, failures: int, silence: timedelta, *, answered: bool) -> timedelta | None:
        """Return how long to wait before the next try. Return None to give up.

        `failures` is the number of tries that have failed in a row, from 1. `silence` is how long the client has waited
        since the service last brought something new. `answered` says whether the service has ever answered the client.
        """
        refused = error.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        limit = self.give_up_after if answered or refused else self.connect_timeout
        if not _passes(error) or silence >= limit:
            return None
        wait: timedelta = min(self.initial_backoff * 2.0 ** min(failures - 1, 30), self.max_backoff)
        return max(wait * random.uniform(0.5, 1.5), error.retry_delay or timedelta())  # noqa: S311  # no secret


def _passes(error: ApiError) -> bool:
    if error.code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        # Without details it is gRPC's own: a message is too large, and will be the next time.
        return isinstance(error, LimitReached) or error.retry_delay is not None
    return error.code in _PASSING
