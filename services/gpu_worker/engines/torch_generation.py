"""One generation of the torch engine, from its prompt to its last token."""

import asyncio

import torch

from jobs.errors import JobError
from services.gpu_worker.engines.engine import Output
from services.gpu_worker.engines.output_text import OutputWriter
from services.gpu_worker.engines.torch_batch import Sequence
from services.gpu_worker.engines.torch_model import LoadedModel
from services.gpu_worker.engines.torch_sampling import Sampling, SamplingContext, choose, token_logprobs
from services.gpu_worker.engines.torch_structured import StructuredForm


class ActiveGeneration:
    """A generation that the event loop waits for and the model's thread runs."""

    def __init__(
        self,
        sequence: Sequence,
        prompt_tokens: int,
        sampling: Sampling,
        form: StructuredForm | None,
        writer: OutputWriter,
    ) -> None:
        self.sequence = sequence
        self.prompt_tokens = prompt_tokens
        self.writer = writer
        self.outputs: asyncio.Queue[Output | JobError] = asyncio.Queue()
        """Filled on the event loop."""
        self.over = False
        """Whether nobody waits for more output. Either side sets it."""
        self._sampling = sampling
        self._form = form

    @property
    def plain(self) -> bool:
        """Whether each token is the likeliest by the model's own scores, and nothing else is asked for."""
        return self._sampling.plain and self._form is None

    def next(self, loaded: LoadedModel, scores: torch.Tensor, likeliest: int) -> Output:
        """Choose the next token by its scores, of which `likeliest` has the highest; return its output.

        Raises UnsupportedParams for a form of output that slows the whole batch.
        """
        ids, sampling = self.sequence.ids, self._sampling
        token, logprobs = likeliest, []
        if not self.plain:
            scores = scores.cpu()
            context = SamplingContext(ids[: self.prompt_tokens], ids[self.prompt_tokens :], loaded.end_ids)
            token = choose(scores if self._form is None else self._form.masked(scores), sampling, context)
            if self._form is not None:
                self._form.accept(token)
            if sampling.logprobs is not None:
                logprobs = [token_logprobs(scores, token, sampling.logprobs, loaded.decode_token)]
        ids.append(token)
        return self.writer.write([token], logprobs)
