"""The embedded engine: any causal model in Hugging Face format, with transformers, on a CPU or one GPU.

One thread owns the model. It loads the model and then runs one step after the other, as long as there is something to
do. The event loop and that thread share a list of generations under a lock, and the thread returns outputs through the
loop.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Final

import torch

from jobs.errors import EngineDead, EngineFailed, JobError, OutOfMemory
from llm_pb import llm_pb2
from services.gpu_worker.engines.chat import PromptEncoder
from services.gpu_worker.engines.engine import IDLE, CannotContinue, EngineConfig, Generation, Load, Output
from services.gpu_worker.engines.output_text import OutputWriter
from services.gpu_worker.engines.torch_batch import Batch, Sequence
from services.gpu_worker.engines.torch_generation import ActiveGeneration
from services.gpu_worker.engines.torch_model import LoadedModel, TorchOptions, load_model
from services.gpu_worker.engines.torch_sampling import sampling_of
from services.gpu_worker.engines.torch_structured import StructuredForms

log = logging.getLogger(__name__)

CLOSED: Final = "the engine was closed"
_CLOSE_SECONDS: Final = 10


Made = tuple[ActiveGeneration, Output | JobError]


class TorchEngine:
    """See Engine. It continues any generation exactly, including seeded, penalised and structured ones."""

    name = "torch"

    def __init__(
        self,
        config: EngineConfig,
        options: TorchOptions,
        load: Callable[[str, TorchOptions], LoadedModel] = load_model,
    ) -> None:
        self._config = config
        self._options = options
        self._load = load
        self._loaded: LoadedModel | None = None
        # Set before _loaded is.
        self._prompts: PromptEncoder
        self._forms: StructuredForms
        self.dead = asyncio.Event()
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        # Guarded by _changed: the requests of the event loop.
        self._waiting: list[ActiveGeneration] = []
        self._closing = False
        # Changed by the thread only: generations that read their prompt, and those in the batch by their sequence.
        self._reading: list[ActiveGeneration] = []
        self._writing: dict[Sequence, ActiveGeneration] = {}

    @property
    def context_tokens(self) -> int:
        """Maximum number of tokens of prompt and output together."""
        return self._started().context_tokens

    @property
    def gpu(self) -> llm_pb2.GpuInfo:
        """The device that the model runs on."""
        return self._started().gpu

    def _started(self) -> LoadedModel:
        if self._loaded is None:
            raise EngineDead(CLOSED if self.dead.is_set() else "the engine has not started")
        return self._loaded

    async def start(self) -> None:
        """Load the model in the engine's thread."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[LoadedModel] = loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(loop, ready), name="torch-engine", daemon=True)
        self._thread.start()
        loaded = await ready
        self._prompts = await asyncio.to_thread(
            PromptEncoder, loaded.tokenizer, loaded.context_tokens, self._config.special_tokens_in_messages
        )
        self._forms = await asyncio.to_thread(StructuredForms, loaded.tokenizer, loaded.vocab_size, loaded.end_ids)
        self._loaded = loaded

    async def generate(self, generation: Generation) -> AsyncGenerator[Output, None]:
        """Yield a generation's output; see Engine.generate."""
        active, ended = await asyncio.to_thread(self._prepare, generation)
        if ended is not None:
            yield ended
            return
        yield active.writer.opening()
        with self._changed:
            if self._closing or self.dead.is_set():
                raise EngineDead(CLOSED)
            self._waiting.append(active)
            self._changed.notify()
        try:
            while True:
                item = await active.outputs.get()
                if isinstance(item, JobError):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            active.over = True
            with self._changed:
                self._changed.notify()

    def load(self) -> Load:
        """Count generations, and their cached tokens as a share of a full batch of full contexts."""
        if self._loaded is None:
            return IDLE
        # The lists are copied first, because the engine's thread changes them.
        running = [*self._reading, *self._writing.values()]
        cached = sum(active.sequence.cached for active in running)
        capacity = self._config.max_concurrent * self._loaded.context_tokens
        return Load(len(running), len(self._waiting), min(cached / capacity, 1.0))

    async def close(self) -> None:
        """End the thread and free the model."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            # A step that hangs does not end. The thread is a daemon, which does not keep the process alive.
            await asyncio.to_thread(self._thread.join, _CLOSE_SECONDS)
        self._loaded = None
        self.dead.set()

    def _prepare(self, generation: Generation) -> tuple[ActiveGeneration, Output | None]:
        """Return the generation for the thread, and its last output if an earlier attempt had ended it."""
        loaded, job = self._started(), generation.job
        prompt = self._prompts.ids(job)
        room = generation.room(len(prompt), loaded.context_tokens)
        writer = OutputWriter(loaded.decode, prompt, job.params, loaded.end_ids, room)
        resumed = generation.resume_token_ids
        if any(token_id >= loaded.vocab_size for token_id in resumed):
            raise CannotContinue("the tokens generated so far are not this model's")
        ended = writer.resume(resumed, generation.resume_text)
        sampling = sampling_of(job.params, loaded.defaults)
        form = None if ended else self._forms.form_of(job.params, resumed)
        return ActiveGeneration(Sequence([*prompt, *resumed]), len(prompt), sampling, form, writer), ended

    # The methods from here on run in the engine's thread.

    def _run(self, loop: asyncio.AbstractEventLoop, ready: "asyncio.Future[LoadedModel]") -> None:
        def post(callback: Callable[[], object]) -> None:
            # The loop may be closed already; then nobody listens.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(callback)

        why = "the engine's thread died"
        try:
            try:
                loaded = self._load(self._config.model_path, self._options)
            except Exception as error:  # noqa: BLE001  whatever transformers raises, there is no model
                why = f"cannot load the model {self._config.model_path}: {error}"
                failed = EngineDead(why)
                post(lambda: None if ready.done() else ready.set_exception(failed))
                return
            post(lambda: None if ready.done() else ready.set_result(loaded))
            batch = Batch(loaded.model)
            while self._wait_for_work():
                made = self._step(loaded, batch)
                if made:
                    post(partial(deliver, made))
            why = CLOSED
        except Exception as error:
            why = f"the engine's thread died: {error}"
            log.exception("the engine is dead")
        finally:
            with self._changed:
                self._closing = True
                left = [*self._waiting, *self._reading, *self._writing.values()]
            post(self.dead.set)
            post(partial(deliver, [(active, EngineDead(why)) for active in left]))

    def _wait_for_work(self) -> bool:
        """Wait for a generation, admit what fits, drop what nobody waits for. Return False once the engine closes."""
        with self._changed:
            while not self._closing:
                self._waiting = [active for active in self._waiting if not active.over]
                self._reading = [active for active in self._reading if not active.over]
                occupied = len(self._reading) + sum(not active.over for active in self._writing.values())
                free = max(self._config.max_concurrent - occupied, 0)
                self._reading += self._waiting[:free]
                del self._waiting[:free]
                if self._reading or self._writing:
                    return True
                self._changed.wait()
            return False

    def _step(self, loaded: LoadedModel, batch: Batch) -> list[Made]:
        """Generate one token for every generation in the batch, then read a piece of one prompt."""
        self._drop(batch, [active for active in self._writing.values() if active.over])
        made: list[Made] = []
        if batch.sequences:
            made += self._write(loaded, batch)
        if self._reading:
            made += self._read(loaded, batch, self._reading[0])
        return made

    def _write(self, loaded: LoadedModel, batch: Batch) -> list[Made]:
        everyone = [self._writing[sequence] for sequence in batch.sequences]
        try:
            scores = batch.step()
        except Exception as error:  # noqa: BLE001  whatever the model raises, it ends generations, not the engine
            failure = as_job_error(error)
            # Memory is short by one sequence. The last to join fails, and the others try again.
            failed = everyone[-1:] if isinstance(failure, OutOfMemory) else everyone
            for active in failed:
                active.over = True
            self._drop(batch, failed)
            return [(active, failure) for active in failed]
        likeliest = scores.argmax(-1).tolist()
        if not all(active.plain for active in everyone):
            scores = scores.cpu()
        return [
            (active, self._next(loaded, active, scores[row], likeliest[row])) for row, active in enumerate(everyone)
        ]

    def _read(self, loaded: LoadedModel, batch: Batch, active: ActiveGeneration) -> list[Made]:
        try:
            scores = batch.read(active.sequence, self._options.prefill_tokens)
            if scores is None:
                return []
            made = self._next(loaded, active, scores, int(scores.argmax()))
            if not active.over:
                batch.join(active.sequence)
                self._writing[active.sequence] = active
        except Exception as error:  # noqa: BLE001  as above
            active.over = True
            made = as_job_error(error)
        self._reading.remove(active)
        return [(active, made)]

    def _next(
        self, loaded: LoadedModel, active: ActiveGeneration, scores: torch.Tensor, likeliest: int
    ) -> Output | JobError:
        """Choose a generation's next token; return its output."""
        try:
            output = active.next(loaded, scores, likeliest)
        except Exception as error:  # noqa: BLE001  as above
            active.over = True
            return as_job_error(error)
        # `over` is only ever set, because the event loop may have set it meanwhile.
        if output.finish_reason is not None:
            active.over = True
        return output

    def _drop(self, batch: Batch, leaving: list[ActiveGeneration]) -> None:
        batch.leave([active.sequence for active in leaving])
        for active in leaving:
            del self._writing[active.sequence]


def deliver(made: list[Made]) -> None:
    """Put outputs into the queues of their generations. Runs on the event loop."""
    for active, item in made:
        active.outputs.put_nowait(item)


def as_job_error(error: Exception) -> JobError:
    """Return the error that ends a generation after a step failed. Raises `error` if no step can work after it."""
    if isinstance(error, JobError):
        return error
    # The CPU's allocator has no error type of its own.
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return OutOfMemory("the device has no memory left for this job")
    if isinstance(error, torch.AcceleratorError):
        raise error
    log.error("a step failed", exc_info=error)
    return EngineFailed(f"the engine failed on this job: {type(error).__name__}: {error}")


def create(config: EngineConfig) -> TorchEngine:
    """Return the engine, not yet started. Raises ValueError for an unknown or bad option."""
    return TorchEngine(config, TorchOptions.model_validate(dict(config.options)))
