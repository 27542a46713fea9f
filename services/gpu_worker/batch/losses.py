"""The workers that an item was lost with: whether the item may be what kills them.

An item that kills its worker would otherwise kill one after the other until the window of its batch is over. Items that
ran at the same time are lost as often. So an item that a worker was lost with before it had generated anything new is a
suspect, and a worker runs one suspect at a time: from then on only the one that is to blame is lost again.

A worker that cannot read the log knows no suspects and runs all items side by side. Those that are lost with it are not
suspected more than before.
"""

from collections.abc import Iterable
from typing import Final, NamedTuple

from jobs.errors import EngineDead, reason_of
from llm_pb import internal_pb2, llm_pb2

MAX_LOST: Final = 10
"""Number of lost workers after which an item fails."""
MAX_IN_VAIN: Final = 3
"""Number of workers after which an item fails that were lost one after the other while it generated nothing new."""


class Losses(NamedTuple):
    """The attempts at an item that ended with their worker or its engine, after the engine had got the item."""

    total: int = 0
    in_vain: int = 0
    """The last ones, in a row, that had generated nothing new."""

    @property
    def are_too_many(self) -> bool:
        """Whether the item fails."""
        return self.total >= MAX_LOST or self.in_vain >= MAX_IN_VAIN


def losses_of(records: Iterable[internal_pb2.FeedRecord]) -> Losses:
    """Return the losses of an item by its records in the log, of which all count."""
    total = in_vain = known = most = 0
    writer, in_engine, new = "", False, False

    def lose() -> None:
        nonlocal total, in_vain
        if in_engine:
            total, in_vain = total + 1, 0 if new else max(in_vain, known + 1)

    for record in records:
        if record.HasField("attempt_started") and record.writer != writer:
            lose()
            writer, in_engine, new = record.writer, False, False
        elif record.HasField("engine_began"):
            in_engine, began = True, record.engine_began
            known = began.lost_in_vain if began.HasField("lost_in_vain") else in_vain
        elif record.HasField("tokens_made"):
            made = record.tokens_made
            if (size := made.token_offset + len(made.token_ids)) > most:
                most, new = size, True
        elif record.HasField("attempt_ended"):
            if has_lost_engine(record.attempt_ended.attempt):
                lose()
            else:
                in_vain = 0
            in_engine = False
    lose()
    return Losses(total, in_vain)


def has_lost_engine(attempt: llm_pb2.JobAttempt) -> bool:
    """Return whether the attempt ended because the engine died, maybe by another item."""
    return attempt.end == llm_pb2.ATTEMPT_END_FAILED and reason_of(attempt.error) == EngineDead.reason
