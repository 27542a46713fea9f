"""The production engine: vLLM's AsyncLLM. The only module that imports vllm.

Options are fields of vLLM's AsyncEngineArgs, passed through. vLLM schedules: requests join and leave its batch at any
step, by priority, and share cached prefixes within one user's jobs only (a cache salt per user, so that timing tells
nobody what others ask). Its model runs in processes of its own, started afresh rather than forked, because a worker
has threads that do not survive a fork: the worker's main module must guard its start by `__name__ == "__main__"`.

Text is made here, not by vLLM, so that it comes out the same as from the other engines and across a cut.
"""

import asyncio
import contextlib
import dataclasses
import multiprocessing
import os
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any, Final

# Read when vllm is imported. Whatever the operator has set stands.
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", os.path.join(os.path.dirname(__file__), "vllm_logging.json"))

from vllm import AsyncEngineArgs, SamplingParams, TokensPrompt
from vllm.exceptions import VLLMClientError
from vllm.outputs import CompletionOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from jobs.errors import EngineDead, EngineFailed, UnsupportedParams
from llm_pb import llm_pb2
from services.gpu_worker.chat import PromptEncoder
from services.gpu_worker.engine import CannotContinue, EngineConfig, Generation, Load, Output
from services.gpu_worker.output_text import LENGTH, STOP, OutputWriter

CHOSEN_HERE: Final = ("model", "max_num_seqs", "scheduling_policy")
"""Fields of AsyncEngineArgs that the worker's own settings decide."""
SAME_NAME: Final = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logprobs",
)
"""Fields that SamplingParams of llm.proto and of vLLM have in common, with the same meaning."""
DEFAULT_PRIORITY: Final = 3
CPU_CACHE_BYTES: Final = 1 << 30
WATCH_SECONDS: Final = 0.5
GONE_SECONDS: Final = 5
"""The kernel may take a while to take back a large process."""


class VllmEngine:
    """See services.gpu_worker.engine.Engine.

    Refuses, by CannotContinue, to continue where vLLM would not give what one uninterrupted run gives: structured
    output, seeded sampling, and penalties that count output tokens.
    """

    name = "vllm"

    def __init__(self, arguments: AsyncEngineArgs, special_tokens_in_messages: bool) -> None:
        self._arguments = arguments
        self._special_tokens_in_messages = special_tokens_in_messages
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
        """Load the model; takes from half a minute up."""
        load = partial(AsyncLLM.from_engine_args, self._arguments, stat_loggers=[self._new_stats])
        self._loading = asyncio.ensure_future(asyncio.to_thread(load))
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
        self._watch = asyncio.create_task(self._watch_over(llm))

    async def generate(self, generation: Generation) -> AsyncGenerator[Output, None]:
        """Yield a generation's output; see Engine.generate."""
        llm, job, resumed = self._alive(), generation.job, generation.resume_token_ids
        prompt, writer, ended = await asyncio.to_thread(self._prepare, llm, generation)
        if ended is not None:
            yield ended
            return
        yield writer.opening()
        stream = llm.generate(
            TokensPrompt(prompt_token_ids=[*prompt, *resumed], cache_salt=job.user_id or None),
            self._sampling(job.params, writer.limit - writer.count, writer.count),
            generation.request_id,
            # Its tracing is an option of its own (otlp_traces_endpoint); without, it would warn of them.
            trace_headers=generation.trace_headers if await llm.is_tracing_enabled() else None,
            priority=job.priority or DEFAULT_PRIORITY,
        )
        async with contextlib.aclosing(stream):
            try:
                async for request in stream:
                    output = self._output(llm, writer, request.outputs[0], job.params)
                    yield output
                    if output.finish_reason is not None:
                        return
            except EngineDeadError as error:
                self.dead.set()
                raise self._death() from error
            except EngineGenerateError as error:
                raise EngineFailed(f"the engine failed on this job: {error.__cause__ or error}") from error
            except (VLLMClientError, ValueError) as error:
                raise UnsupportedParams(f"params: {error}") from error

    def load(self) -> Load:
        """Sum up what vLLM's schedulers, one for each data-parallel rank, have said after their last step."""
        latest = [one.latest for one in self._stats]
        return Load(
            running=sum(stats.num_running_reqs for stats in latest),
            waiting=sum(stats.num_waiting_reqs + stats.num_skipped_waiting_reqs for stats in latest),
            kv_cache_usage=sum(stats.kv_cache_usage for stats in latest) / max(len(latest), 1),
        )

    def _new_stats(self, vllm_config: Any, engine_index: int = 0) -> "LatestStats":
        self._stats.append(LatestStats(vllm_config, engine_index))
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
            # shutdown() alone would leave those who wait for output waiting.
            llm.output_processor.propagate_error(EngineDeadError())
            await asyncio.to_thread(llm.shutdown)

    async def _end_loading(self, loading: "asyncio.Future[AsyncLLM]") -> None:
        """Make a load fail, which can take many minutes and cannot be cancelled, by killing the model's process."""
        while not loading.done():
            await asyncio.to_thread(_kill_children)
            await asyncio.wait([loading], timeout=WATCH_SECONDS)
        if loading.exception() is None:
            self._llm = loading.result()
        else:
            # One may have been started just before the load failed.
            await asyncio.to_thread(_kill_children)

    def _alive(self) -> AsyncLLM:
        if self._llm is None or self.dead.is_set():
            raise self._death()
        return self._llm

    def _death(self) -> EngineDead:
        return EngineDead("the engine was closed" if self._closed else "the engine's process ended")

    async def _watch_over(self, llm: AsyncLLM) -> None:
        """Notice the death of the model's process also when nothing runs."""
        while not llm.errored:  # noqa: ASYNC110  there is no event to wait for
            await asyncio.sleep(WATCH_SECONDS)
        self.dead.set()

    def _prepare(self, llm: AsyncLLM, generation: Generation) -> tuple[list[int], OutputWriter, Output | None]:
        job, resumed = generation.job, generation.resume_token_ids
        decode = partial(llm.get_tokenizer().decode, skip_special_tokens=True)
        prompt = self._prompts.ids(job)
        writer = OutputWriter(decode, prompt, job.params, self._end_ids, self.context_tokens)
        if resumed:
            self._check_continues(job.params)
        return prompt, writer, writer.resume(resumed, generation.resume_text)

    def _check_continues(self, params: llm_pb2.SamplingParams) -> None:
        values = self._values(params)
        if params.WhichOneof("structured_output"):
            raise CannotContinue("vLLM begins structured output anew")
        if values.get("presence_penalty") or values.get("frequency_penalty"):
            raise CannotContinue("vLLM would not count the tokens made so far")
        if "seed" in values and values.get("temperature", 1) > 0:
            raise CannotContinue("vLLM would draw the same numbers again")

    def _values(self, params: llm_pb2.SamplingParams) -> dict[str, Any]:
        """Return how tokens are chosen: as the job asks, else by the model's generation_config.json."""
        asked = {field.name: value for field, value in params.ListFields() if field.name in SAME_NAME}
        return {**self._defaults, **asked}

    def _sampling(self, params: llm_pb2.SamplingParams, max_tokens: int, made: int) -> SamplingParams:
        try:
            return SamplingParams(
                **{
                    **self._values(params),
                    "max_tokens": max_tokens,
                    "min_tokens": min(max(params.min_tokens - made, 0), max_tokens),
                    "structured_outputs": structured_outputs(params),
                    "detokenize": False,
                    "output_kind": RequestOutputKind.DELTA,
                }
            )
        except ValueError as error:
            raise UnsupportedParams(f"params: {error}") from error

    def _output(
        self, llm: AsyncLLM, writer: OutputWriter, made: CompletionOutput, params: llm_pb2.SamplingParams
    ) -> Output:
        if made.finish_reason not in (None, "stop", "length"):
            raise EngineFailed(f"vLLM ended the generation: {made.finish_reason}")
        tokens = list(made.token_ids)
        logprobs = []
        if made.logprobs is not None:
            decode = llm.get_tokenizer().decode
            logprobs = [
                token_logprobs(place, token, params.logprobs, decode)
                for place, token in zip(made.logprobs, tokens, strict=True)
            ]
        return writer.write(tokens, logprobs, {"stop": STOP, "length": LENGTH}.get(made.finish_reason or ""))


class LatestStats(StatLoggerBase):  # type: ignore[misc]  # vllm is not there when types are checked
    """Keeps what a scheduler of vLLM's says after each step."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.latest = SchedulerStats()

    def record(self, scheduler_stats: SchedulerStats | None, *_: Any, **__: Any) -> None:
        """Take a step's figures; None for a step without."""
        if scheduler_stats is not None:
            self.latest = scheduler_stats

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def structured_outputs(params: llm_pb2.SamplingParams) -> StructuredOutputsParams | None:
    """Return the constraint on the output's form, if there is one."""
    kind = params.WhichOneof("structured_output")
    if kind == "json_schema":
        return StructuredOutputsParams(json=params.json_schema)
    if kind == "regex":
        return StructuredOutputsParams(regex=params.regex)
    if kind == "choice":
        return StructuredOutputsParams(choice=list(params.choice.options))
    return None


def token_logprobs(place: Any, chosen: int, most: int, decode: Any) -> llm_pb2.TokenLogprobs:
    """Return vLLM's log probabilities at one place, a mapping from token to Logprob."""
    ordered = sorted(place.items(), key=lambda item: item[1].rank)
    top = [llm_pb2.TokenLogprob(token=decode([token]), logprob=value.logprob) for token, value in ordered[:most]]
    return llm_pb2.TokenLogprobs(
        chosen=llm_pb2.TokenLogprob(token=decode([chosen]), logprob=place[chosen].logprob), top=top
    )


def gpu_info(count: int) -> llm_pb2.GpuInfo:
    """Return what a result says about where it was made. Asks the driver, so that this process needs no GPU memory."""
    if current_platform.is_cpu():
        return llm_pb2.GpuInfo(name="cpu")
    return llm_pb2.GpuInfo(
        name=current_platform.get_device_name(),
        memory_bytes=current_platform.get_device_total_memory(),
        count=count,
    )


def cpu_defaults() -> dict[str, Any]:
    """Return what differs on a CPU: exact numbers, little memory, and no minutes spent on compiling."""
    if not current_platform.is_cpu():
        return {}
    defaults: dict[str, Any] = {"dtype": "float32", "enforce_eager": True}
    if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        defaults["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    return defaults


def create(config: EngineConfig) -> VllmEngine:
    """Return the engine, not yet started. Raises ValueError for an option that AsyncEngineArgs does not have."""
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)} - set(CHOSEN_HERE)
    unknown = sorted(set(config.options) - known)
    if unknown:
        raise ValueError(f"options: {', '.join(unknown)} is none of vLLM's, or set by the worker itself")
    return VllmEngine(
        AsyncEngineArgs(
            model=config.model_path,
            max_num_seqs=config.max_concurrent,
            scheduling_policy="priority",
            **{**cpu_defaults(), **config.options},
        ),
        config.special_tokens_in_messages,
    )


def _kill_children() -> None:
    """Kill this process's children, which are vLLM's, and wait until they are gone."""
    for process in multiprocessing.active_children():
        process.kill()
        process.join(GONE_SECONDS)
