"""The inputs of workflows and their signals: one that is started or signalled by hand may receive any number."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def one_input(method: F) -> F:
    """Return the method for any number of inputs: unless there is exactly one, it gets none.

    The input must have a default. The SDK passes on whatever was sent. A method that does not accept it fails its
    workflow task, which Temporal then retries forever. The signature stays the method's own, because the SDK decodes
    the input by it.
    """
    if inspect.iscoroutinefunction(method):

        @wraps(method)
        async def call_async(self: object, *inputs: object) -> object:
            return await method(self, *_at_most_one(inputs))

        return cast("F", call_async)

    @wraps(method)
    def call(self: object, *inputs: object) -> object:
        return method(self, *_at_most_one(inputs))

    return cast("F", call)


def _at_most_one(inputs: tuple[object, ...]) -> tuple[object, ...]:
    return inputs if len(inputs) == 1 else ()
