"""How calls are repeated that failed for a reason that passes."""

import random
from dataclasses import dataclass
from datetime import timedelta

import grpc

from durable_llm.errors import ApiError

_PASSING = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    # Not by this client, where it is no error of a call's: the call came as a gateway stopped.
    grpc.StatusCode.CANCELLED,
    # One try has taken too long: the next one may meet another gateway.
    grpc.StatusCode.DEADLINE_EXCEEDED,
)


@dataclass(frozen=True)
class RetryPolicy:
    """Waits that double, spread by chance. What the service asks for by RetryInfo is the least wait."""

    initial_backoff: timedelta = timedelta(milliseconds=200)
    """About the first wait."""
    max_backoff: timedelta = timedelta(seconds=10)
    """About the longest wait."""
    connect_timeout: timedelta = timedelta(seconds=10)
    """Time after which a service that has never answered is given up: its address may be wrong."""
    give_up_after: timedelta = timedelta(minutes=5)
    """Time without an answer after which a service that has answered before is given up."""

    def backoff(self, error: ApiError, failures: int, silence: timedelta, *, answered: bool) -> timedelta | None:
        """Return how long to wait before the next try; None to raise the error.

        `failures` is how many tries in a row have failed, from 1; `silence` how long ago the first of them began, and
        `answered` whether the service has ever answered before.
        """
        refused = error.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        limit = self.give_up_after if answered or refused else self.connect_timeout
        if error.code not in _PASSING or silence >= limit:
            return None
        wait: timedelta = min(self.initial_backoff * 2.0 ** min(failures - 1, 30), self.max_backoff)
        return max(wait * random.uniform(0.5, 1.5), error.retry_delay or timedelta())  # noqa: S311  # no secret
