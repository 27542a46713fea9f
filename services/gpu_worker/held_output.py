"""The output that an attempt holds back, for one record of the feed."""

from collections.abc import Iterable
from typing import Final

from llm_pb import llm_pb2
from services.gpu_worker.engines.engine import Output

_MAX_BYTES: Final = 64 * 1024
"""Size of a text that is not held back, in bytes. A broker accepts a megabyte."""


class HeldOutput:
    """Outputs of an engine, in order, to be joined to one. True while there is any."""

    def __init__(self) -> None:
        self.text_bytes = 0
        """Size of the text, in UTF-8."""
        self._outputs: list[Output] = []

    def __bool__(self) -> bool:
        return bool(self._outputs)

    @property
    def is_small(self) -> bool:
        """Whether more may be added before it is published."""
        return self.text_bytes < _MAX_BYTES

    def add(self, output: Output, text_bytes: int) -> None:
        """Add an output, whose text has that size."""
        self._outputs.append(output)
        self.text_bytes += text_bytes

    def take(self) -> Output:
        """Remove all outputs; return them as one."""
        outputs, self._outputs, self.text_bytes = self._outputs, [], 0
        if len(outputs) == 1:
            return outputs[0]
        token_ids: list[int] = []
        logprobs: list[llm_pb2.TokenLogprobs] = []
        for output in outputs:
            token_ids += output.token_ids
            logprobs += output.logprobs
        text = "".join([output.text for output in outputs])
        return Output(text, tuple(token_ids), outputs[-1].prompt_tokens, None, tuple(logprobs))


def logprobs_size(logprobs: Iterable[llm_pb2.TokenLogprobs]) -> int:
    """Return the size of log probabilities as a part of a message, in bytes."""
    return sum(place.ByteSize() + 4 for place in logprobs)
