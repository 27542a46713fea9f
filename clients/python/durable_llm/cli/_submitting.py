"""What a command says when it does not know what has become of its Submit."""

from collections.abc import Iterator
from contextlib import contextmanager

from durable_llm.cli._exits import Interrupted
from durable_llm.cli._interrupts import interruptible
from durable_llm.cli._text import say


@contextmanager
def submitting(verb: str, request_id: str) -> Iterator[None]:
    """Say how to find what a call of the context has submitted, when it gets no answer. Ctrl-C raises Interrupted.

    `verb` names the command, as in "Submit it again".
    """
    from durable_llm.errors import AuditUnavailable, Unavailable

    again = f"{verb} it again with --request-id {request_id}"
    unsure = f"It may have been accepted. {again} to find it."
    try:
        with interruptible():
            yield
    except KeyboardInterrupt:
        raise Interrupted(unsure) from None
    except AuditUnavailable:
        # The gateway has done nothing. One of the calls before it may have had no answer.
        say(f"{again}.")
        raise
    except Unavailable:
        say(unsure)
        raise
