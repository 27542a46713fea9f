"""The production engine: vLLM's AsyncLLM. Only this module and those named vllm_… import vllm.

Options are fields of vLLM's AsyncEngineArgs, passed through, and GUARD_OPTIONS. vLLM schedules: requests join and leave
its batch at any step, by priority. They share cached prefixes within the jobs of one user of one tenant only: each has
a cache salt, so that timing reveals nothing of others' prompts. The model runs in separate processes, which are spawned
and not forked, because a worker has threads that do not survive a fork. So the worker's main module must guard its
start by `__name__ == "__main__"`.

The text is decoded here, not by vLLM, so that it is the same as with the other engines and after a continuation.
"""

import asyncio
import contextlib
import logging
import multiprocessing
import os
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any, Final

# vllm reads these when it is imported. The operator's own values take precedence.
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", os.path.join(os.path.dirname(__file__), "vllm_logging.json"))

from vllm import AsyncEngineArgs, SamplingParams, TokensPrompt
from vllm.exceptions import VLLMClientError
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from jobs.errors import EngineDead, EngineFailed, UnsupportedParams
from jobs.options import DEFAULT_PRIORITY
from llm_pb import llm_pb2
from services.gpu_worker.engines.chat import PromptEncoder
from services.gpu_worker.engines.engine import CannotContinue, EngineConfig, Generation, Load, Output
from services.gpu_worker.engines.output_text import LENGTH, STOP, OutputWriter, decoder
from services.gpu_worker.engines.structured_guard import PACE_STEPS, Member, StructuredGuard
from services.gpu_worker.engines.vllm_options import engine_arguments, gpu_info, new_guard
from services.gpu_worker.engines.vllm_requests import SAME_NAME, structured_outputs, token_logprobs
from services.gpu_worker.engines.vllm_sockets import choose_socket_folder
from services.gpu_worker.engines.vllm_stats import LatestStats

log = logging.getLogger(__name__)

PACE_ID: Final = "pace"
"""Prefix of the request ids of the generations that measure how fast the engine is."""
PACE_PROMPT: Final = 256
"""Number of prompt tokens of the generations that measure how fast the engine is."""
WATCH_SECONDS: Final = 0.5
GONE_SECONDS: Final = 5
"""Maximum wait for the end of a killed process. The kernel may take a while to free a large one."""


class VllmEngine:
    """See Engine.

    It raises CannotContinue where vLLM's output would differ from that of one uninterrupted run: for structured output,
    seeded sampling, and penalties that count output tokens.
    """

    name = "vllm"

    def __init__(self, arguments: AsyncEngineArgs, special_tokens_in_messages: bool, guard: StructuredGuard) -> None:
        self._arguments = arguments
        self._logs_steps = arguments.enable_logging_iteration_details
        arguments.enable_logging_iteration_details = True
        self._special_tokens_in_messages = special_tokens_in_messages
        self._guard = guard
        self._ending: set[asyncio.Task[None]] = set()
        self._loading: asyncio.Future[AsyncLLM] | None = None
        self._llm: AsyncLLM | None = None
        self._watch: asyncio.Task[None] | None = None
        self._closed = False
        self._stats: list[LatestStats] = []
        self._defaults: dict[str, Any] = {}
        self._end_ids: frozenset[int] = frozenset()
        self.dead = asyncio.Event()
        self.context_tokens = 0
        self.gpu = llm_pb2.GpuInfo()

    async def start(self) -> None:
        """Load the model, which takes half a minute or more."""
        self._loading = asyncio.ensure_future(asyncio.to_thread(self._load))
        try:
            self._llm = llm = await asyncio.shield(self._loading)
        except Exception as error:
            raise EngineDead(f"cannot load the model {self._arguments.model}: {error}") from error
        self.context_tokens = llm.model_config.max_model_len
        self.gpu = gpu_info(llm.vllm_config.parallel_config.world_size)
        self._defaults = llm.model_config.get_diff_sampling_param()
        ends = llm.model_config.try_get_generation_config().get("eos_token_id", [])
        tokenizer_end = llm.get_tokenizer().eos_token_id
        self._end_ids = frozenset({*(ends if isinstance(ends, list) else [ends]), tokenizer_end} - {None})
        self._prompts = await asyncio.to_thread(
            PromptEncoder, llm.get_tokenizer(), self.context_tokens, self._special_tokens_in_messages
        )
        self._decode = decoder(llm.get_tokenizer())
        self._decode_token = decoder(llm.get_tokenizer(), skip_special_tokens=False)
        await self._learn_pace(llm)
        self._watch = asyncio.create_task(self._watch_over(llm))

    def _load(self) -> AsyncLLM:
        choose_socket_folder()
        return AsyncLLM.from_engine_args(self._arguments, stat_loggers=[self._new_stats])

    async def generate(self, generation: Generation) -> AsyncGenerator[Output, None]:
        """Yield a generation's output; see Engine.generate."""
        llm, job, resumed = self._alive(), generation.job, generation.resume_token_ids
        prompt, writer, ended = await asyncio.to_thread(self._prepare, generation)
        if ended is not None:
            yield ended
            return
        yield writer.opening()
        stream = llm.generate(
            TokensPrompt(prompt_token_ids=[*prompt, *resumed], cache_salt=generation.owner or None),
            self._sampling(job.params, writer.limit - writer.count, writer.count, generation.stream_interval),
            generation.request_id,
            # vLLM's tracing is an option of its own (otlp_traces_endpoint). Without it vLLM would warn of the headers.
            trace_headers=generation.trace_headers if await llm.is_tracing_enabled() else None,
            priority=job.priority or DEFAULT_PRIORITY,
        )
        form = job.params.WhichOneof("structured_output")
        with self._guard.member(generation.request_id, structured=form is not None) as member:
            async with contextlib.aclosing(stream):
                try:
                    async for request in stream:
                        if member.ended:
                            raise UnsupportedParams(f"params.{form} {self._guard.reason()}")
                        member.decoding = True
                        output = self._output(writer, request.outputs[0], job.params)
                        yield replace(output, cached_prompt_tokens=request.num_cached_tokens or 0)
                        if output.finish_reason is not None:
                            return
                except EngineDeadError as error:
                    self.dead.set()
                    raise self._death() from error
                except EngineGenerateError as error:
                    raise EngineFailed(f"the engine failed on this job: {error.__cause__ or error}") from error
                except (VLLMClientError, ValueError) as error:
                    raise UnsupportedParams(f"params: {error}") from error

    async def _learn_pace(self, llm: AsyncLLM) -> None:
        """Generate a few tokens, so that the guard knows how fast the engine is before any job can slow it."""
        self._guard.max_step_tokens = llm.vllm_config.scheduler_config.max_num_batched_tokens
        few = min(PACE_STEPS + 4, self.context_tokens - 1)
        length = min(PACE_PROMPT, self.context_tokens - few)
        try:
            # The first generation may wait for code that is compiled on its first use.
            times = [await self._time_prompt(llm, length, count, f"{PACE_ID}-{count}") for count in (1, few)]
        except Exception as error:
            raise EngineDead(f"cannot generate with the model {self._arguments.model}: {error}") from error
        self._guard.token_seconds = min(times) / length

    async def _time_prompt(self, llm: AsyncLLM, length: int, max_tokens: int, request_id: str) -> float:
        """Generate `max_tokens` tokens after `length` prompt tokens. Return the seconds until the first one came."""
        params = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        # Each has a salt of its own, or else the second would find the first one's prompt in the cache.
        prompt = TokensPrompt(prompt_token_ids=[0] * length, cache_salt=request_id)
        began, seconds = time.monotonic(), 0.0
        with self._guard.member(request_id, structured=False) as member:
            async for _ in llm.generate(prompt, params, request_id):
                seconds = seconds or time.monotonic() - began
                member.decoding = True
        return seconds

    def _on_step(self, scheduler: int, tokens: int) -> None:
        self._end(self._guard.step(scheduler, tokens))

    def _end(self, member: Member | None) -> None:
        """Abort a generation. Its generate() then raises the reason."""
        if member is not None and self._llm is not None:
            log.warning("structured output ended: it slowed the whole batch", extra={"request_id": member.request_id})
            ending = asyncio.create_task(self._llm.abort(member.request_id))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)

    def load(self) -> Load:
        """Return the sum of what vLLM's schedulers, one for each data-parallel rank, reported after their last step."""
        latest = [one.latest for one in self._stats]
        return Load(
            running=sum(stats.num_running_reqs for stats in latest),
            waiting=sum(stats.num_waiting_reqs + stats.num_skipped_waiting_reqs for stats in latest),
            kv_cache_usage=sum(stats.kv_cache_usage for stats in latest) / max(len(latest), 1),
        )

    def _new_stats(self, vllm_config: Any, engine_index: int = 0) -> LatestStats:
        self._stats.append(LatestStats(vllm_config, engine_index, self._on_step, self._logs_steps))
        return self._stats[-1]

    async def close(self) -> None:
        """End running generations and the model's processes."""
        self._closed = True
        self.dead.set()
        if self._watch is not None:
            self._watch.cancel()
        if self._loading is not None and not self._loading.done():
            await self._end_loading(self._loading)
        if self._llm is not None:
            llm, self._llm = self._llm, None
            # shutdown() alone would leave generations waiting for output.
            llm.output_processor.propagate_error(EngineDeadError())
            await asyncio.to_thread(llm.shutdown)

    async def _end_loading(self, loading: "asyncio.Future[AsyncLLM]") -> None:
        """End a load, which can take many minutes and cannot be cancelled, by killing the model's process."""
        while not loading.done():
            await asyncio.to_thread(_kill_children)
            await asyncio.wait([loading], timeout=WATCH_SECONDS)
        if loading.exception() is None:
            self._llm = loading.result()
        else:
            # A process may have been started just before the load failed.
            await asyncio.to_thread(_kill_children)

    def _alive(self) -> AsyncLLM:
        if self._llm is None or self.dead.is_set():
            raise self._death()
        return self._llm

    def _death(self) -> EngineDead:
        return EngineDead("the engine was closed" if self._closed else "the engine's process ended")

    async def _watch_over(self, llm: AsyncLLM) -> None:
        """Detect the death of the model's process, also when nothing runs, and a step that does not end."""
        while not llm.errored:
            await asyncio.sleep(WATCH_SECONDS)
            self._end(self._guard.check())
        self.dead.set()

    def _prepare(self, generation: Generation) -> tuple[list[int], OutputWriter, Output | None]:
        job, resumed = generation.job, generation.resume_token_ids
        prompt = self._prompts.ids(job)
        room = generation.room(len(prompt), self.context_tokens)
        writer = OutputWriter(self._decode, prompt, job.params, self._end_ids, room)
        if resumed:
            self._check_continues(job.params)
        return prompt, writer, writer.resume(resumed, generation.resume_text)

    def _check_continues(self, params: llm_pb2.SamplingParams) -> None:
        values = self._values(params)
        if params.WhichOneof("structured_output"):
            raise CannotContinue("vLLM starts structured output over")
        if values.get("presence_penalty") or values.get("frequency_penalty"):
            raise CannotContinue("vLLM would not count the tokens generated so far")
        if "seed" in values and values.get("temperature", 1) > 0:
            raise CannotContinue("vLLM would draw the same numbers again")

    def _values(self, params: llm_pb2.SamplingParams) -> dict[str, Any]:
        """Return the sampling parameters: the job's own, else those of the model's generation_config.json."""
        asked = {field.name: value for field, value in params.ListFields() if field.name in SAME_NAME}
        return {**self._defaults, **asked}

    def _sampling(
        self, params: llm_pb2.SamplingParams, max_tokens: int, made: int, stream_interval: int
    ) -> SamplingParams:
        try:
            return SamplingParams(
                **{
                    **self._values(params),
                    "max_tokens": max_tokens,
                    "min_tokens": min(max(params.min_tokens - made, 0), max_tokens),
                    "structured_outputs": structured_outputs(params),
                    "detokenize": False,
                    "output_kind": RequestOutputKind.DELTA,
                    # A stop text is found here, so vLLM would generate what comes after it.
                    "stream_interval": 1 if params.stop else stream_interval,
                }
            )
        except ValueError as error:
            raise UnsupportedParams(f"params: {error}") from error

    def _output(self, writer: OutputWriter, made: CompletionOutput, params: llm_pb2.SamplingParams) -> Output:
        if made.finish_reason not in (None, "stop", "length"):
            raise EngineFailed(f"vLLM ended the generation: {made.finish_reason}")
        tokens = list(made.token_ids)
        logprobs = []
        if made.logprobs is not None:
            logprobs = [
                token_logprobs(place, token, params.logprobs, self._decode_token)
                for place, token in zip(made.logprobs, tokens, strict=True)
            ]
        return writer.write(tokens, logprobs, {"stop": STOP, "length": LENGTH}.get(made.finish_reason or ""))


def create(config: EngineConfig) -> VllmEngine:
    """Return the engine, not yet started. Raises ValueError for an unknown option."""
    return VllmEngine(engine_arguments(config), config.special_tokens_in_messages, new_guard(config))


def _kill_children() -> None:
    """Kill this process's children, which are vLLM's, and wait until they are gone."""
    for process in multiprocessing.active_children():
        process.kill()
        process.join(GONE_SECONDS)
