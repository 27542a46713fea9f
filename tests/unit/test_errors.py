"""The tree of errors and its table agree."""

from collections.abc import Iterator

import pytest
from google.rpc import code_pb2

from jobs import errors
from tests.support.jobs import unpack


def tree(root: type[errors.JobError]) -> Iterator[type[errors.JobError]]:
    for error in root.__subclasses__():
        yield error
        yield from tree(error)


def test_no_error_is_missing_from_the_table() -> None:
    assert set(tree(errors.JobError)) == set(errors.RULES)


def test_the_docstring_draws_the_whole_tree() -> None:
    assert errors.__doc__ is not None
    drawn = [line.split("── ")[1].split()[0] for line in errors.__doc__.splitlines() if "── " in line]
    assert drawn == [error.__name__ for error in errors.RULES]


def test_reasons_are_unique() -> None:
    assert len(errors.BY_REASON) == len(errors.RULES)


@pytest.mark.parametrize("kind", errors.RULES, ids=lambda kind: kind.__name__)
def test_an_error_travels_whole(kind: type[errors.JobError]) -> None:
    """Through Temporal its type and whether it is retried; to a client its code, message and reason."""
    travelling = errors.to_application_error(kind("why"))
    assert errors.BY_REASON[travelling.type or ""] is kind
    assert travelling.non_retryable is not errors.RULES[kind].retryable
    status = errors.to_status(kind("why"))
    assert code_pb2.Code.Name(status.code) != "OK"
    assert status.message == "why"
    assert unpack(status)["ErrorInfo"].reason == kind.reason


def test_an_engines_pages_of_words_are_cut() -> None:
    """A status has to fit Temporal's memo and gRPC's trailers."""
    error = errors.EngineFailed("why " * 100_000)
    for message in (errors.to_status(error).message, errors.to_application_error(error).message):
        assert message.startswith("why why")
        assert len(message) <= 2000
