"""The output tokens that a batch without a budget leases from the ledger of its tenant: see workflows.llm_ledger."""

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Final

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from jobs import batches, names
    from llm_pb import internal_pb2

from workflows import activities
from workflows.running_chunks import STEP_RETRIES, STEP_TIMEOUT, RunningChunk

_DEFAULT_TOKENS: Final = 256
"""Output tokens of an item of whose size nothing is known."""
_FIRST_PAUSE: Final = timedelta(seconds=5)
"""Pause after the first question to a ledger that has no tokens left. It doubles."""
_MAX_PAUSE: Final = timedelta(minutes=5)
"""Maximum pause between two questions to it."""


def lease_request(
    batch_id: str,
    run: internal_pb2.BatchRun,
    lacking: int,
    begun: Collection[RunningChunk],
    next_: Sequence[batches.Chunk],
) -> internal_pb2.LeaseRequest:
    """Return what a batch asks its ledger for.

    `lacking` is what one of its chunks needs, `begun` the chunks that run or wait, `next_` those that are to run next.
    """
    waiting = [*(running.chunk for running in begun if running.handle is None), *next_]
    used = run.progress.usage.output_tokens + sum(running.result.usage.output_tokens for running in begun)
    wanted = sum(chunk.items * (chunk.group.default_max_tokens or _DEFAULT_TOKENS) for chunk in waiting)
    return internal_pb2.LeaseRequest(
        workflow_id=batch_id,
        used_tokens=used,
        held_tokens=max(run.progress.leased_tokens - used, 0),
        least_tokens=lacking,
        wanted_tokens=lacking + wanted,
        output_tokens_limit=run.options.leased_a_day,
        alone=all(running.handle is None for running in begun),
    )


async def leased(
    ask: Callable[[], internal_pb2.LeaseRequest | None], give_back: Callable[[int], None] | None = None
) -> internal_pb2.LeaseResponse:
    """Ask the ledger for output tokens until it has some, or says that it never will have.

    `ask` returns what is lacking at the moment: what runs meanwhile may end and give back what it has not used. Where
    it returns None, nothing is lacking any more, and the response is empty.

    `give_back` notes that so many tokens are given back. A batch of which nothing runs may wait for another day, so it
    asks for all that it needs and holds nothing meanwhile. A pipeline of which nothing runs holds nothing anyway.
    """
    pause = _FIRST_PAUSE
    while (request := ask()) is not None:
        held = request.held_tokens if request.alone else 0
        if held and give_back is not None and workflow.patched(names.PATCH_RETURNED_LEASES):
            give_back(held)
            continue
        answer = await workflow.execute_activity(
            activities.lease_tokens, request, start_to_close_timeout=STEP_TIMEOUT, retry_policy=STEP_RETRIES
        )
        if answer.leased_tokens or answer.never:
            return answer
        with suppress(TimeoutError):
            await workflow.wait_condition(partial(_has_changed, ask, request), timeout=pause)
        pause = min(2 * pause, _MAX_PAUSE)
    return internal_pb2.LeaseResponse()


def _has_changed(ask: Callable[[], internal_pb2.LeaseRequest | None], request: internal_pb2.LeaseRequest) -> bool:
    return ask() != request
