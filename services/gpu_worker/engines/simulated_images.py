"""An image engine without a model, for tests and for trying things out: a real PNG that is drawn from the prompt.

The file is the same for the same prompt, size and seed, byte for byte, in any process.
"""

import asyncio
import hashlib
import re
import struct
import zlib
from typing import Final

from pydantic import Field, field_validator

from jobs.errors import EngineFailed, InvalidJob, UnsupportedParams
from llm_pb import llm_pb2
from services.gpu_worker.engines.engine import EngineConfig, Image
from services.gpu_worker.engines.images import ImageEngine, ImageOptions, Order, Painted

MEDIA_TYPE: Final = "image/png"
_TILES: Final = 8
"""Tiles in a row, and rows. The right half mirrors the left one."""
_MAX_PIXELS: Final = 4096 * 4096


class SimulatedImageOptions(ImageOptions):
    """The options of simulated-images."""

    seconds: float = Field(0, ge=0)
    """Time that an image takes."""
    refuse: str | None = None
    """A regular expression: a prompt in which it is found is refused, as by a filter of content."""
    fail: str | None = None
    """A regular expression: the engine fails on a prompt in which it is found."""

    @field_validator("refuse", "fail")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        return pattern


class SimulatedPainter:
    """See Painter."""

    name = "simulated-images"

    def __init__(self, options: SimulatedImageOptions) -> None:
        self.gpu = llm_pb2.GpuInfo(name="simulated")
        self._options = options

    async def start(self) -> None:
        """Do nothing."""

    async def paint(self, order: Order) -> Painted:
        """Draw the image; see Painter.paint."""
        if order.width * order.height > _MAX_PIXELS:
            raise UnsupportedParams(f"image_size: at most {_MAX_PIXELS} pixels")
        await asyncio.sleep(self._options.seconds)
        for pattern, error in ((self._options.refuse, InvalidJob), (self._options.fail, EngineFailed)):
            if pattern is not None and re.search(pattern, order.prompt):
                raise error("scripted: the engine makes no image of this prompt")
        data = await asyncio.to_thread(png, order.prompt, order.width, order.height, order.seed or 0)
        return Painted(Image(data, MEDIA_TYPE), len(order.prompt.encode()))

    async def close(self) -> None:
        """Do nothing."""


def png(prompt: str, width: int, height: int, seed: int) -> bytes:
    """Return an image of coloured tiles."""
    digest = hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
    paper, ink = digest[:3], digest[3:6]
    lines = bytearray()
    for y in range(height):
        bits = digest[8 + y * _TILES // height]
        # A byte before each line names its filter: none.
        lines.append(0)
        for x in range(_TILES):
            tile = min(x, _TILES - 1 - x)
            pixels = (x + 1) * width // _TILES - x * width // _TILES
            lines += (ink if bits >> tile & 1 else paper) * pixels
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    text = b"Description\0" + prompt.encode("latin-1", "replace")[:1000]
    chunks = ((b"IHDR", header), (b"tEXt", text), (b"IDAT", zlib.compress(bytes(lines), 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def create(config: EngineConfig) -> ImageEngine:
    """Return the engine. Raises ValueError for an unknown or bad option."""
    options = SimulatedImageOptions.model_validate(dict(config.options))
    return ImageEngine(SimulatedPainter(options), config, options)
