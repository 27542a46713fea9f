"""Marks the tests that need a server which is not ours: `make check` leaves them out, `make test` runs them.

Each contract is kept by an implementation without such a server, too, which `make check` tests.
"""

from typing import Final

import pytest

SERVERS: Final[dict[str, tuple[str, ...] | None]] = {
    # S3
    "kind": ("moto", "weed"),
    "moto": None,
    # KMS
    "new": ("kms",),
    # PostgreSQL and Kafka
    "peer": ("kafka", "postgres"),
    "postgres": None,
    # three NATS servers
    "cluster": None,
}
"""The fixtures that start such servers, each with the parameters for which it does; None for all."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and any(_starts(item, fixture) for fixture in item.fixturenames):
            item.add_marker("server")


def _starts(item: pytest.Function, fixture: str) -> bool:
    parameters = SERVERS.get(fixture, ())
    return parameters is None or (hasattr(item, "callspec") and item.callspec.params.get(fixture) in parameters)
