"""A job's output as its watchers hold it, and how often a part of it was replaced. Offsets count UTF-8 bytes."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from llm_pb import llm_pb2


class Transcript:
    """The output so far. It is cut back only where it turns out to be wrong.

    Gateways and the worker build it from the same records of the feed, so that they agree on what was replaced.
    """

    def __init__(self) -> None:
        self.data = bytearray()
        """The output. Read-only."""
        self.logprobs: list[llm_pb2.TokenLogprobs] = []
        """The log probabilities of the tokens, in order, where the job asks for them. Read-only."""
        self.cuts: list[int] = []
        """The offsets where the output was cut back, in order. Read-only."""
        self.rewinds = 0
        """How often watchers had to rewind, as counted here and elsewhere."""
        self.lowest_rewind = 0
        """The lowest offset that watchers had to rewind to. 0 without rewinds."""

    def put(
        self, offset: int, text: str, token_offset: int = 0, logprobs: Sequence[llm_pb2.TokenLogprobs] = ()
    ) -> None:
        """Put text at an offset, and the log probabilities of its tokens, of which the first is number `token_offset`.

        Nothing changes if the output before it is unknown.

        An attempt that starts over repeats text. While text and tokens are the same nothing changes, so nobody has to
        rewind. From the first difference on, the output is the new attempt's.
        """
        new, size = text.encode(), len(self.data)
        if offset == size and not (logprobs or self.logprobs):
            self.data += new
            return
        if offset > size:
            return
        known = self.data[offset : offset + len(new)]
        same = _same_bytes(known, new)
        differs = offset + same if same < len(known) else None
        if logprobs or self.logprobs:
            differs = self._put_logprobs(token_offset, logprobs, differs)
        if differs is not None:
            self._cut(differs, offset + same)
        self.data += new[len(self.data) - offset :]

    def settle(self, output: str, logprobs: Iterable[llm_pb2.TokenLogprobs] = ()) -> None:
        """Set the whole output, which is durable now. Without `logprobs` those so far remain."""
        settled = list(logprobs)
        # Workers of earlier versions report them with the result only. Nobody rewinds for those.
        self.put(0, output, 0, settled if self.logprobs else ())
        if len(self.data) > (size := len(output.encode())):
            self._cut(size, size)
            self.logprobs = [place for place in self.logprobs if place.offset < size]
        # The same objects as in the result take no more memory.
        self.logprobs = settled or self.logprobs

    def add_rewinds(self, rewinds: int, lowest: int) -> None:
        """Merge the rewinds that were counted elsewhere, where more of the output's history was seen."""
        if rewinds:
            self.lowest_rewind = min(self.lowest_rewind, lowest) if self.rewinds else lowest
            self.rewinds = max(self.rewinds, rewinds)

    def _put_logprobs(
        self, token_offset: int, logprobs: Sequence[llm_pb2.TokenLogprobs], differs: int | None
    ) -> int | None:
        """Put log probabilities; return the offset of the first difference, `differs` for the text alone.

        A rewind goes back to the beginning of a token, because a watcher must not keep a token whose text it drops.
        """
        known = self.logprobs[token_offset : token_offset + len(logprobs)]
        changed = [
            min(old.offset, new.offset)
            for old, new in zip(known, logprobs, strict=False)
            if old.offset != new.offset or old.chosen.token != new.chosen.token
        ]
        changed += [place.offset for place in logprobs[len(known) :]]
        if changed and changed[0] < len(self.data):
            # Watchers may be past it.
            differs = changed[0] if differs is None else min(differs, changed[0])
        if differs is not None and (before := bisect_right(self.logprobs, differs, key=offset_of)):
            differs = self.logprobs[before - 1].offset
        if (changed or differs is not None) and token_offset <= len(self.logprobs):
            self.logprobs[token_offset:] = logprobs
        return differs

    def _cut(self, offset: int, size: int) -> None:
        """Make watchers rewind to an offset, and keep the first `size` bytes, which are right."""
        offset = character_start(self.data, offset)
        del self.data[size:]
        self.cuts.append(offset)
        self.lowest_rewind = min(self.lowest_rewind, offset) if self.rewinds else offset
        self.rewinds += 1


def offset_of(place: llm_pb2.TokenLogprobs) -> int:
    """Return the offset of a token, by which log probabilities are in order."""
    return place.offset


def character_start(data: bytearray, offset: int) -> int:
    """Return the offset at which the character around an offset begins."""
    while 0 < offset < len(data) and data[offset] & 0xC0 == 0x80:
        offset -= 1
    return offset


def _same_bytes(left: bytes | bytearray, right: bytes) -> int:
    """Return how many bytes the two have in common at their beginning."""
    size = min(len(left), len(right))
    if left[:size] == right[:size]:
        return size
    return next(index for index in range(size) if left[index] != right[index])
