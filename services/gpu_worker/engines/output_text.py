"""From tokens to text: whole characters, stop texts and the end of the output, the same for every engine.

A token is a sequence of bytes. It may split a character, and the next token may change how it decodes. A stop text may
span tokens. So text is held back until it is certain, and the same tokens always give the same text in the same pieces.
That is why another attempt can continue: it replays the tokens generated so far and reaches the same state, even in the
middle of a character or of a stop text.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Final

from llm_pb import llm_pb2
from services.gpu_worker.engines.engine import CannotContinue, Output

Decode = Callable[[Sequence[int]], str]
"""Decodes token ids to text. Invalid UTF-8 becomes U+FFFD."""

STOP: Final = llm_pb2.FINISH_REASON_STOP
LENGTH: Final = llm_pb2.FINISH_REASON_LENGTH

REPLACEMENT: Final = "\ufffd"
# A character has at most 4 bytes. Until its last token has come it decodes to one U+FFFD, or to one for each of its
# tokens if each is a byte.
MOST_TOKENS_OF_A_CHARACTER: Final = 4
MOST_REPLACEMENTS: Final = 3
# Prompt tokens that are decoded with the output: some tokenizers drop a space at the start of what they decode.
CONTEXT_TOKENS: Final = 5
# Maximum number of tokens that are decoded again, where no token ends together with a character.
WINDOW_TOKENS: Final = 32


def decoder(tokenizer: Any, *, skip_special_tokens: bool = True) -> Decode:
    """Return the decoding of a transformers tokenizer, without its cleaning of spaces, which changes earlier text.

    Each token is decoded twice, so the Rust part of a tokenizer is called directly: transformers' checks of the
    arguments take three times as long.
    """
    # Tokenizers written in Python have no backend.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
    return partial(backend.decode, skip_special_tokens=skip_special_tokens)


class Detokenizer:
    """Decodes tokens to text as they come, whole characters only.

    The last few tokens, the window, are decoded again with each new one. A U+FFFD at the end of their text may be the
    beginning of a character, so it is held back until a token completes it or shows that it is invalid.
    """

    def __init__(self, decode: Decode, prompt_ids: Sequence[int]) -> None:
        self._decode = decode
        self._window = list(prompt_ids[-CONTEXT_TOKENS:])
        self._context = len(self._window)
        """Number of tokens at the window's start that were complete at the last check."""
        self._returned = len(decode(self._window))
        """Number of characters of the window's text that push has returned or that come before the output."""
        self._age = 0
        """Number of tokens since push last returned text."""

    def push(self, token_id: int) -> str:
        """Add a token; return the characters that are now complete."""
        self._window.append(token_id)
        self._age += 1
        text = self._decode(self._window)
        complete = text.rstrip(REPLACEMENT)
        end = len(complete)
        if self._age >= MOST_TOKENS_OF_A_CHARACTER:
            # No character has so many tokens, so all but the end is invalid.
            end = max(end, len(text) - MOST_REPLACEMENTS)
        if end <= self._returned:
            return ""
        new = text[self._returned : end]
        self._returned = end
        self._age = 0
        if complete == text:
            del self._window[: self._context]
            self._context = len(self._window)
            self._returned = len(self._decode(self._window))
        elif len(self._window) > WINDOW_TOKENS:
            held = len(text) - end
            del self._window[: -WINDOW_TOKENS // 2]
            self._context = 0
            self._returned = len(self._decode(self._window)) - held
        return new


class StopTexts:
    """Finds the first stop text in text that comes in pieces, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.met = False
        """Whether a stop text was met. Nothing comes after it."""

    def push(self, text: str, *, may_stop: bool) -> str:
        """Add text; return what is certainly output. A stop text counts only if it ends in text with `may_stop`."""
        before = len(self._held)
        self._held += text
        if may_stop and text:
            matches = [
                (start + len(stop), start)
                for stop in self._stops
                if (start := self._held.find(stop, max(0, before - len(stop) + 1))) >= 0
            ]
            if matches:
                # The stop text that ends first counts, so that it does not matter how the text is split.
                self.met = True
                output, self._held = self._held[: min(matches)[1]], ""
                return output
        held = next((size for size in range(self._max_held(), 0, -1) if self._may_begin(size)), 0)
        cut = len(self._held) - held
        output, self._held = self._held[:cut], self._held[cut:]
        return output

    def rest(self) -> str:
        """Return the text that is held back. Call it once no more text comes."""
        output, self._held = self._held, ""
        return output

    def _max_held(self) -> int:
        return min(len(self._held), self._longest - 1)

    def _may_begin(self, size: int) -> bool:
        tail = self._held[-size:]
        return any(stop.startswith(tail) for stop in self._stops if len(stop) > size)


class OutputWriter:
    """Builds a generation's Outputs from its tokens, and detects its end."""

    def __init__(
        self,
        decode: Decode,
        prompt_ids: Sequence[int],
        params: llm_pb2.SamplingParams,
        end_ids: Collection[int],
        room: int,
    ) -> None:
        """`room` is the maximum number of tokens of prompt and output together: see Generation.room."""
        self._characters = Detokenizer(decode, prompt_ids)
        self._stops = StopTexts(params.stop)
        self._prompt_tokens = len(prompt_ids)
        self._min_tokens = params.min_tokens
        self._end_ids = end_ids
        self.limit = min(params.max_tokens, room - len(prompt_ids))
        """Maximum number of output tokens: max_tokens, or fewer if there is less room."""
        self.count = 0
        """Number of output tokens so far."""
        self._text_bytes = 0
        """Size of the text so far, where tokens have log probabilities."""

    def opening(self) -> Output:
        """Return the first Output, which has only the length of the prompt."""
        return Output("", (), self._prompt_tokens)

    def write(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[llm_pb2.TokenLogprobs] = (),
        ended: "llm_pb2.FinishReason.ValueType | None" = None,
    ) -> Output:
        """Return the Output of new tokens. Sets the offset of each of `logprobs`.

        Tokens after the end are dropped. `ended` is the engine's own reason to generate no more tokens, if it has one.
        """
        text, used, reason = self._take(token_ids, logprobs)
        reason = reason or ended
        if reason is not None:
            text += self._stops.rest()
        if logprobs:
            self._text_bytes += len(text.encode())
        return Output(
            text=text,
            token_ids=tuple(token_ids[:used]),
            prompt_tokens=self._prompt_tokens,
            finish_reason=reason,
            logprobs=tuple(logprobs[:used]),
        )

    def resume(self, token_ids: Sequence[int], published: str) -> Output | None:
        """Replay an earlier attempt's tokens, whose text `published` was yielded.

        Returns the last Output if the generation had already ended, otherwise None. Raises CannotContinue if the tokens
        do not decode to that text, because the model or the tokenizer is another one.
        """
        text, used, reason = self._take(token_ids)
        if reason is not None:
            text += self._stops.rest()
        if used < len(token_ids) or not text.startswith(published) or (reason is None and text != published):
            raise CannotContinue("the tokens generated so far do not give the text that was published")
        self._text_bytes = len(published.encode())
        if reason is None:
            return None
        return Output(text[len(published) :], (), self._prompt_tokens, reason)

    def _take(
        self, token_ids: Sequence[int], logprobs: Sequence[llm_pb2.TokenLogprobs] = ()
    ) -> "tuple[str, int, llm_pb2.FinishReason.ValueType | None]":
        """Consume tokens up to the end of the output; return their text, the number consumed, and the finish reason."""
        text = ""
        for used, token_id in enumerate(token_ids, start=1):
            if logprobs:
                logprobs[used - 1].offset = self._text_bytes + len(text.encode())
            self.count += 1
            may_stop = self.count > self._min_tokens
            if token_id in self._end_ids:
                return text, used, STOP
            text += self._stops.push(self._characters.push(token_id), may_stop=may_stop)
            if self._stops.met:
                return text, used, STOP
            if self.count >= self.limit:
                return text, used, LENGTH
        return text, len(token_ids), None
