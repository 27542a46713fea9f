"""Engines that make images: the part that all share. Each of them is a Painter behind this one Engine.

An image has no tokens. It counts as params.max_tokens, which is what the operator has set for the model, or as what a
provider has counted, so that budgets, quotas and prices hold for images, too. An attempt starts over.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Protocol

from pydantic import BaseModel, ConfigDict, Field

from jobs.errors import BudgetSpent, EngineDead, EngineFailed, InvalidJob
from llm_pb import llm_pb2
from services.gpu_worker.engines.engine import CannotContinue, EngineConfig, Generation, Image, Load, Output

_REPORT_SECONDS: Final = 1.0
"""Interval of outputs while an image is made. They show that the engine works."""
_CONTEXT_TOKENS: Final = 2**31 - 1
"""No bound: the painter has its own."""


class ImageOptions(BaseModel):
    """The options that all engines for images have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int = Field(512, ge=1)
    """Width of an image for which the job asks no size, in pixels."""
    height: int = Field(512, ge=1)
    """Height of an image for which the job asks no size, in pixels."""
    timeout: timedelta = Field(timedelta(minutes=5), gt=timedelta(0))
    """Maximum time for an image. After that the job is tried again."""


@dataclass(frozen=True)
class Order:
    """An image to make."""

    prompt: str
    width: int
    """In pixels."""
    height: int
    """In pixels."""
    seed: int | None
    """The same seed makes the same image of the same prompt, where the painter can do that. None: any."""


@dataclass(frozen=True)
class Painted:
    """An image, and what it has used."""

    image: Image
    prompt_tokens: int = 0
    output_tokens: int | None = None
    """None: the image counts as the model's images do."""
    cost_micros: int | None = None
    """What a provider charges, in millionths of the currency. None: the model's price decides."""


class Painter(Protocol):
    """What makes images. Its methods are called on one event loop, which they must never block."""

    name: str
    """Its key in IMAGE_ENGINES."""
    gpu: llm_pb2.GpuInfo
    """The device. Valid after start()."""

    async def start(self) -> None:
        """Load the model. Raises EngineDead with the reason if that fails."""
        ...

    async def paint(self, order: Order) -> Painted:
        """Make an image. A cancel ends it as soon as that is possible.

        Raises InvalidJob for a prompt that is refused, UnsupportedParams, OutOfMemory, EngineFailed, EngineDead.
        """
        ...

    async def close(self) -> None:
        """Free the device. Idempotent."""
        ...


class ImageEngine:
    """See Engine."""

    context_tokens: int = _CONTEXT_TOKENS

    def __init__(self, painter: Painter, config: EngineConfig, options: ImageOptions) -> None:
        self.name = painter.name
        self.gpu = painter.gpu
        self.dead = asyncio.Event()
        self._painter = painter
        self._options = options
        self._slots = asyncio.Semaphore(config.max_concurrent)
        self._running = 0
        self._waiting = 0

    async def start(self) -> None:
        """See Engine."""
        await self._painter.start()
        self.gpu = self._painter.gpu

    async def generate(self, generation: Generation) -> AsyncGenerator[Output, None]:
        """Yield outputs without text, the last one with the image; see Engine.generate."""
        if generation.resume_token_ids:
            raise CannotContinue("an image is started over")
        job = generation.job
        if not job.prompt:
            raise InvalidJob("prompt: must be set for a model that makes images")
        tokens = job.params.max_tokens
        if (room := generation.room(0, self.context_tokens)) < tokens:
            raise BudgetSpent(f"budget leaves {room} tokens, and an image counts as {tokens}")
        options = self._options
        order = Order(
            job.prompt,
            job.image_size.width or options.width,
            job.image_size.height or options.height,
            job.params.seed if job.params.HasField("seed") else None,
        )
        yield Output("", (), 0)
        painting = asyncio.create_task(self._paint(order))
        closed = asyncio.create_task(self.dead.wait())
        try:
            while not (painting.done() or closed.done()):
                await asyncio.wait({painting, closed}, timeout=_REPORT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if not painting.done():
                    yield Output("", (), 0)
            if not painting.done():
                raise EngineDead("the engine was closed")
            painted = painting.result()
        finally:
            for task in (painting, closed):
                task.cancel()
            await asyncio.gather(painting, closed, return_exceptions=True)
        count = tokens if painted.output_tokens is None else painted.output_tokens
        yield Output(
            "",
            (0,) * count,
            painted.prompt_tokens,
            llm_pb2.FINISH_REASON_STOP,
            cost_micros=painted.cost_micros,
            image=painted.image,
        )

    async def _paint(self, order: Order) -> Painted:
        """Make an image when there is a slot."""
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        self._running += 1
        within = self._options.timeout
        try:
            async with asyncio.timeout(within.total_seconds()):
                return await self._painter.paint(order)
        except TimeoutError:
            raise EngineFailed(f"the image was not done within {within}") from None
        finally:
            self._running -= 1
            self._slots.release()

    def load(self) -> Load:
        """Count the images that are made, and those that wait."""
        return Load(self._running, self._waiting, 0.0)

    async def close(self) -> None:
        """End what runs, and free the device."""
        self.dead.set()
        with contextlib.suppress(Exception):
            await self._painter.close()
