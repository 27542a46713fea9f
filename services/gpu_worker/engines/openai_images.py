"""Images of any provider with OpenAI's Images API."""

import base64
import binascii
import json
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from pydantic import Field, HttpUrl

from jobs.errors import EngineFailed, UnsupportedParams
from llm_pb import llm_pb2
from services.gpu_worker.engines.engine import EngineConfig, Image
from services.gpu_worker.engines.images import ImageEngine, ImageOptions, Order, Painted
from services.gpu_worker.engines.openai_errors import as_job_errors, charged
from services.gpu_worker.engines.openai_transport import ask_for_models, provider_client

_STARTS: Final = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}
"""The kinds of images by the bytes with which they begin."""


class OpenAIImageOptions(ImageOptions):
    """The options of openai-images."""

    base_url: HttpUrl
    """Where the provider's API begins, "/v1" included."""
    api_key_file: Path | None = None
    """A file with the key, which is read for each request. Default: the environment variable OPENAI_API_KEY."""
    takes_seed: bool = False
    """Whether the provider knows the member seed, which OpenAI does not."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """More members of each request: {"response_format": "b64_json"} for models that return a link otherwise."""
    max_answer_bytes: int = Field(64 * 1024 * 1024, ge=1)
    """Maximum size of an answer, which holds the image in base64."""


class OpenAIPainter:
    """See Painter."""

    name = "openai-images"

    def __init__(self, model: str, options: OpenAIImageOptions) -> None:
        self.gpu = llm_pb2.GpuInfo(name=urlsplit(str(options.base_url)).netloc)
        self._model = model
        self._options = options
        self._client = provider_client(
            options.base_url, options.api_key_file, options.timeout.total_seconds(), options.max_answer_bytes
        )

    async def start(self) -> None:
        """See ask_for_models."""
        await ask_for_models(self._client)

    async def paint(self, order: Order) -> Painted:
        """Ask the provider for the image; see Painter.paint."""
        body = dict(self._options.extra_body)
        if order.seed is not None:
            if not self._options.takes_seed:
                raise UnsupportedParams("params.seed: the provider does not support it")
            body["seed"] = order.seed
        size: Any = f"{order.width}x{order.height}"
        async with as_job_errors():
            response = await self._client.images.with_raw_response.generate(
                model=self._model, prompt=order.prompt, n=1, size=size, extra_body=body
            )
            answer = json.loads(response.content)
            usage = answer.get("usage") or {}
            return Painted(
                _image(answer),
                _count(usage.get("input_tokens")) or 0,
                _count(usage.get("output_tokens")),
                charged(usage.get("cost"), response.headers),
            )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


def _image(answer: Any) -> Image:
    """Return the image of an answer. Raises EngineFailed for one that holds none."""
    try:
        data = base64.b64decode(answer["data"][0]["b64_json"], validate=True)
    except (binascii.Error, LookupError, TypeError, ValueError):
        raise EngineFailed("the provider's answer holds no image: see the option extra_body") from None
    found = next((kind for start, kind in _STARTS.items() if data.startswith(start)), None)
    if found is None:
        raise EngineFailed("the provider's answer holds no PNG, JPEG or WebP")
    return Image(data, found)


def _count(value: Any) -> int | None:
    """Return a number of tokens that a provider has counted."""
    return value if isinstance(value, int) and 0 <= value < 1_000_000 else None


def create(config: EngineConfig) -> ImageEngine:
    """Return the engine. Raises ValueError for an unknown or bad option."""
    options = OpenAIImageOptions.model_validate(dict(config.options))
    return ImageEngine(OpenAIPainter(config.model_path, options), config, options)
