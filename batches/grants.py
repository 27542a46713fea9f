"""What the items of a chunk may use of its grant: each reserves the most that it may use before it begins.

So the chunk uses no token beyond its grant, however many of its items run. What an item did not need it returns.
"""

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from typing import Final

from jobs.batches import BUDGET_SPENT
from jobs.costs import cost_micros
from jobs.errors import reason_of
from jobs.leases import ENGINE_TIME, Amounts, limits_of, to_budget, used_of
from llm_pb import batch_pb2, common_pb2, internal_pb2, llm_pb2

_TEMPLATE_TOKENS: Final = 64
"""Number of tokens that a chat template adds to a prompt, and to each of its messages, about."""


class Grant:
    """The grant of one chunk, by what its items use."""

    def __init__(self, request: internal_pb2.ChunkRequest, used: common_pb2.Usage, default_max_tokens: int) -> None:
        """`used` is what earlier attempts have used. `default_max_tokens` is of jobs for which nothing else says it."""
        self._limits = limits_of(request.grant)
        self._last = request.last_grant
        self._price = request.price
        self._max_tokens = request.default_max_tokens or default_max_tokens
        self._used = used_of(used)
        self._reserved: dict[int, Amounts] = {}
        self._cut: dict[int, Amounts] = {}
        self._changed = asyncio.Event()
        self.needed: common_pb2.Budget | None = None
        """As ChunkResult.needed. No item begins any more once it is set."""

    async def reserve(self, place: int, job: llm_pb2.JobRequest) -> bool:
        """Reserve what an item may use, once that is left, and return whether it may begin.

        The budget of the job is what remains, where a last grant has less than the item may use.
        """
        most = self._most(job)
        while self.needed is None:
            left = self._left()
            if all(left[name] >= most[name] for name in left):
                self._reserved[place] = most
                return True
            if not self._reserved:
                if self._last and all(amount > 0 for amount in left.values()):
                    self._reserved[place] = self._cut[place] = _bound(job, left, most)
                    return True
                self._need({name: self._used[name] + most[name] for name in left if left[name] < max(most[name], 1)})
                break
            self._changed.clear()
            await self._changed.wait()
        return False

    def settle(self, place: int, item: batch_pb2.BatchItem, usage: common_pb2.Usage) -> None:
        """Note what an item has used that has ended. Its reservation is still to be released."""
        for name, amount in used_of(usage).items():
            self._used[name] += amount
        self._reserved.pop(place, None)
        if place in self._cut and item.HasField("error") and reason_of(item.error) == BUDGET_SPENT:
            self._need({name: self._used[name] + 1 for name in self._cut[place]})

    def release(self, place: int) -> None:
        """Return the reservation of an item."""
        self._reserved.pop(place, None)
        self._cut.pop(place, None)
        self._changed.set()

    def is_over(self, running: Mapping[int, timedelta]) -> bool:
        """Return whether the time in engines is spent, and note that. `running`: what each item that runs has had."""
        limit = self._limits.get(ENGINE_TIME)
        if limit is None or self.needed is not None:
            return False
        had = sum((time for place, time in running.items() if place in self._reserved), timedelta(0))
        if (used := self._used[ENGINE_TIME] + 1000 * (had // timedelta(microseconds=1))) < limit:
            return False
        self._need({ENGINE_TIME: used + 1})
        return True

    @property
    def is_last(self) -> bool:
        """Whether the batch has nothing beyond it."""
        return self._last

    def _left(self) -> Amounts:
        return {
            name: limit - self._used[name] - sum(reserved.get(name, 0) for reserved in self._reserved.values())
            for name, limit in self._limits.items()
        }

    def _need(self, amounts: Amounts) -> None:
        self.needed = to_budget(amounts)
        self._changed.set()

    def _most(self, job: llm_pb2.JobRequest) -> Amounts:
        """Return the most that a job may use."""
        own = limits_of(job.budget)
        text = len(job.prompt.encode()) + job.prompt_file.size_bytes
        text += sum(len(message.content.encode()) + _TEMPLATE_TOKENS for message in job.messages)
        prompt = min(text + _TEMPLATE_TOKENS, own.get("prompt_tokens", text + _TEMPLATE_TOKENS))
        output = job.params.max_tokens if job.params.HasField("max_tokens") else self._max_tokens
        output = min(output, own.get("output_tokens", output))
        cost = cost_micros(self._price, prompt, output)
        return {
            "prompt_tokens": prompt,
            "output_tokens": output,
            "cost_micros": min(cost, own.get("cost_micros", cost)),
            # It is not known before.
            ENGINE_TIME: 1,
        }


def _bound(job: llm_pb2.JobRequest, left: Amounts, most: Amounts) -> Amounts:
    """Bound a job by what is left where it might use more, and return these bounds."""
    cut = {name: amount for name, amount in left.items() if amount < most[name]}
    for name, amount in cut.items():
        setattr(job.budget, name, amount)
    return cut
