"""An engine without a model: paced pseudo-text and scripted faults, for tests and load tests without a GPU.

The text is the same for the same prompt and seed, in any process. It mixes scripts and emoji, and its tokens split
characters, as a real tokenizer's do.

A fault is scripted in the prompt, `[[fault:KIND@N]]`, or for every job by the option `fault: KIND@N`. It occurs when N
tokens of output have been generated, including those of earlier attempts:

    oom       the generation raises OutOfMemory
    failed    the generation raises EngineFailed
    die       the engine is dead
    hang      no more tokens come, until the generation is cancelled
    kill      the process is killed

`KIND@N:once` occurs in the job's first attempt only: not if an earlier attempt left tokens to continue, and not twice
in one process.

`[[vary]]` in the prompt makes each attempt generate another text, like a model without a seed. The output of an earlier
attempt then cannot be continued.

`[[when PATTERN: ANSWER]]` in the prompt scripts the answer, of whatever form the job asks for: that of the first script
whose regular expression is found in the rest of the prompt.

`[[wide]]` in the prompt makes each token 4 KiB of text: for outputs of many megabytes.
"""

import asyncio
import contextlib
import functools
import hashlib
import itertools
import os
import random
import re
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from jobs.errors import EngineDead, EngineFailed, OutOfMemory, UnsupportedParams
from llm_pb import llm_pb2
from services.gpu_worker.engines.chat import ROLE_NAMES, check_room
from services.gpu_worker.engines.engine import CannotContinue, EngineConfig, Generation, Load, Output
from services.gpu_worker.engines.output_text import OutputWriter

# The vocabulary: the end, every byte, then pieces of words, cut without regard to characters.
END: Final = 0
FIRST_BYTE: Final = 1
FIRST_PIECE: Final = 257
PIECE_BYTES: Final = 3
TEXT: Final = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one you
were all her she there would their we him been has when who will no more if out so what up said its about than
naïve café Grüße señor Łódź ελληνικά привет мир שלום مرحبا नमस्ते 你好 世界 日本語 テスト 한국어 e\u0301 a\u0308o\u0302
🙂 🚀 👍🏽 👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 𝔘𝔫𝔦
"""
WORDS: Final = [
    [encoded[start : start + PIECE_BYTES] for start in range(0, len(encoded), PIECE_BYTES)]
    for encoded in (f" {word}".encode() for word in TEXT.split())
]
"""Each word as its pieces."""
PIECES: Final = sorted({piece for word in WORDS for piece in word})
VOCABULARY: Final = FIRST_PIECE + len(PIECES)
WORD_IDS: Final = [[FIRST_PIECE + PIECES.index(piece) for piece in word] for word in WORDS]

EARLY_SECONDS: Final = 0.002
"""Maximum time that a token comes before it is due, because uvloop's clock and timers count in whole milliseconds."""

FAULT: Final = re.compile(r"(?P<kind>oom|failed|die|hang|kill)@(?P<at>\d+)(?P<once>:once)?")
SCRIPT: Final = re.compile(r"\[\[when (?P<pattern>.*?): (?P<answer>.*?)\]\]", re.DOTALL)
VARY: Final = "[[vary]]"
WIDE: Final = "[[wide]]"
FIRST_WIDE: Final = 1 << 20
WIDE_TOKENS: Final = 1 << 16
WIDE_BYTES: Final = 4096
"""Minimum size of a wide token's text."""
FAULT_IN_PROMPT: Final = re.compile(rf"\[\[fault:({FAULT.pattern})\]\]")


class SimulatedOptions(BaseModel):
    """The simulated engine's options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens_per_second: float = Field(50, gt=0)
    """Speed of each generation, however many run."""
    prefill_seconds: float = Field(0, ge=0)
    """Time from a generation's start to its first token."""
    load_seconds: float = Field(0, ge=0)
    """How long start() takes."""
    load_error: str | None = None
    """Makes start() fail, with this message."""
    context_tokens: int = Field(8192, ge=2)
    """Maximum number of tokens of prompt and output together."""
    answer_tokens: int | None = Field(None, ge=0)
    """Number of tokens after which an answer ends by itself. By default it continues to max_tokens."""
    fault: str | None = Field(None, pattern=f"^{FAULT.pattern}$")
    """A fault for every job whose prompt scripts none."""


@dataclass(eq=False)
class ActiveGeneration:
    """A generation that runs or waits."""

    prompt_tokens: int
    writer: OutputWriter
    running: bool = False
    """Whether it has a slot; it waits for one before."""


class SimulatedEngine:
    """See Engine. It honours stop, min_tokens, max_tokens, seed, choice and logprobs.

    Parameters of sampling change nothing. json_schema and regex are unsupported, unless the
    prompt scripts the answer.
    """

    name = "simulated"

    def __init__(self, config: EngineConfig, options: SimulatedOptions) -> None:
        self._options = options
        self.context_tokens = options.context_tokens
        self.gpu = llm_pb2.GpuInfo(name="simulated")
        self.dead = asyncio.Event()
        self._why_dead = ""
        self._slots = asyncio.Semaphore(config.max_concurrent)
        self._cache_tokens = config.max_concurrent * options.context_tokens
        self._active: set[ActiveGeneration] = set()
        self._struck: set[tuple[str, str]] = set()

    async def start(self) -> None:
        """Wait as long as a load would take."""
        await asyncio.sleep(self._options.load_seconds)
        if self._options.load_error is not None:
            raise EngineDead(self._options.load_error)

    async def generate(self, generation: Generation) -> AsyncGenerator[Output, None]:
        """Yield a generation's output; see Engine.generate."""
        job = generation.job
        prompt = prompt_text(job)
        check_room(len(prompt.encode()), self.context_tokens)
        prompt_ids = [FIRST_BYTE + byte for byte in prompt.encode()]
        asked = prompt + generation.request_id if VARY in prompt else prompt
        tokens = answer(asked, job.params, self._options.answer_tokens)
        made = list(itertools.islice(tokens, len(generation.resume_token_ids)))
        if tuple(made) != generation.resume_token_ids:
            raise CannotContinue("the tokens generated so far are not those of this prompt and seed")
        room = generation.room(len(prompt_ids), self.context_tokens)
        writer = OutputWriter(decode, prompt_ids, job.params, {END}, room)
        ended = writer.resume(made, generation.resume_text)
        if ended is not None:
            yield ended
            return
        yield writer.opening()
        fault = self._fault_of(prompt, generation)
        async with self._slot(ActiveGeneration(len(prompt_ids), writer)):
            due = asyncio.get_running_loop().time() + self._options.prefill_seconds
            for token in tokens:
                # Due times are added up, so that a late wake-up does not slow the pace.
                await self._pause(due)
                if fault is not None and writer.count == int(fault["at"]):
                    await self._strike(fault["kind"], job)
                due += 1 / self._options.tokens_per_second
                output = writer.write([token], logprobs_of(token, job.params))
                yield output
                if output.finish_reason is not None:
                    return

    def load(self) -> Load:
        """Count running and waiting generations, and the tokens of the running ones as if they were cached."""
        generations = [*self._active]
        running = [active for active in generations if active.running]
        cached = sum(active.prompt_tokens + active.writer.count for active in running)
        return Load(len(running), len(generations) - len(running), min(cached / self._cache_tokens, 1.0))

    @contextlib.asynccontextmanager
    async def _slot(self, active: ActiveGeneration) -> AsyncIterator[None]:
        """Acquire a slot in the batch and hold it while the context is open."""
        self._active.add(active)
        try:
            async with self._slots:
                active.running = True
                yield
        finally:
            self._active.remove(active)

    async def close(self) -> None:
        """End running generations."""
        self._die("the engine was closed")

    def _die(self, why: str) -> None:
        self._why_dead = self._why_dead or why
        self.dead.set()

    async def _pause(self, until: float | None) -> None:
        """Sleep until a time of the loop's clock, or forever. Raises EngineDead as soon as the engine is dead."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self.dead.wait()
        if self.dead.is_set():
            raise EngineDead(self._why_dead)

    def _fault_of(self, prompt: str, generation: Generation) -> re.Match[str] | None:
        """Return the fault that is scripted for this attempt, if any."""
        in_prompt = FAULT_IN_PROMPT.search(prompt)
        script = in_prompt[1] if in_prompt else self._options.fault
        fault = FAULT.fullmatch(script) if script else None
        if fault and fault["once"] and (generation.resume_token_ids or job_key(generation.job) in self._struck):
            return None
        return fault

    async def _strike(self, kind: str, job: llm_pb2.JobRequest) -> None:
        self._struck.add(job_key(job))
        if kind == "oom":
            raise OutOfMemory("scripted: the device has no memory left for this job")
        if kind == "failed":
            raise EngineFailed("scripted: the engine failed on this job")
        if kind == "die":
            self._die("scripted: the engine died")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        await self._pause(None)


def job_key(job: llm_pb2.JobRequest) -> tuple[str, str]:
    """Return what all attempts of a job share."""
    return job.user_id, job.request_id


def prompt_text(job: llm_pb2.JobRequest) -> str:
    """Return the prompt, or the messages as a plain transcript. Each byte of it is a token of the prompt."""
    if job.messages:
        turns = [f"{ROLE_NAMES[message.role]}: {message.content}\n" for message in job.messages]
        return "".join(turns) + "assistant:"
    return job.prompt


def answer(prompt: str, params: llm_pb2.SamplingParams, length: int | None) -> Iterator[int]:
    """Yield the answer's tokens, for ever unless it has a length. Raises UnsupportedParams."""
    if (scripted := scripted_answer(prompt)) is not None:
        return iter([*(FIRST_BYTE + byte for byte in scripted.encode()), END])
    kind = params.WhichOneof("structured_output")
    if kind in ("json_schema", "regex"):
        raise UnsupportedParams(f"params.{kind}: the simulated engine supports only choice")
    digest = hashlib.sha256(f"{params.seed}:{prompt}".encode()).digest()
    # random.choice is not used, because Python promises only that the sequence of random() stays the same.
    rng = random.Random(digest)  # noqa: S311  no secret depends on it
    if kind == "choice":
        options = params.choice.options
        return iter([*(FIRST_BYTE + byte for byte in options[int(rng.random() * len(options))].encode()), END])
    tokens: Iterator[int]
    if WIDE in prompt:
        tokens = (FIRST_WIDE + int(rng.random() * WIDE_TOKENS) for _ in itertools.count())
    else:
        words = (WORD_IDS[int(rng.random() * len(WORD_IDS))] for _ in itertools.count())
        tokens = itertools.chain.from_iterable(words)
    if length is None:
        return tokens
    return itertools.chain(itertools.islice(tokens, max(length, params.min_tokens)), [END])


def scripted_answer(prompt: str) -> str | None:
    """Return the answer that the prompt scripts; None if it scripts none."""
    rest = SCRIPT.sub("", prompt)
    return next((found["answer"] for found in SCRIPT.finditer(prompt) if re.search(found["pattern"], rest)), None)


def decode(ids: Sequence[int]) -> str:
    """Return the text of tokens."""
    return b"".join(piece(token) for token in ids if token != END).decode(errors="replace")


def piece(token: int) -> bytes:
    """Return the bytes of a token."""
    if token >= FIRST_WIDE:
        return wide_piece(token)
    return PIECES[token - FIRST_PIECE] if token >= FIRST_PIECE else bytes((token - FIRST_BYTE,))


@functools.lru_cache(maxsize=64)
def wide_piece(token: int) -> bytes:
    """Return the bytes of a wide token, whole words."""
    rng, text = random.Random(token), bytearray()  # noqa: S311  no secret depends on it
    while len(text) < WIDE_BYTES:
        text += b"".join(WORDS[int(rng.random() * len(WORDS))])
    return bytes(text)


def logprobs_of(token: int, params: llm_pb2.SamplingParams) -> list[llm_pb2.TokenLogprobs]:
    """Return simulated log probabilities, with the chosen token as the likeliest, if the job asks for any."""
    if not params.HasField("logprobs"):
        return []
    likeliest = [
        llm_pb2.TokenLogprob(token=decode([(token + rank) % VOCABULARY]), logprob=-0.5 * (rank + 1))
        for rank in range(max(params.logprobs, 1))
    ]
    return [llm_pb2.TokenLogprobs(chosen=likeliest[0], top=likeliest[: params.logprobs])]


def create(config: EngineConfig) -> SimulatedEngine:
    """Return the engine. Raises ValueError for an unknown or bad option."""
    return SimulatedEngine(config, SimulatedOptions.model_validate(dict(config.options)))
