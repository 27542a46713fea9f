"""Checks prompts by their model's tokenizer: whether they fit the context and the job's budget, and whether a chat
message holds a special token.

Threads check one prompt after another, so that all other calls are served meanwhile. A prompt that would wait for long
is refused.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

from tokenizers import Tokenizer

from jobs.costs import spent_by_prompt
from jobs.field_rules import Violation, too_large
from jobs.tokenizer import WHY_NOT_SPECIAL, SpecialTokens, longest_token
from llm_pb import llm_pb2
from services.gateway.errors import exhausted

T = TypeVar("T")
_LONG: Final = 16 * 1024
"""Minimum size of a long prompt, in bytes."""
_MAX_WAITING: Final = 512 * 1024
_MAX_WAITING_LONG: Final = 4 * 1024 * 1024
"""Maximum bytes that wait for the tokenizer: a second or two of work."""


class Lane:
    """Runs functions in a thread, one after another, up to a maximum of waiting bytes."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` may wait or run."""
        self._max_bytes = max_bytes
        self._size = 0
        self._turn = asyncio.Lock()

    async def run(self, size: int, function: Callable[[], T]) -> T:
        """Return what the function returns. Raises ApiError RESOURCE_EXHAUSTED immediately when too much waits."""
        if self._size and self._size + size > self._max_bytes:
            raise exhausted("too many prompts wait to be checked at this gateway; call again or call another")
        self._size += size
        try:
            async with self._turn:
                running = asyncio.ensure_future(asyncio.to_thread(function))
                try:
                    return await asyncio.shield(running)
                except asyncio.CancelledError:
                    # A thread cannot be stopped, so its turn lasts until it ends.
                    await asyncio.wait([running])
                    raise
        finally:
            self._size -= size


class Lanes:
    """The lanes of a gateway, shared by its models. Short prompts do not wait for long ones."""

    def __init__(self) -> None:
        self._short, self._long = Lane(_MAX_WAITING), Lane(_MAX_WAITING_LONG)

    def of(self, size: int) -> Lane:
        """Return the lane for a prompt of `size` bytes."""
        return self._short if size < _LONG else self._long


class Prompts:
    """Checks the prompts of one model."""

    def __init__(self, path: Path, context_tokens: int, lanes: Lanes, *, special_tokens_in_messages: bool) -> None:
        """Load the model's tokenizer. Raises the error of a missing or broken one."""
        self._tokenizer = Tokenizer.from_file(str(path))
        # A tokenizer that truncates a text would count only the rest.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._longest = longest_token(self._tokenizer)
        self._special = None if special_tokens_in_messages else SpecialTokens.of(self._tokenizer)
        self._context_tokens = context_tokens
        self._lanes = lanes

    @property
    def max_bytes(self) -> int | None:
        """The maximum size of a prompt, in bytes, that may fit the context; None where a token may be of any length."""
        return None if self._longest is None else self._context_tokens * self._longest - 1

    async def check(self, job: llm_pb2.JobRequest, price: llm_pb2.ModelPrice | None = None) -> list[Violation]:
        """Return the violations of the job's prompt. Raises ApiError RESOURCE_EXHAUSTED when too much waits.

        `price` is the model's. A prompt in messages is counted without the tokens of the chat template.
        """
        field = "job.prompt" if job.prompt else "job.messages"
        texts = [job.prompt] if job.prompt else [message.content for message in job.messages]
        size = sum(len(text.encode()) for text in texts)
        if self.max_bytes is not None and size > self.max_bytes:
            return [Violation(field, too_large(size, self.max_bytes))]
        # A token stands for at least one byte, so most prompts fit without a count.
        uncounted = size < self._context_tokens and spent_by_prompt(job.budget, price, size) is None
        if uncounted and not job.messages:
            return []
        return await self._lanes.of(size).run(size, lambda: self._check(job, price, field, texts, uncounted=uncounted))

    def _check(
        self,
        job: llm_pb2.JobRequest,
        price: llm_pb2.ModelPrice | None,
        field: str,
        texts: Sequence[str],
        *,
        uncounted: bool,
    ) -> list[Violation]:
        if field == "job.messages" and (violations := list(self._special_tokens(texts))):
            return violations
        if uncounted:
            return []
        # One by one: a batch of several would take all cores. Only the methods for batches let other threads run.
        tokens = sum(len(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]) for text in texts)
        if tokens >= self._context_tokens:
            most = self._context_tokens - 1
            return [Violation(field, f"is {tokens} tokens; at most {most} leave room for an answer")]
        spent = spent_by_prompt(job.budget, price, tokens)
        return [] if spent is None else [Violation(f"job.budget.{spent[0]}", spent[1])]

    def _special_tokens(self, contents: Sequence[str]) -> Iterator[Violation]:
        for index, content in enumerate(contents):
            if self._special is not None and (token := self._special.first_in(content)) is not None:
                yield Violation(f"job.messages[{index}].content", f"must not hold {token}: {WHY_NOT_SPECIAL}")
