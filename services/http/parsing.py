"""JSON of callers as messages of llm.proto, as jobs.parsing reads it."""

from collections.abc import Collection
from typing import Any, TypeVar

from google.protobuf.message import Message

from durable_llm.errors import Violation
from jobs import parsing
from services.http.failures import bad_request

M = TypeVar("M", bound=Message)


def parse(value: dict[str, Any], message: M, *, without: Collection[str] = ()) -> M:
    """Fill a message from JSON and return it. Raises Failure, 400, for unknown fields and for values of a wrong type.

    `without` names the fields that the path of the request sets.
    """
    wrong = [Violation(name, "is in the path, not in the body") for name in without if name in value]
    try:
        filled = parsing.parse(value, message)
    except parsing.InvalidFields as error:
        wrong += [Violation(*violation) for violation in error.violations]
        if not wrong:
            raise bad_request(message=f"the body {error}") from error
    else:
        if not wrong:
            return filled
    raise bad_request(*wrong[:100])
